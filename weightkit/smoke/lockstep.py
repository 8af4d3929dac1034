"""Three models of a pair, layer by layer side by side, so that each weight is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from weightkit.family import expert_of, layer_of
from weightkit.model import Dispatch, GatedMLP, Layer, Model, MoE, Rotation
from weightkit.smoke.forward import LOGIT_TOKENS, layer_names
from weightkit.smoke.pair import Pair

States = list[torch.Tensor]
"""Of the reference, the other and the sound side: [1, tokens, hidden] each."""


@dataclass(frozen=True)
class LayerDrift:
    """How far hidden states are from the reference's after a layer, relative to their length.

    Attributes:
        layer: its index; -1 for the embedding.
        mean, worst: over tokens.
        explained: the mean of the sound side, which differs only by what the formats explain.
        same_experts: the share of the reference's choices of experts that the other makes too; None without experts.
    """

    layer: int
    mean: float
    worst: float
    explained: float
    same_experts: float | None = None


@dataclass
class Walk:
    """What the walk showed.

    Attributes:
        drifts: the embedding's and each layer's.
        divergence: KL(reference || other) of each token, in nats, F32 on the CPU.
        divergence_explained: the same, of the sound side.
        agreement: whether both have the same best token, bool on the CPU.
        agreement_explained: the same, of the sound side.
        finite: positions with finite logits, of the reference and the other.
    """

    drifts: list[LayerDrift] = field(default_factory=list)
    divergence: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    divergence_explained: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    agreement: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    agreement_explained: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    finite: tuple[int, int] = (0, 0)


@torch.inference_mode()
def walk(pair: Pair, ids: Sequence[int], advance: Callable[[], None]) -> Walk:
    """Run ``ids`` through the pair's models, and compare all of its tensors on the way.

    Args:
        pair: its ``differences`` are filled.
        ids: one sequence.
        advance: called after each layer.
    """
    arch = pair.reference.arch
    models = [Model(arch, side, pair.probe if i == 0 else None) for i, side in enumerate(pair.sides)]
    found, names = Walk(), _by_layer(pair)
    hidden = list(pair.rows("model.embed_tokens.weight", torch.tensor([ids])))
    found.drifts.append(_drift(-1, hidden))
    rotation = models[0].rope.at(torch.arange(len(ids), device=hidden[0].device))
    for layers in zip(*(model.layers for model in models), strict=True):
        index = layers[0].index
        pair.prefetch(layer_names(layers[0]))
        attended = _attend(pair, layers, hidden, rotation)
        hidden, same = _feed(pair, layers, attended)
        _compare_rest(pair, names.pop(index, []))
        found.drifts.append(_drift(index, hidden, same))
        advance()
    _heads(models, hidden, found)
    for rest in names.values():  # the embedding, and MTP layers, which are no part of the models
        _compare_rest(pair, rest)
    return found


def _by_layer(pair: Pair) -> dict[int | None, list[str]]:
    by_layer: dict[int | None, list[str]] = {}
    for name in pair.names:
        by_layer.setdefault(layer_of(name), []).append(name)
    return by_layer


def _compare_rest(pair: Pair, names: Sequence[str]) -> None:
    """Compare the tensors that no product asked for."""
    rest = [name for name in names if name not in pair.differences]
    pair.prefetch(rest)
    for name in rest:
        pair.get(name)
        pair.release()


def _attend(pair: Pair, layers: Sequence[Layer], hidden: States, rotation: Rotation) -> States:
    """Hidden states after the layers' attention; computed once for sides that have the same states and weights."""
    attended = [layers[0].attend(hidden[0], rotation)]
    names = layer_names(layers[0])[: 1 + len(layers[0].attention.names)]
    equal = all(pair.differences[name].relative == 0 for name in names)
    for layer, states in zip(layers[1:], hidden[1:], strict=True):
        same = equal and torch.equal(states, hidden[0])
        attended.append(attended[0] if same else layer.attend(states, rotation))
    return attended


def _feed(pair: Pair, layers: Sequence[Layer], attended: States) -> tuple[States, float | None]:
    """Hidden states after the layers' MLPs or experts, and the share of experts chosen alike."""
    inputs = [layer.mlp_input(states) for layer, states in zip(layers, attended, strict=True)]
    mixtures = [layer.mlp for layer in layers if isinstance(layer.mlp, MoE)]
    if not mixtures:
        outputs, same = [layer.mlp(x) for layer, x in zip(layers, inputs, strict=True)], None
        pair.release()
    else:
        outputs, same = _mix(pair, mixtures, inputs)
    return [a + b for a, b in zip(attended, outputs, strict=True)], same


def _mix(pair: Pair, mixtures: Sequence[MoE], inputs: States) -> tuple[States, float]:
    """As ``MoE`` does it, all sides an expert at a time."""
    tokens = [x.flatten(0, -2) for x in inputs]
    routes = [mixture.route(x) for mixture, x in zip(mixtures, tokens, strict=True)]
    shared: list[torch.Tensor | None] = [None] * len(mixtures)
    if mixtures[0].arch.n_shared_experts:
        shared = [_shared_experts(mixture)(x) for mixture, x in zip(mixtures, tokens, strict=True)]
    pair.release()
    dispatches = [mixture.dispatch(ids) for mixture, (ids, _) in zip(mixtures, routes, strict=True)]
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in tokens]
    experts = [mixtures[0].expert(number) for number in range(mixtures[0].arch.n_routed_experts)]
    pair.prefetch([name for expert in experts for name in expert.names])
    for number, expert in enumerate(experts):
        for name in expert.names:
            pair.get(name)  # also those that no token asks for
        for side, mixture in enumerate(mixtures):
            _add_expert(mixture, number, tokens[side], routes[side][1], dispatches[side], sums[side])
        pair.release()
    outputs = [total.to(x.dtype) for total, x in zip(sums, tokens, strict=True)]
    outputs = [y if more is None else y + more for y, more in zip(outputs, shared, strict=True)]
    same = (routes[0][0][:, :, None] == routes[1][0][:, None, :]).any(dim=2).float().mean()
    return [y.view_as(x) for y, x in zip(outputs, inputs, strict=True)], float(same)


def _shared_experts(mixture: MoE) -> GatedMLP:
    return GatedMLP(f"{mixture.prefix}.shared_experts", mixture.weights, mixture.observe)


def _add_expert(
    mixture: MoE, number: int, tokens: torch.Tensor, shares: torch.Tensor, dispatch: Dispatch, total: torch.Tensor
) -> None:
    if not dispatch.counts[number]:
        return
    rows = dispatch.rows(number)
    share = shares.flatten().index_select(0, dispatch.places(number))[:, None]
    total.index_add_(0, rows, mixture.expert(number)(tokens.index_select(0, rows)) * share)


def _drift(layer: int, hidden: States, same_experts: float | None = None) -> LayerDrift:
    reference, other, sound = (states[0].float() for states in hidden)
    length = reference.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    away, explained = ((states - reference).norm(dim=-1) / length for states in (other, sound))
    return LayerDrift(layer, float(away.mean()), float(away.max()), float(explained.mean()), same_experts)


def _heads(models: Sequence[Model], hidden: States, found: Walk) -> None:
    """Compare logits, ``LOGIT_TOKENS`` positions at a time."""
    parts: list[tuple[torch.Tensor, ...]] = []
    finite = [0, 0]
    for start in range(0, hidden[0].shape[1], LOGIT_TOKENS):
        logits = [model.logits(h[0, start : start + LOGIT_TOKENS]) for model, h in zip(models, hidden, strict=True)]
        for side in (0, 1):
            finite[side] += int(logits[side].isfinite().all(dim=-1).sum())
        shares = [rows.log_softmax(dim=-1) for rows in logits]
        best = [rows.argmax(dim=-1) for rows in logits]
        divergences = [(shares[0].exp() * (shares[0] - other)).sum(dim=-1).cpu() for other in shares[1:]]
        parts.append((*divergences, *((best[0] == other).cpu() for other in best[1:])))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    found.divergence, found.divergence_explained, found.agreement, found.agreement_explained = columns
    found.finite = (finite[0], finite[1])


def siblings(name: str, names: Sequence[str]) -> list[str]:
    """Weights of the same layer that may have been taken for ``name``: other experts', and projections beside it."""
    layer, leaf, expert = layer_of(name), name.split(".")[-2:], expert_of(name)
    beside = [other for other in names if other != name and layer_of(other) == layer]
    alike = [other for other in beside if other.split(".")[-2:] == leaf]
    own = [other for other in beside if expert is not None and expert_of(other) == expert]
    return [*alike, *own, *(other for other in beside if other not in alike and expert_of(other) is None)]
