"""One file a rank, under the names of DeepSeek's inference demo: ``model{rank}-mp{N}.safetensors``.

Expert-parallel files, ``model{rank}-ep{N}.safetensors``, hold a share of the routed experts each and everything else
whole.

GPTQ weights are cut between words and groups; a rank's part of ``g_idx`` keeps the group numbers of the whole, so that
cutting and joining only move bytes. Who computes from one rank's file alone takes the first number from all of them, as
``rank_share`` has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from weightkit.checkpoint import Checkpoint, Header
from weightkit.checkpoint.checkpoint import stored_tensors
from weightkit.checkpoint.folder import SideFile, side_files
from weightkit.checkpoint.json_file import json_bytes
from weightkit.checkpoint.tensors import (
    GroupDequantized,
    LazyTensor,
    Stored,
    concat,
    narrow,
    narrow_with_groups,
)
from weightkit.errors import CheckpointError, MissingTensorError, TensorError, WeightkitError, raise_all
from weightkit.family import (
    Architecture,
    Expected,
    blueprint,
    demo_arguments,
    expert_of,
    expert_ranges,
    in_demo,
    is_mtp,
    require_mp,
    to_demo,
    to_published,
)
from weightkit.layouts.declare import architecture_of, declare_no_mtp, without_stale_quantization
from weightkit.layouts.fileset import FileSet, file_set
from weightkit.layouts.fit import unfit
from weightkit.layouts.scan import scan_files

#: The demo's own arguments, for its ``--config``.
DEMO_CONFIG_NAME = "demo_config.json"
_RANK_FILE = re.compile(r"model(?P<rank>0|[1-9]\d{0,5})-(?P<kind>mp|ep)(?P<count>[1-9]\d{0,5})\.safetensors")


class RankSet(NamedTuple):
    """``kind`` is ``mp`` or ``ep``; ``size`` is the number of ranks."""

    kind: str
    size: int

    def name(self, rank: int) -> str:
        return f"model{rank}-{self.kind}{self.size}.safetensors"

    def names(self) -> list[str]:
        return [self.name(rank) for rank in range(self.size)]


def rank_sets(folder: Path) -> list[RankSet]:
    """The sets of rank files of which the folder holds at least one."""
    matches = (_RANK_FILE.fullmatch(path.name) for path in folder.iterdir())
    return sorted({RankSet(match["kind"], int(match["count"])) for match in matches if match})


def open_ranks(folder: Path, config: Mapping[str, object], *, replicas_of: int = 0) -> Checkpoint:
    """Open rank files as one checkpoint: split tensors joined, experts gathered, replicas taken from one rank.

    Args:
        replicas_of: the rank; the first where there is no such rank.

    Raises:
        MissingFileError: a rank's file is not there.
        CheckpointError: files of several degrees lie together, or the ranks do not fit together; all problems at once.
    """
    sets = rank_sets(folder)
    if len(sets) != 1:
        raise CheckpointError(
            "rank files of several degrees in one folder",
            where=folder,
            found=", ".join(ranks.name(0) for ranks in sets),
        )
    scan = scan_files(folder, sets[0].names())
    raise_all(
        "not a whole set of ranks", scan.problems, where=folder, fix="Write the set again, or copy what is missing."
    )
    headers = [scan.headers[name] for name in sets[0].names()]
    config = _true_of_ranks(config, folder, headers)
    expected = blueprint(Architecture.from_config(config, where=str(folder / "config.json")))
    replicas_of = replicas_of if replicas_of < sets[0].size else 0
    tensors, problems = gather(folder, headers, sets[0], expected, replicas_of=replicas_of)
    raise_all("the ranks do not fit together", problems or list(unfit(tensors, expected)), where=folder)
    ordered = {name: tensors[name] for name in expected if name in tensors}
    layout = f"{sets[0].size} {sets[0].kind} ranks"
    return Checkpoint(folder, layout, ordered, config, _side_files(folder), {}, scan.stamps)


def _true_of_ranks(config: Mapping[str, object], folder: Path, headers: list[Header]) -> Mapping[str, object]:
    """The published config, as it is true of these files: rank files leave MTP layers out."""
    stored = [tensor for header in headers for tensor in stored_tensors(folder, header).values()]
    arch = Architecture.from_config(config, where=str(folder / "config.json"))
    if not any(is_mtp(entry.name, arch) for header in headers for entry in header.entries):
        config = declare_no_mtp(config)
    return without_stale_quantization(config, stored)


def _side_files(folder: Path) -> dict[str, SideFile]:
    return {name: file for name, file in side_files(folder).items() if name != DEMO_CONFIG_NAME}


def gather(
    folder: Path, headers: list[Header], ranks: RankSet, expected: Mapping[str, Expected], *, replicas_of: int = 0
) -> tuple[dict[str, LazyTensor], list[WeightkitError]]:
    """Published name to tensor, and what keeps others from being gathered."""
    held: dict[str, dict[int, Stored]] = {}
    for rank, header in enumerate(headers):
        for name, tensor in stored_tensors(folder / ranks.name(rank), header).items():
            held.setdefault(name, {})[rank] = tensor
    tensors: dict[str, LazyTensor] = {}
    problems: list[WeightkitError] = _misplaced(folder, headers, ranks, expected)
    if problems:
        return tensors, problems
    for demo_name, parts in held.items():
        try:
            name = to_published(demo_name)
            if name not in expected:
                raise CheckpointError("a tensor that the config does not call for", where=f"{folder}: {demo_name}")
            tensors[name] = _join(name, parts, ranks.size, expected[name], replicas_of)
        except WeightkitError as problem:
            problems.append(problem)
    return tensors, problems


def _misplaced(
    folder: Path, headers: list[Header], ranks: RankSet, expected: Mapping[str, Expected]
) -> list[WeightkitError]:
    """Files that hold another rank's experts: they were renamed, and their parts would be joined in a wrong order."""
    count = 1 + max((item.expert for item in expected.values() if item.expert is not None), default=-1)
    if ranks.size > count:
        return []
    owned = expert_ranges(count, ranks.size)
    found: list[WeightkitError] = []
    for rank, header in enumerate(headers):
        held = {expert for entry in header.entries if (expert := expert_of(entry.name)) is not None}
        if strangers := sorted(held - set(owned[rank])):
            found.append(
                CheckpointError(
                    "a rank's file that holds experts of another rank",
                    where=folder / ranks.name(rank),
                    expected=f"experts {owned[rank][0]} to {owned[rank][-1]}",
                    found=f"expert {strangers[0]}" + (f" and {len(strangers) - 1} more" if strangers[1:] else ""),
                    fix="Give the files their own ranks' names again, or write the set again.",
                )
            )
    return found


def _join(name: str, parts: Mapping[int, Stored], ranks: int, expected: Expected, replicas_of: int) -> LazyTensor:
    if expected.expert is not None and len(parts) == 1:
        (part,) = parts.values()
        if part.shape != expected.shape:
            raise _wrong_shape(name, [part], expected)
        return part
    missing = [rank for rank in range(ranks) if rank not in parts]
    if missing:
        raise MissingTensorError(
            "not on every rank", where=name, expected=f"on {ranks} ranks", found=f"not on {missing[:8]}"
        )
    ordered = [parts[rank] for rank in range(ranks)]
    if all(part.shape == expected.shape for part in ordered):
        return ordered[replicas_of]
    if expected.split_dim is not None:
        try:
            joined = concat(ordered, expected.split_dim)
        except ValueError as exc:
            raise TensorError(f"its parts do not join ({exc})", where=name) from exc
        if joined.shape == expected.shape:
            return joined
    raise _wrong_shape(name, ordered, expected)


def _wrong_shape(name: str, parts: Sequence[Stored], expected: Expected) -> TensorError:
    shapes = sorted({str(list(part.shape)) for part in parts})
    return TensorError("wrong shape on the ranks", where=name, expected=list(expected.shape), found=", ".join(shapes))


def lay_out_ranks(checkpoint: Checkpoint, mp: int) -> FileSet:
    """The checkpoint as ``mp`` model-parallel ranks. MTP layers must have been stripped.

    Raises ``PlanError`` where the degree does not divide it, with the legal ones.
    """
    arch = architecture_of(checkpoint)
    require_mp(arch, mp, fp8="F8_E4M3" in checkpoint.dtypes, gptq=arch.is_gptq)
    owned = expert_ranges(arch.n_routed_experts, mp)

    def share(tensor: LazyTensor, expected: Expected, rank: int) -> LazyTensor | None:
        return share_of_rank(tensor, expected, rank, mp, owned[rank])

    return _lay_out(checkpoint, arch, RankSet("mp", mp), share)


def rank_share(checkpoint: Checkpoint, rank: int, mp: int) -> Checkpoint:
    """What ``rank`` of ``mp`` model-parallel ranks computes with: its parts of split tensors and its experts, under the
    published names, in whatever form they are. No MTP layers.

    Of ``mp`` rank files, opened with this rank's replicas, it is what this rank's file holds and nothing else. Raises
    ``PlanError`` where the degree does not divide it.
    """
    arch = architecture_of(checkpoint)
    require_mp(arch, mp, fp8="F8_E4M3" in checkpoint.dtypes, gptq=arch.is_gptq)
    owned, expected = expert_ranges(arch.n_routed_experts, mp)[rank], blueprint(arch)
    shares = (
        (name, share_of_rank(tensor, expected[name], rank, mp, owned))
        for name, tensor in checkpoint.tensors.items()
        if name in expected and not expected[name].mtp
    )
    return replace(checkpoint, tensors={name: tensor for name, tensor in shares if tensor is not None})


def share_of_rank(tensor: LazyTensor, expected: Expected, rank: int, mp: int, owned: range) -> LazyTensor | None:
    """What ``rank`` of ``mp`` has of a tensor: all, a part, or None of an expert that is not among ``owned``."""
    if expected.expert is not None:
        return tensor if expected.expert in owned else None
    if expected.split_dim is None:
        return tensor
    length = tensor.shape[expected.split_dim] // mp
    if isinstance(tensor, GroupDequantized) and expected.split_dim == 1:
        return narrow_with_groups(tensor, rank * length, length)
    return narrow(tensor, expected.split_dim, rank * length, length)


def lay_out_expert_ranks(checkpoint: Checkpoint, ep: int) -> FileSet:
    """The routed experts over ``ep`` ranks, as evenly as they divide; everything else whole on each."""
    arch = architecture_of(checkpoint)
    owners = {expert: rank for rank, owned in enumerate(expert_ranges(arch.n_routed_experts, ep)) for expert in owned}

    def share(tensor: LazyTensor, expected: Expected, rank: int) -> LazyTensor | None:
        return tensor if expected.expert is None or owners[expected.expert] == rank else None

    return _lay_out(checkpoint, arch, RankSet("ep", ep), share)


Share = Callable[[LazyTensor, Expected, int], LazyTensor | None]


def _lay_out(checkpoint: Checkpoint, arch: Architecture, ranks: RankSet, share: Share) -> FileSet:
    """A file for each rank, tensors in the checkpoint's order, which reads each source file from front to back."""
    expected = blueprint(arch)
    unknown = [name for name in checkpoint.tensors if name not in expected or expected[name].mtp]
    problems: list[WeightkitError] = [
        TensorError("an MTP layer's, or not one that the config calls for", where=name) for name in unknown
    ]
    raise_all(
        "cannot be laid out in rank files",
        problems + list(unfit(checkpoint.tensors, expected)),
        where=checkpoint.root,
        fix=f"weightkit verify {checkpoint.root} tells more.",
    )
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if in_demo(expected[name])}
    files: dict[str, dict[str, LazyTensor]] = {}
    for rank in range(ranks.size):
        shares = ((name, share(tensor, expected[name], rank)) for name, tensor in kept.items())
        files[ranks.name(rank)] = {to_demo(name): tensor for name, tensor in shares if tensor is not None}
    return file_set(checkpoint, files, index=False, extra=_demo_config(checkpoint, arch))


def _demo_config(checkpoint: Checkpoint, arch: Architecture) -> dict[str, bytes]:
    """The demo's arguments; none for GPTQ, which it cannot read."""
    if arch.is_gptq:
        return {}
    dtype: Literal["fp8", "bf16"] = "fp8" if "F8_E4M3" in checkpoint.dtypes else "bf16"
    return {DEMO_CONFIG_NAME: json_bytes(demo_arguments(arch, dtype=dtype))}
