"""weightkit: one tool for very large open-weight checkpoints.

A checkpoint is an ordered mapping from names to lazy tensors, a transform is a function from one checkpoint to
another, and one writer turns the result into files:

    import weightkit as wk

    checkpoint = wk.open_checkpoint("weights/deepseek-v3/fp8")
    wk.write(wk.shard(wk.cast(wk.strip_mtp(checkpoint), "bf16"), mp=16), "weights/deepseek-v3/bf16-mp16")

All of it:

    open_checkpoint     whatever lies at a path or an address, in any layout, as a Checkpoint
    Checkpoint          published names to lazy tensors, config and side files
    strip_mtp           without its multi-token-prediction layers
    cast                FP8 with block scales, or any float weights, in BF16, F16 or F32
    quantize            experts, or all linear maps, to int4 in the AutoGPTQ format
    keep_experts        with fewer routed experts
    shard               as one file a model-parallel or expert-parallel rank
    merge               as the hubs publish it: an index and shards
    write               to a folder, resumable and checksummed
    verify              all problems of a checkpoint at once
    inspect             what a checkpoint is, or a known model, with nothing downloaded
    plan                what a model takes of GPUs, disk and time, before it is fetched
    generate            text, from any layout and dtype
    fetch               from Hugging Face or ModelScope, resumable and verified
    RayExecutor         to write with the nodes of a Ray cluster
    RayReaders          to verify with them
    WeightkitError      the base of all errors that are raised on purpose

Importing this imports no torch; what needs it imports it when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightkit.version import __version__ as __version__

#: Public name to the module that defines it.
_HOMES = {
    "Checkpoint": "weightkit.checkpoint",
    "RayExecutor": "weightkit.cluster",
    "RayReaders": "weightkit.cluster",
    "WeightkitError": "weightkit.errors",
    "cast": "weightkit.transforms",
    "fetch": "weightkit.hub",
    "generate": "weightkit.generation",
    "inspect": "weightkit.examine",
    "keep_experts": "weightkit.transforms",
    "merge": "weightkit.transforms",
    "open_checkpoint": "weightkit.layouts",
    "plan": "weightkit.sizing",
    "quantize": "weightkit.quantization",
    "shard": "weightkit.transforms",
    "strip_mtp": "weightkit.transforms",
    "verify": "weightkit.examine",
    "write": "weightkit.writer",
}

if TYPE_CHECKING:
    from weightkit.checkpoint import Checkpoint
    from weightkit.cluster import RayExecutor, RayReaders
    from weightkit.errors import WeightkitError
    from weightkit.examine.inspect import inspect
    from weightkit.examine.verify import verify
    from weightkit.generation import generate
    from weightkit.hub import fetch
    from weightkit.layouts import open_checkpoint
    from weightkit.quantization import quantize
    from weightkit.sizing.plan import plan
    from weightkit.transforms import cast, keep_experts, merge, shard, strip_mtp
    from weightkit.writer import write

__all__ = [
    "Checkpoint",
    "RayExecutor",
    "RayReaders",
    "WeightkitError",
    "cast",
    "fetch",
    "generate",
    "inspect",
    "keep_experts",
    "merge",
    "open_checkpoint",
    "plan",
    "quantize",
    "shard",
    "strip_mtp",
    "verify",
    "write",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
