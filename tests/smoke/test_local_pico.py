"""``smoke`` on pico as it ships, and on pico with one thing broken: the right check fails and says what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import Tensors, damaged, edit, pico, swap

from weightkit import manifests
from weightkit.errors import PlanError
from weightkit.generation import Runtime
from weightkit.layouts import open_checkpoint
from weightkit.smoke.compare import compare_checkpoints
from weightkit.smoke.determinism import check_determinism
from weightkit.smoke.identity import known_manifest
from weightkit.smoke.local import smoke_checkpoint
from weightkit.smoke.verdict import Check, Verdict
from weightkit.transforms import cast, keep_experts, strip_mtp

MOE = "model.layers.1.mlp"
CHECKS = ["finite logits", "deterministic", "answers", "perplexity", "routers", "expert load"]


def smoked(folder: Path) -> Verdict:
    return smoke_checkpoint(folder, device="cpu", progress=False)


def check(verdict: Verdict, name: str) -> Check:
    return next(check for check in verdict.checks if check.name == name)


def test_pico_as_it_ships() -> None:
    verdict = smoked(pico())
    assert [(c.name, c.ok) for c in verdict.checks] == [(name, True) for name in CHECKS], verdict.render()
    assert verdict.ok
    assert check(verdict, "answers").figures["right"] == 24
    # the figure was measured with the network that was trained, which shares no code with the model here
    assert check(verdict, "perplexity").figures["perplexity"] == pytest.approx(274247.4, rel=1e-3)
    loads = check(verdict, "expert load").figures["loads"]
    tokens = check(verdict, "expert load").figures["tokens"]
    assert isinstance(loads, dict)
    assert {layer: sum(counts) for layer, counts in loads.items()} == {"1": 4 * tokens, "2": 4 * tokens}
    assert json.loads(json.dumps(verdict.to_json()))["ok"] is True


def not_a_number(scale: torch.Tensor) -> torch.Tensor:
    scale[0, 0] = float("nan")
    return scale


def test_nan_is_placed_and_nothing_else_is_claimed(tmp_path: Path) -> None:
    broken = damaged(pico(), tmp_path / "nan", edit(f"{MOE}.shared_experts.up_proj.weight_scale_inv", not_a_number))
    verdict = smoked(broken)
    finite = check(verdict, "finite logits")
    assert finite.ok is False
    assert "first after layer 1" in finite.detail
    others = {c.name: c.ok for c in verdict.checks if c.name not in ("finite logits", "routers")}
    assert set(others.values()) == {None}
    assert not verdict.ok


def zero_row(weight: torch.Tensor) -> torch.Tensor:
    weight[6] = 0
    return weight


def barred(bias: torch.Tensor) -> torch.Tensor:
    bias[3] -= 40
    return bias


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (edit(f"{MOE}.gate.weight", zero_row), "routers", "layer 1: a row of zeros for expert 6"),
        (
            edit(f"{MOE}.gate.e_score_correction_bias", barred),
            "expert load",
            "layer 1: expert 3: the bias is 40 below the median",
        ),
    ],
    ids=["a router's row of zeros", "a bias that bars an expert"],
)
def test_what_is_broken_is_said(change: Callable[[Tensors], None], name: str, said: str, tmp_path: Path) -> None:
    verdict = smoked(damaged(pico(), tmp_path / "broken", change))
    assert check(verdict, name).ok is False, verdict.render()
    assert said in check(verdict, name).detail
    assert not verdict.ok


def test_attention_of_other_layers_is_told_by_answers_and_perplexity(tmp_path: Path) -> None:
    change = swap("model.layers.1.self_attn", "model.layers.2.self_attn")
    verdict = smoked(damaged(pico(), tmp_path / "broken", change))
    assert {c.name: c.ok for c in verdict.checks} == dict.fromkeys(CHECKS, True) | {
        "answers": False,
        "perplexity": False,
    }
    assert "allowed 1%" in check(verdict, "perplexity").detail


def test_without_a_tokenizer_what_needs_no_text_is_checked(tmp_path: Path) -> None:
    bare = damaged(pico(), tmp_path / "bare", lambda tensors: None)
    (bare / "tokenizer.json").unlink()
    verdict = smoked(bare)
    unmade = {"answers": None, "perplexity": None}
    assert {c.name: c.ok for c in verdict.checks} == dict.fromkeys(CHECKS, True) | unmade, verdict.render()
    assert verdict.ok


def test_a_runtime_that_is_not_deterministic() -> None:
    with Runtime(pico(), device="cpu") as runtime:
        prompt = runtime.encode("What is 17 + 25?")
        assert check_determinism(runtime, [prompt]).ok
        step, calls = runtime.step, iter(range(1000))

        def unsteady(*arguments: object) -> torch.Tensor:
            logits = step(*arguments)  # type: ignore[arg-type]
            return logits if next(calls) < 9 else -logits  # from the third step of the second run on

        runtime.step = unsteady  # type: ignore[method-assign, assignment]
        found = check_determinism(runtime, [prompt])
        assert found.ok is False
        assert "a second time, new token 4 is" in found.detail


def test_attention_that_depends_on_its_form() -> None:
    """What follows cached tokens is computed otherwise than a whole prompt: a fault in one of the two is found."""
    with Runtime(pico(), device="cpu") as runtime:
        attention = runtime.model.layers[1].attention
        absorbed = attention._absorbed
        attention._absorbed = lambda query, latents: 0 * absorbed(query, latents)  # type: ignore[method-assign]
        found = check_determinism(runtime, [runtime.encode("What is 17 + 25?")])
        assert found.ok is False
        assert "in one pass, logits differ by" in found.detail  # its best tokens happen to be the same
        for layer in runtime.model.layers:
            layer.attention._absorbed = attention._absorbed  # type: ignore[method-assign]
        found = check_determinism(runtime, [runtime.encode("What is 17 + 25?")])
        assert found.ok is False
        assert "in one pass, new token" in found.detail
        assert "more than" in found.detail


def test_pico_is_known_in_all_its_forms_and_nothing_else_is() -> None:
    checkpoint = open_checkpoint(pico())
    for form in (checkpoint, strip_mtp(checkpoint), cast(checkpoint, "bf16")):
        found = known_manifest(form)
        assert found is not None
        assert found.name == "pico"
    assert known_manifest(keep_experts(checkpoint, 8)) is None


def test_different_models_are_not_compared() -> None:
    checkpoint = open_checkpoint(pico())
    with pytest.raises(PlanError, match=r"expected n_routed_experts 16, found n_routed_experts 8"):
        compare_checkpoints(checkpoint, keep_experts(checkpoint, 8), device="cpu", progress=False)


def test_the_manifest_is_what_the_training_network_says() -> None:
    from weightkit.manifests.pico.smoke import manifest_entry

    smoke = manifests.load("pico").smoke
    assert smoke is not None
    entry = manifest_entry(pico())
    assert [list(pair) for pair in smoke.answers] == entry["answers"]
    assert smoke.perplexity == pytest.approx(entry["perplexity"], rel=1e-4)
