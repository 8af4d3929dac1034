"""To one file a rank, and back."""

from __future__ import annotations

from weightkit.checkpoint import Checkpoint
from weightkit.errors import PlanError
from weightkit.layouts import FileSet, lay_out_expert_ranks, lay_out_published, lay_out_ranks
from weightkit.layouts.published import SHARD_BYTES
from weightkit.transforms.strip import strip_mtp


def shard(checkpoint: Checkpoint, *, mp: int | None = None, ep: int | None = None) -> FileSet:
    """One file a rank, in the layout of DeepSeek's inference demo, without MTP layers.

    The source may lie in any layout, ranks of another degree too. For other dtypes or fewer experts, ``cast`` and
    ``keep_experts`` come first.

    Args:
        mp: model-parallel ranks: attention, dense and shared MLPs, embedding and head are split, each rank owns its
            experts.
        ep: expert-parallel ranks: only the routed experts are divided, as evenly as they go; the rest is whole on each
            rank.

    Raises:
        PlanError: a degree that does not divide the checkpoint, with the legal ones, or not exactly one of ``mp`` and
            ``ep``.
    """
    if (mp is None) == (ep is None):
        raise PlanError("a shard needs either model-parallel or expert-parallel ranks", expected="one of mp and ep")
    stripped = strip_mtp(checkpoint)
    return lay_out_ranks(stripped, mp) if mp is not None else lay_out_expert_ranks(stripped, ep or 0)


def merge(checkpoint: Checkpoint, *, shard_bytes: int = SHARD_BYTES) -> FileSet:
    """The published layout: an index and shards of at most ``shard_bytes``. Of rank files, whole tensors again, byte
    for byte.

    A checkpoint that is in the published layout keeps its shards.
    """
    return lay_out_published(checkpoint, shard_bytes=shard_bytes)
