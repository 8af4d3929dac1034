"""Untrained members of the family: BF16 against FP8 that was rounded from it; what a smoke test says of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoint import quantize, stored_tensors, write_small
from transformers_oracle import V2, V2_LITE, V3, V32

from weightkit.layouts import open_checkpoint
from weightkit.smoke.compare import compare_checkpoints
from weightkit.smoke.local import smoke_checkpoint
from weightkit.smoke.verdict import Verdict

MEMBERS = {"V3": V3, "V2": V2, "V2-Lite": V2_LITE, "V3.2": V32}
OURS = {"vocab_size": 264, "torch_dtype": "bfloat16", "eos_token_id": 257, "hidden_size": 160}


def compared(one: Path, other: Path) -> Verdict:
    checkpoints = open_checkpoint(one), open_checkpoint(other)
    return compare_checkpoints(*checkpoints, device="cpu", max_tokens=128, progress=False)


@pytest.mark.parametrize("member", MEMBERS)
def test_fp8_is_explained_as_a_rounding_of_its_original(member: str, tmp_path: Path) -> None:
    config: dict[str, Any] = MEMBERS[member] | OURS
    stored = stored_tensors(config, fp8=False)
    write_small(tmp_path / "bf16", fp8=False, stored=stored, **config)
    write_small(tmp_path / "fp8", stored=_fp8(stored), **config)
    for pair in (("bf16", "fp8"), ("fp8", "bf16")):
        verdict = compared(*(tmp_path / name for name in pair))
        assert verdict.ok, verdict.render()
        hidden = next(check for check in verdict.checks if check.name == "hidden states")
        assert hidden.figures["layers"][-1]["mean"] > 0  # type: ignore[index]


@pytest.mark.parametrize("member", ["V2-Lite", "V3"])
def test_a_wrong_expert_beside_fp8(member: str, tmp_path: Path) -> None:
    config: dict[str, Any] = MEMBERS[member] | OURS
    stored = stored_tensors(config, fp8=False)
    write_small(tmp_path / "bf16", fp8=False, stored=stored, **config)
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    wrong = stored | {name: stored[name.replace("experts.3", "experts.11")]}
    write_small(tmp_path / "fp8", stored=_fp8(wrong), **config)
    verdict = compared(tmp_path / "bf16", tmp_path / "fp8")
    tensors = next(check for check in verdict.checks if check.name == "tensors")
    assert [(s["name"], s["hint"]) for s in tensors.figures["suspects"]] == [  # type: ignore[attr-defined, index]
        (name, "holds the values of experts.11.down_proj.weight")
    ]


def test_an_untrained_model_knows_nothing(tmp_path: Path) -> None:
    write_small(tmp_path, **(V3 | OURS))
    verdict = smoke_checkpoint(tmp_path, device="cpu", progress=False)
    found = {check.name: check.ok for check in verdict.checks}
    assert found["finite logits"] is found["deterministic"] is found["routers"] is True
    assert found["answers"] is None
    assert found["perplexity"] is False
    assert "no better than guessing among 264 tokens" in verdict.render()


def _fp8(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if ("_proj" in name and "weights_proj" not in name) or ".wq_b." in name or ".wk." in name:
            result[name], result[f"{name}_scale_inv"] = quantize(tensor.float())
        else:
            result[name] = tensor
    return result
