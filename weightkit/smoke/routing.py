"""How tokens fall on experts, and which experts the router has lost.

An expert without a token is no defect by itself: of few tokens, many experts get none, and texts differ. So experts are
judged only where the average load is at least ``JUDGED_LOAD``: there, an expert that would get even a twentieth of the
average gets at least one token with a probability of 99.9 % (1 - exp(-load / 20)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from weightkit.errors import MissingTensorError
from weightkit.family import Architecture
from weightkit.model import Weights
from weightkit.smoke.verdict import Check

FAINT_SHARE = 1 / 20
JUDGED_LOAD = math.log(1000) / FAINT_SHARE

OUTWEIGHS = 1.0
"""Sigmoid scores lie between 0 and 1: an expert whose bias is further than this from its layer's median is chosen or
passed over whatever the token."""

_LINES_SHOWN = 8


def check_routers(arch: Architecture, weights: Weights, loads: Mapping[int, Sequence[int]]) -> Check:
    """The check ``routers``: rows of zeros and values that are not finite in their weights.

    Args:
        arch: the model's.
        weights: read for each layer's router.
        loads: its keys are the MoE layers.
    """
    found = [line for layer in loads for line in _defects(arch, weights, layer)]
    if found:
        return Check("routers", False, _some(found), {"defects": found})
    return Check("routers", True, f"{len(loads)} layers: no row of zeros, all values finite")


def check_load(arch: Architecture, weights: Weights, loads: Mapping[int, Sequence[int]], tokens: int) -> Check:
    """The check ``expert load``: the experts of each layer that no token reached, judged as this module says.

    Args:
        arch: the model's.
        weights: read for the biases of layers with idle experts.
        loads: tokens of each expert, by MoE layer.
        tokens: how many tokens went through.
    """
    experts, average = arch.n_routed_experts, tokens * arch.num_experts_per_tok / arch.n_routed_experts
    idle = {layer: [e for e, count in enumerate(counts) if not count] for layer, counts in loads.items()}
    idle = {layer: numbers for layer, numbers in idle.items() if numbers}
    figures = {
        "tokens": tokens,
        "average": average,
        "judged_from": JUDGED_LOAD,
        "loads": {str(layer): list(counts) for layer, counts in loads.items()},
        "idle": {str(layer): numbers for layer, numbers in idle.items()},
    }
    every = [count for counts in loads.values() for count in counts]
    spread = f"{tokens:,} tokens, {average:,.0f} an expert on average, {min(every):,} to {max(every):,}"
    if not idle:
        return Check("expert load", True, f"{spread}; no expert is idle", figures)
    count = sum(map(len, idle.values()))
    if average < JUDGED_LOAD:
        why = f"{count:,} of {experts * len(loads):,} idle, which proves nothing below an average of {JUDGED_LOAD:.0f}"
        return Check("expert load", None, f"{spread}; {why}", figures)
    lines = [line for layer, numbers in idle.items() for line in _dead(arch, weights, layer, numbers)]
    return Check("expert load", False, f"{spread}; dead: {count:,}\n{_some(lines)}", figures)


def _defects(arch: Architecture, weights: Weights, layer: int) -> Iterator[str]:
    gate = weights.get(f"model.layers.{layer}.mlp.gate.weight").float()
    bias = _bias(arch, weights, layer)
    yield from _lines(layer, "a row that is not finite", ~gate.isfinite().all(dim=-1))
    yield from _lines(layer, "a row of zeros", (gate == 0).all(dim=-1))
    if bias is not None:
        yield from _lines(layer, "a bias that is not finite", ~bias.isfinite())


def _lines(layer: int, what: str, marked: torch.Tensor) -> Iterator[str]:
    numbers = marked.nonzero().flatten().tolist()
    if numbers:
        yield f"layer {layer}: {what} for {_experts(numbers)}"


def _dead(arch: Architecture, weights: Weights, layer: int, numbers: Sequence[int]) -> Iterator[str]:
    bias = _bias(arch, weights, layer)
    away = None if bias is None else bias - bias.median()
    barred = [n for n in numbers if away is not None and arch.scoring_func == "sigmoid" and away[n] < -OUTWEIGHS]
    rest = [n for n in numbers if n not in barred]
    if barred and away is not None:
        below = ", ".join(f"{-float(away[n]):.3g}" for n in barred[:4])
        yield f"layer {layer}: {_experts(barred)}: the bias is {below} below the median, and scores are at most 1"
    if rest:
        yield f"layer {layer}: {_experts(rest)}"


def _bias(arch: Architecture, weights: Weights, layer: int) -> torch.Tensor | None:
    if not arch.has_router_bias:
        return None
    try:
        return weights.get(f"model.layers.{layer}.mlp.gate.e_score_correction_bias").float()
    except MissingTensorError:
        return None


def _experts(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12])) + (f" and {len(numbers) - 12} more" if len(numbers) > 12 else "")
    return f"expert{'s' * (len(numbers) > 1)} {shown}"


def _some(lines: Sequence[str]) -> str:
    more = [f"... and {len(lines) - _LINES_SHOWN} more lines"] if len(lines) > _LINES_SHOWN else []
    return "\n".join([*lines[:_LINES_SHOWN], *more])
