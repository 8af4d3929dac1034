"""Layers that an FP8 config leaves unquantized, as engines with fused layers understand it."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import V3

from weightkit.family import Architecture
from weightkit.serving.fp8 import fp8_problems

LAYER = "model.layers.1"
EXPERTS = [f"{LAYER}.mlp.experts.{e}.{part}_proj" for e in range(V3.experts) for part in ("gate", "up", "down")]


def found(engine: str, *kept: str) -> list[str]:
    declared: Any = V3.config()["quantization_config"]
    arch = Architecture.from_config(
        {**V3.config(), "quantization_config": declared | {"modules_to_not_convert": [*kept]}}
    )
    return [problem.message for problem in fp8_problems(arch, engine=engine, mtp=False)]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "kept",
    [
        ["lm_head"],
        [f"{LAYER}.self_attn.o_proj"],
        [f"{LAYER}.self_attn.q_a_proj", f"{LAYER}.self_attn.kv_a_proj_with_mqa"],
        [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")],
        EXPERTS,
        [f"{LAYER}.mlp.experts"],
    ],
    ids=["none", "one whole layer", "attention", "an MLP", "experts", "experts by their room"],
)
def test_whole_layers_may_stay(engine: str, kept: list[str]) -> None:
    assert found(engine, *kept) == []


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("kept", "fused"),
    [
        (f"{LAYER}.self_attn.q_a_proj", f"{LAYER}.self_attn.fused_qkv_a_proj"),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_up_proj"),
        (EXPERTS[2], f"{LAYER}.mlp.experts"),
    ],
)
def test_parts_of_one_layer_must_be_alike(engine: str, kept: str, fused: str) -> None:
    (message,) = found(engine, kept)
    assert message.startswith(fused)
    assert f"expected all in FP8, or none, found {LAYER if fused.startswith(LAYER) else 'model.layers.0'}." in message
    assert f"{kept} not" in message


def test_vllm_goes_by_whole_names() -> None:
    messages = found("vllm", f"{LAYER}.self_attn")
    assert len(messages) == 4  # the first two projections are one layer
    assert all("vLLM takes the layer for FP8: it goes by whole names" in message for message in messages)
    assert f"expected {LAYER}.self_attn.o_proj in modules_to_not_convert" in messages[-1]
    assert found("sglang", f"{LAYER}.self_attn") == []


def test_a_config_without_fp8_has_none() -> None:
    arch = Architecture.from_config({**V3.config(), "quantization_config": None})
    assert not list(fp8_problems(arch, engine="vllm", mtp=True))
