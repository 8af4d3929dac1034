"""Two checkpoints of one model against each other: where they part, and which tensors are the reason.

Three models go in lockstep over the same tokens: the reference; the other; and a *sound* one, whose weights are the
reference's with such differences as the formats of the two explain (``rounding``). The other is in order where it is no
further from the reference than ``DRIFT_FACTOR`` times the sound one. That says where hidden states and logits part.
Which tensor it is, is decided by the tensors themselves and by what they make of the reference's inputs
(``difference``): so a tensor is named for its own defect, never for what comes from an earlier one.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from weightkit.checkpoint import Checkpoint
from weightkit.compute.engines import DeviceName
from weightkit.errors import TokenizerError
from weightkit.family import layer_of
from weightkit.generation import Tokenizer
from weightkit.progress import Progress
from weightkit.smoke.difference import TensorDifference
from weightkit.smoke.identity import architecture, known_manifest, require_one_model
from weightkit.smoke.likeness import recognize
from weightkit.smoke.lockstep import LayerDrift, Walk, siblings, walk
from weightkit.smoke.material import Material
from weightkit.smoke.pair import Pair
from weightkit.smoke.prompts import prompts_for
from weightkit.smoke.verdict import Check, Verdict

DRIFT_FACTOR = 2.0
"""How much further from the reference than the sound side hidden states may be. Rounding to nearest is the worst that a
sound conversion does to outputs: on pico, ten pairs of FP8, int8 and int4 came to 0.6 to 0.95 of the sound side."""

DIVERGENCE_FACTOR = DRIFT_FACTOR**2
"""The same for KL divergences, which grow with the square."""

DRIFT_FLOOR = 0.01
"""Relative difference of hidden states that needs no explanation, on the mean over tokens: what one token comes to of
which rounding lets another expert be chosen."""

DIVERGENCE_FLOOR = 1e-3
"""The same for the mean KL divergence, in nats."""

MAX_TOKENS = 2048
"""Half of them may be the passage's; the prompts come after it."""

_NAMED = 12
_RECOGNIZED = 12


def compare_checkpoints(
    reference: Checkpoint,
    other: Checkpoint,
    *,
    device: DeviceName = "auto",
    dtype: str | None = None,
    jobs: int | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
) -> Verdict:
    """Run both checkpoints on the same tokens, compare all tensors of both, and judge whether formats explain it all.

    Each checkpoint is read once; memory holds a layer's attention, or an expert, of both.

    Args:
        reference: opened, in any layout and format.
        other: opened; of the same model.
        device, dtype, jobs: see ``CheckpointWeights``.
        max_tokens: most tokens that go through.
        progress: show a bar over layers.

    Raises:
        PlanError: checkpoints of different models.
        WeightkitError: what reading them raises.
    """
    require_one_model(reference, other)
    arch = architecture(reference)
    prompts = prompts_for(known_manifest(reference))
    most = min(arch.max_position_embeddings, arch.index_topk or max_tokens, max_tokens)
    material = Material.of(_tokenizer(reference, other), prompts, arch.vocab_size, most, most // 2)
    with Pair(reference, other, device=device, dtype=dtype, jobs=jobs) as pair:
        with Progress(arch.num_hidden_layers, "compare", shown=progress, unit="layer", leave=False) as bar:
            seen = walk(pair, material.ids, bar.add)
        checks = [
            _finite(seen, material),
            _tensors(pair),
            _hidden(seen),
            _divergence(seen),
        ]
        computed = f"{str(pair.reference.dtype).removeprefix('torch.')} on {pair.reference.device.type}"
    return Verdict(f"{reference.root} (the reference) and {other.root} ({computed})", tuple(checks))


def _tokenizer(*checkpoints: Checkpoint) -> Tokenizer | None:
    for checkpoint in checkpoints:
        try:
            return Tokenizer.from_side_files(checkpoint.side_files, checkpoint.root)
        except TokenizerError:
            continue
    return None


def _finite(seen: Walk, material: Material) -> Check:
    count = len(material.ids)
    figures = {"positions": count, "finite": list(seen.finite)}
    if seen.finite == (count, count):
        return Check("finite logits", True, f"of both at all {count:,} positions of {material.what}", figures)
    broken = [
        f"{count - n:,} positions of the {who}"
        for who, n in zip(("reference", "other"), seen.finite, strict=True)
        if n < count
    ]
    return Check("finite logits", False, f"NaN or Inf at {' and '.join(broken)}", figures)


def _tensors(pair: Pair) -> Check:
    differences = pair.measured()
    equal = sum(difference.relative == 0 for difference in differences)
    suspects = sorted((d for d in differences if d.is_suspect), key=_order)
    suspects[:_RECOGNIZED] = [_recognized(pair, suspect) for suspect in suspects[:_RECOGNIZED]]
    largest = max(differences, key=lambda d: d.relative if d.finite else 0.0, default=None)
    summary = f"{len(differences):,} compared, {equal:,} equal"
    if largest is not None and largest.relative:
        summary += f"; the others differ by up to {max(d.relative for d in differences if d.finite):.3g}"
    figures = {
        "compared": len(differences),
        "equal": equal,
        "suspects": [suspect.to_json() for suspect in suspects],
    }
    if not suspects:
        return Check(
            "tensors",
            True,
            f"{summary}, which their formats explain" if largest and largest.relative else summary,
            figures,
        )
    lines = [f"{summary}; {len(suspects):,} by more than their formats explain:"]
    lines += [suspect.describe() for suspect in suspects[:_NAMED]]
    lines += [f"... and {len(suspects) - _NAMED:,} more"] if len(suspects) > _NAMED else []
    return Check("tensors", False, "\n".join(lines), figures)


def _order(suspect: TensorDifference) -> tuple[float, float]:
    """In the order of the forward pass by layer, the embedding first and the head last; then the worst first."""
    layer = layer_of(suspect.name)
    place = layer if layer is not None else -1 if "embed_tokens" in suspect.name else float("inf")
    return place, -suspect.relative


def _recognized(pair: Pair, suspect: TensorDifference) -> TensorDifference:
    """The suspect with a word for what it looks like, where its values are in the wrong place."""
    if suspect.region is None or suspect.scale is not None or not suspect.finite:
        return suspect
    one, other = pair.reference.get(suspect.name), pair.other.get(suspect.name)
    others = siblings(suspect.name, pair.names)
    return replace(suspect, hint=recognize(suspect.name, suspect.region, one, other, others, pair.reference.get))


def _hidden(seen: Walk) -> Check:
    parted = next((drift for drift in seen.drifts if _parts(drift)), None)
    last = seen.drifts[-1]
    figures = {
        "layers": [
            {
                "layer": drift.layer,
                "mean": drift.mean,
                "worst": drift.worst,
                "explained": drift.explained,
                "same_experts": drift.same_experts,
            }
            for drift in seen.drifts
        ],
        "first_parted": None if parted is None else parted.layer,
    }
    known = f"formats explain {last.explained:.3g}"
    detail = f"relative difference after the last layer {last.mean:.3g} on the mean over tokens; {known}"
    if parted is not None:
        place = "the embedding" if parted.layer < 0 else f"layer {parted.layer}"
        detail = (
            f"part first after {place}: relative difference {parted.mean:.3g} on the mean over tokens, "
            f"{parted.worst:.3g} at worst; formats explain {parted.explained:.3g}"
        )
    alike = [drift.same_experts for drift in seen.drifts if drift.same_experts is not None]
    if alike:
        detail += f"\nexperts chosen alike: {min(alike):.1%} or more of the choices of each layer"
    return Check("hidden states", parted is None, detail, figures)


def _parts(drift: LayerDrift) -> bool:
    allowed = DRIFT_FACTOR * drift.explained + (DRIFT_FLOOR if drift.explained > 0 else 0.0)
    return not drift.mean <= allowed


def _divergence(seen: Walk) -> Check:
    mean, explained = float(seen.divergence.mean()), float(seen.divergence_explained.mean())
    agreement, sound = (float(part.float().mean()) for part in (seen.agreement, seen.agreement_explained))
    worst = int(seen.divergence.argmax())
    figures = {
        "kl_nats": _spread(seen.divergence),
        "kl_nats_explained": _spread(seen.divergence_explained),
        "top1_agreement": agreement,
        "top1_agreement_explained": sound,
        "worst_position": worst,
        "by_token": {
            "kl_nats": [round(value, 6) for value in seen.divergence.tolist()],
            "top1": seen.agreement.tolist(),
        },
    }
    spread = _spread(seen.divergence)
    detail = (
        f"KL {mean:.3g} nats a token on the mean, median {spread['median']:.3g}, worst {spread['worst']:.3g} "
        f"(position {worst}); formats explain a mean of {explained:.3g}\n"
        f"top-1 agreement {agreement:.2%}; formats explain {sound:.2%}"
    )
    return Check("logits", mean <= DIVERGENCE_FACTOR * explained + DIVERGENCE_FLOOR, detail, figures)


def _spread(values: torch.Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "median": float(values.median()), "worst": float(values.max())}
