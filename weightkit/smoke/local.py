"""The smoke test of one checkpoint on this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from weightkit.checkpoint import Checkpoint
from weightkit.compute.engines import DeviceName
from weightkit.errors import NonFiniteError, WeightkitError
from weightkit.family import Architecture
from weightkit.generation import Runtime
from weightkit.layouts import open_checkpoint
from weightkit.manifests import Manifest
from weightkit.progress import Progress
from weightkit.smoke.determinism import check_determinism
from weightkit.smoke.forward import Pass, run
from weightkit.smoke.identity import known_manifest
from weightkit.smoke.material import Material, prompt_ids
from weightkit.smoke.prompts import Prompt, check_answers, prompts_for
from weightkit.smoke.routing import check_load, check_routers
from weightkit.smoke.verdict import Check, Verdict

MAX_NEW_TOKENS = 24
"""Of an answer."""

SAME_WEIGHTS = 0.01
ROUNDED_WEIGHTS = 0.05
"""How far the loss (nats a token) may be from the manifest's, as a share of it: computed in another dtype or order, and
with weights rounded to 8 or 4 bits."""

_DETERMINISM_PROMPTS = 2
_UNMADE = "logits are not finite"


def smoke_checkpoint(
    source: str | Path | Checkpoint,
    *,
    manifest: Manifest | None = None,
    device: DeviceName = "auto",
    dtype: str | None = None,
    memory_bytes: int | None = None,
    jobs: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: bool = True,
) -> Verdict:
    """Run a checkpoint on a text and a few prompts, and judge what comes out.

    Checks: finite logits at all positions; deterministic tokens; the manifest's answers; perplexity of the bundled
    passage against the manifest's; rows of zeros in routers; experts that no token reached.

    Args:
        source: a path in any layout, or an opened checkpoint.
        manifest: what it should answer; None for the known model of the same architecture, if there is one.
        device, dtype, memory_bytes, jobs: see ``CheckpointWeights``.
        max_new_tokens: most tokens of an answer.
        progress: show a bar over layers and prompts.

    Raises:
        WeightkitError: a checkpoint that cannot be opened or computed at all; what it computes is in the verdict.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    manifest = manifest or known_manifest(checkpoint)
    prompts = prompts_for(manifest)
    with Runtime(checkpoint, device=device, dtype=dtype, memory_bytes=memory_bytes, jobs=jobs) as runtime:
        material = Material.of(runtime.tokenizer, prompts, runtime.model.arch.vocab_size, runtime.max_tokens)
        steps = len(runtime.model.layers) + len(prompts) + 1
        with Progress(steps, "smoke", shown=progress, unit="step", leave=False) as bar:
            seen = run(runtime.model, material.ids, bar.add)
            checks = [_finite(seen, material)]
            ok = checks[0].ok
            checks.append(_deterministic(runtime, material, prompts) if ok else Check("deterministic", None, _UNMADE))
            bar.add()
            checks.append(_answers(runtime, prompts, max_new_tokens, bar) if ok else Check("answers", None, _UNMADE))
        checks.append(_perplexity(seen, material, manifest, runtime.model.arch))
        if seen.loads:
            arch, weights = runtime.model.arch, runtime.weights
            checks.append(check_routers(arch, weights, seen.loads))
            checks.append(
                check_load(arch, weights, seen.loads, len(material.ids)) if ok else Check("expert load", None, _UNMADE)
            )
        title = f"{checkpoint.root} ({_described(runtime)})"
    return Verdict(title, tuple(checks))


def _described(runtime: Runtime) -> str:
    dtype = str(runtime.weights.dtype).removeprefix("torch.")
    return f"{runtime.model.arch.member}, {dtype} on {runtime.weights.device.type}"


def _finite(seen: Pass, material: Material) -> Check:
    figures = {"positions": len(material.ids), "finite": seen.finite}
    if seen.broken is None:
        return Check("finite logits", True, f"at all {len(material.ids):,} positions of {material.what}", figures)
    advice = "`weightkit verify --values` looks for damaged weights"
    return Check("finite logits", False, f"NaN or Inf for {seen.broken}\n{advice}", figures)


def _deterministic(runtime: Runtime, material: Material, prompts: Sequence[Prompt]) -> Check:
    if runtime.tokenizer is None:
        ids = [material.ids[:16]]
    else:
        ids = [tuple(prompt_ids(runtime.tokenizer, prompt)) for prompt in prompts[:_DETERMINISM_PROMPTS]]
    try:
        return check_determinism(runtime, ids)
    except NonFiniteError as error:
        return Check("deterministic", False, error.message)


def _answers(runtime: Runtime, prompts: Sequence[Prompt], max_new_tokens: int, bar: Progress) -> Check:
    if runtime.tokenizer is None:
        return Check("answers", None, "the checkpoint has no tokenizer.json")
    answers = []
    for prompt in prompts:
        try:
            answers.append(runtime.generate(prompt.text, max_new_tokens=max_new_tokens).text)
        except WeightkitError as error:
            return Check("answers", False, f"{prompt.text!r}: {error.message}")
        bar.add()
    return check_answers(prompts, answers)


def _perplexity(seen: Pass, material: Material, manifest: Manifest | None, arch: Architecture) -> Check:
    if material.passage_tokens < 2:
        return Check("perplexity", None, "the checkpoint has no tokenizer.json, so there is no text")
    losses = seen.losses[: material.passage_tokens - 1]
    loss = float(losses.double().mean())
    if not math.isfinite(loss):
        return Check("perplexity", None, _UNMADE)
    known = manifest.smoke.perplexity if manifest is not None and manifest.smoke is not None else None
    figures = {"perplexity": math.exp(loss), "loss_nats": loss, "tokens": len(losses), "expected": known}
    found = f"{math.exp(loss):,.6g} a token of the passage"
    if known is None or manifest is None:
        ok = math.exp(loss) < arch.vocab_size
        against = "better" if ok else "no better"
        return Check("perplexity", ok, f"{found}, {against} than guessing among {arch.vocab_size:,} tokens", figures)
    allowed = ROUNDED_WEIGHTS if _is_rounded(arch, manifest) else SAME_WEIGHTS
    away = abs(loss / math.log(known) - 1)
    detail = f"{found}; {manifest.title}'s is {known:,.6g}: loss off by {away:.2%}, allowed {allowed:.0%}"
    return Check("perplexity", away <= allowed, detail, figures | {"away": away, "allowed": allowed})


def _is_rounded(arch: Architecture, manifest: Manifest) -> bool:
    """Whether weights are stored in a quantization that is not the published one."""
    published = Architecture.from_config(manifest.config, where=manifest.name).quantization
    return arch.quantization is not None and arch.quantization.method != (published.method if published else None)
