"""Fewer routed experts: keep some of each layer's, and cut the router to match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.json_file import read_json_object
from weightkit.checkpoint.tensors import LazyTensor, concat, narrow
from weightkit.errors import FormatError, PlanError, WeightkitError, raise_all
from weightkit.family import Architecture, Expected, Role, blueprint, legal_expert_counts, rename_expert
from weightkit.layouts.declare import architecture_of
from weightkit.layouts.fit import unfit

#: A layer's kept expert ids, ascending; they are renumbered from 0 in this order.
Kept = Mapping[int, Sequence[int]]


def keep_experts(checkpoint: Checkpoint, count: int, *, kept: Kept | None = None) -> Checkpoint:
    """The checkpoint with ``count`` routed experts a layer; router rows, correction bias and config are cut to match.

    Args:
        count: experts a layer, of which each group keeps an equal share.
        kept: by layer, the ids to keep; every layer with routed experts must be named. Without it the first of each
            group.

    Raises:
        PlanError: a count that routing does not allow (with the legal ones), or ids that are not ``count`` of the
            layer's, an equal number from each group; all problems at once.
        MissingTensorError: a GPTQ rule names experts by number, and would mean others afterwards.
    """
    arch = architecture_of(checkpoint)
    legal = legal_expert_counts(arch)
    if count not in legal:
        shown = ", ".join(map(str, legal)) if len(legal) <= 40 else f"{legal[0]}, {legal[1]}, ... {legal[-1]}"
        raise PlanError(
            f"{count} experts cannot be kept of {arch.n_routed_experts}",
            where="--experts",
            expected=f"one of {shown}",
            found=count,
            fix="Use one of them: every group of experts gives up as many.",
        )
    expected = blueprint(arch)
    raise_all("experts cannot be taken out", list(unfit(checkpoint.tensors, expected)), where=checkpoint.root)
    present = {item.layer for name, item in expected.items() if item.expert is not None and name in checkpoint.tensors}
    layers = sorted(layer for layer in present if layer is not None)
    chosen = (
        dict.fromkeys(layers, _first_of_each_group(arch, count))
        if kept is None
        else _checked(kept, layers, arch, count)
    )
    tensors = {
        new: tensor
        for name, source in checkpoint.tensors.items()
        for new, tensor in _cut(name, source, expected.get(name), chosen)
    }
    config = {**checkpoint.config, "n_routed_experts": count}
    result = replace(checkpoint, tensors=tensors, config=config, placement={})
    if arch.is_gptq:
        _require_same_rules(result)
    return result


def _require_same_rules(result: Checkpoint) -> None:
    """Refuse GPTQ rules that name experts by number, where the numbers changed what they say."""
    problems = list(unfit(result.tensors, blueprint(architecture_of(result))))
    raise_all("the rules of quantization_config do not hold for renumbered experts", problems, where=result.root)


def read_kept(path: Path) -> Kept:
    """A JSON file of layer to expert ids, such as ``{"3": [0, 5, 9, 12]}``. Raises ``FormatError`` for anything
    else."""
    kept: dict[int, list[int]] = {}
    for layer, ids in read_json_object(path).items():
        number = int(layer) if layer.isdecimal() and len(layer) < 10 else None
        if (
            number is None
            or str(number) != layer
            or not isinstance(ids, list)
            or any(type(expert) is not int for expert in ids)
        ):
            raise FormatError(f"layer {layer!r}: not a list of expert ids", where=path, expected='{"3": [0, 5, 9, 12]}')
        kept[number] = ids
    return kept


def _first_of_each_group(arch: Architecture, count: int) -> tuple[int, ...]:
    size, share = arch.n_routed_experts // arch.n_group, count // arch.n_group
    return tuple(expert for expert in range(arch.n_routed_experts) if expert % size < share)


def _checked(kept: Kept, layers: Sequence[int], arch: Architecture, count: int) -> dict[int, tuple[int, ...]]:
    problems: list[WeightkitError] = []
    size, share = arch.n_routed_experts // arch.n_group, count // arch.n_group
    for layer in sorted({*layers, *kept}):
        ids = sorted(kept.get(layer, ()))
        by_group = [sum(expert // size == group for expert in ids) for group in range(arch.n_group)]
        where = f"--keep, layer {layer}"
        if layer not in layers:
            problems.append(PlanError("a layer without routed experts", where=where, expected=f"layers {list(layers)}"))
        elif len(set(ids)) != len(ids) or any(not 0 <= expert < arch.n_routed_experts for expert in ids):
            problems.append(
                PlanError(
                    "not distinct ids of experts", where=where, expected=f"0 to {arch.n_routed_experts - 1}", found=ids
                )
            )
        elif by_group != [share] * arch.n_group:
            problems.append(
                PlanError(
                    "unequal shares of the groups", where=where, expected=f"{share} of each {size}", found=f"{by_group}"
                )
            )
    raise_all("these experts cannot be kept", problems)
    return {layer: tuple(sorted(kept[layer])) for layer in layers}


def _cut(
    name: str, tensor: LazyTensor, expected: Expected | None, chosen: Mapping[int, Sequence[int]]
) -> list[tuple[str, LazyTensor]]:
    ids = chosen.get(expected.layer) if expected is not None and expected.layer is not None else None
    if expected is None or ids is None:
        return [(name, tensor)]
    if expected.expert is not None:
        return [(rename_expert(name, ids.index(expected.expert)), tensor)] if expected.expert in ids else []
    if expected.role in (Role.ROUTER, Role.ROUTER_BIAS):
        return [(name, _rows(tensor, ids))]
    return [(name, tensor)]


def _rows(tensor: LazyTensor, ids: Sequence[int]) -> LazyTensor:
    """The rows ``ids`` (ascending), neighbours taken together."""
    runs = [[row for _, row in run] for _, run in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0])]
    return concat([narrow(tensor, 0, run[0], len(run)) for run in runs], 0)
