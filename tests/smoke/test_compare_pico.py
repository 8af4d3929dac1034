"""``smoke --compare`` on pico: quiet between its sound forms; every planted defect named by its tensor and place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Tensors, damaged, edit, pico, swap

from weightkit.layouts import open_checkpoint
from weightkit.quantization import Settings, quantize
from weightkit.smoke.compare import compare_checkpoints
from weightkit.smoke.verdict import Verdict
from weightkit.transforms import cast, shard
from weightkit.writer import write

LAYER = "model.layers.1"
EXPERTS = f"{LAYER}.mlp.experts"


def compared(one: Path, other: Path) -> Verdict:
    checkpoints = open_checkpoint(one), open_checkpoint(other)
    return compare_checkpoints(*checkpoints, device="cpu", max_tokens=256, progress=False)


def figures(verdict: Verdict, check: str) -> Any:
    return next(c.figures for c in verdict.checks if c.name == check)


def suspects(verdict: Verdict) -> dict[str, dict[str, Any]]:
    return {suspect["name"]: suspect for suspect in figures(verdict, "tensors")["suspects"]}


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("int4") / "int4"
    quantize(
        pico(), target, Settings(), calibration=pico().parent / "calibration.jsonl", samples=8, seq_len=128,
        device="cpu", progress=False,
    )  # fmt: skip
    return target


def test_fp8_bf16_and_rank_files_are_one(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(pico())
    write(cast(checkpoint, "bf16"), tmp_path / "bf16", device="cpu", progress=False)
    write(shard(checkpoint, mp=8), tmp_path / "mp8", device="cpu", progress=False)
    for other in ("bf16", "mp8"):
        verdict = compared(pico(), tmp_path / other)
        assert verdict.ok, verdict.render()
        assert figures(verdict, "tensors")["equal"] == figures(verdict, "tensors")["compared"]
        assert figures(verdict, "logits")["kl_nats"] == {"mean": 0.0, "median": 0.0, "worst": 0.0}
        assert figures(verdict, "logits")["top1_agreement"] == 1.0


def test_int4_is_explained_by_its_format_in_both_directions(int4: Path) -> None:
    for pair in ((pico(), int4), (int4, pico())):
        verdict = compared(*pair)
        assert verdict.ok, verdict.render()
        logits = figures(verdict, "logits")
        assert 0 < logits["kl_nats"]["median"] < logits["kl_nats"]["mean"] < logits["kl_nats"]["worst"]
        assert 0.85 < logits["top1_agreement"] < 1
        layers = figures(verdict, "hidden states")["layers"]
        assert [layer["mean"] > 0 for layer in layers] == [False, False, True, True]  # only experts are int4


def transposed_block(codes: torch.Tensor) -> torch.Tensor:
    codes[:128, :128] = codes[:128, :128].T.clone()
    return codes


def halves_swapped(codes: torch.Tensor) -> torch.Tensor:
    return torch.cat((codes[codes.shape[0] // 2 :], codes[: codes.shape[0] // 2]))


def columns_rolled(codes: torch.Tensor) -> torch.Tensor:
    return codes.roll(64, dims=1)


def row_zeroed(codes: torch.Tensor) -> torch.Tensor:
    codes[37] = 0
    return codes


def second_block_doubled(scale: torch.Tensor) -> torch.Tensor:
    scale[0, 1] *= 2
    return scale


#: What is done, the tensor that must be named, what must be said of it.
DEFECTS: dict[str, tuple[Callable[[Tensors], None], str, str]] = {
    "a scale block off by 2": (
        edit(f"{EXPERTS}.3.gate_proj.weight_scale_inv", second_block_doubled),
        f"{EXPERTS}.3.gate_proj.weight",
        "columns 128:256: 2 times",
    ),
    "a zeroed row": (
        edit(f"{LAYER}.self_attn.o_proj.weight", row_zeroed),
        f"{LAYER}.self_attn.o_proj.weight",
        "row 37: zeros",
    ),
    "a transposed slice": (
        edit(f"{LAYER}.self_attn.o_proj.weight", transposed_block),
        f"{LAYER}.self_attn.o_proj.weight",
        "transposed there",
    ),
    "ranks in the wrong order": (
        edit(f"{LAYER}.self_attn.q_b_proj.weight", halves_swapped),
        f"{LAYER}.self_attn.q_b_proj.weight",
        "rows in another order: 0 is the reference's 1024",
    ),
    "columns of another rank": (
        edit(f"{LAYER}.mlp.shared_experts.down_proj.weight", columns_rolled),
        f"{LAYER}.mlp.shared_experts.down_proj.weight",
        "columns in another order: 0 is the reference's 960",
    ),
    "gate and up exchanged": (
        swap(f"{EXPERTS}.5.gate_proj", f"{EXPERTS}.5.up_proj"),
        f"{EXPERTS}.5.gate_proj.weight",
        "holds the values of 5.up_proj.weight",
    ),
    "a wrong norm": (
        edit(f"{LAYER}.self_attn.kv_a_layernorm.weight", lambda weight: weight * 1.25),
        f"{LAYER}.self_attn.kv_a_layernorm.weight",
        "1.25 times",
    ),
    "another layer's norm": (
        lambda tensors: tensors.update(
            {f"{LAYER}.input_layernorm.weight": tensors["model.layers.2.input_layernorm.weight"].clone()}
        ),
        f"{LAYER}.input_layernorm.weight",
        "",
    ),
    "a router's row": (
        edit(f"{LAYER}.mlp.gate.weight", lambda weight: weight.roll(1, dims=0)),
        f"{LAYER}.mlp.gate.weight",
        "rows in another order: 0 is the reference's 15",
    ),
    "a router's bias": (
        edit(f"{LAYER}.mlp.gate.e_score_correction_bias", lambda bias: bias.flip(0)),
        f"{LAYER}.mlp.gate.e_score_correction_bias",
        "",
    ),
    "the head": (edit("lm_head.weight", row_zeroed), "lm_head.weight", "row 37: zeros"),
    "the embedding": (
        edit("model.embed_tokens.weight", halves_swapped),
        "model.embed_tokens.weight",
        "rows in another order",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_named(defect: str, tmp_path: Path) -> None:
    change, name, said = DEFECTS[defect]
    verdict = compared(pico(), damaged(pico(), tmp_path / "other", change))
    assert not verdict.ok
    expected = {name, name.replace("gate_proj", "up_proj")} if "exchanged" in defect else {name}
    assert set(suspects(verdict)) == expected, verdict.render()
    line = next(line for line in verdict.render().splitlines() if name in line)
    assert said in line, verdict.render()


def test_swapped_experts_are_named_with_what_they_hold(tmp_path: Path) -> None:
    verdict = compared(pico(), damaged(pico(), tmp_path / "other", swap(f"{EXPERTS}.2", f"{EXPERTS}.9")))
    wrong = {f"{EXPERTS}.{e}.{p}_proj.weight" for e in (2, 9) for p in ("gate", "up", "down")}
    assert set(suspects(verdict)) == wrong
    assert (
        suspects(verdict)[f"{EXPERTS}.2.down_proj.weight"]["hint"] == "holds the values of experts.9.down_proj.weight"
    )
    assert figures(verdict, "hidden states")["first_parted"] == 1
    assert "part first after layer 1" in verdict.render()


@pytest.mark.parametrize(
    "defect", ["a scale block off by 2", "ranks in the wrong order", "a zeroed row", "a wrong norm"]
)
def test_a_defect_is_named_beside_int4(defect: str, int4: Path, tmp_path: Path) -> None:
    change, name, _ = DEFECTS[defect]
    broken = damaged(pico(), tmp_path / "broken", change)
    verdict = compared(broken, int4)
    assert set(suspects(verdict)) == {name}, verdict.render()


def test_defects_of_int4_itself(int4: Path, tmp_path: Path) -> None:
    def halve(scales: torch.Tensor) -> torch.Tensor:
        scales[0, :64] /= 2
        return scales

    verdict = compared(pico(), damaged(int4, tmp_path / "scale", edit(f"{EXPERTS}.7.up_proj.scales", halve)))
    assert set(suspects(verdict)) == {f"{EXPERTS}.7.up_proj.weight"}, verdict.render()
    suspect = suspects(verdict)[f"{EXPERTS}.7.up_proj.weight"]
    assert suspect["region"] == "rows 0:64, columns 0:128"
    assert suspect["scale"] == pytest.approx(0.5, abs=0.02)

    verdict = compared(pico(), damaged(int4, tmp_path / "swap", swap(f"{EXPERTS}.0", f"{EXPERTS}.1")))
    assert {name.split(".")[5] for name in suspects(verdict)} == {"0", "1"}
    assert len(suspects(verdict)) == 6
