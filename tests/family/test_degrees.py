"""Legal numbers of ranks and of experts."""

from __future__ import annotations

from typing import Any

import pytest
from family_configs import SMALL, V2_LITE, V3, V3_BF16
from hypothesis import given, settings
from hypothesis import strategies as st

from weightkit.errors import PlanError
from weightkit.family import (
    Architecture,
    blueprint,
    expert_ranges,
    legal_expert_counts,
    legal_mp,
    mp_problems,
    require_mp,
)


def arch_of(config: dict[str, Any]) -> Architecture:
    return Architecture.from_config(config)


def test_legal_degrees_of_v3() -> None:
    for config in (V3, V3_BF16):  # what counts is the output's dtype, not the source's
        assert legal_mp(arch_of(config), fp8=True) == (1, 2, 4, 8, 16)
        assert legal_mp(arch_of(config), fp8=False) == (1, 2, 4, 8, 16, 32, 64, 128)


def test_legal_degrees_of_v2_lite() -> None:
    assert legal_mp(arch_of(V2_LITE), fp8=False) == (1, 2, 4, 8, 16)
    assert legal_mp(arch_of(V2_LITE), fp8=True) == (1,)  # 10944 rows are 85.5 blocks


def test_pain_5_a_split_scale_block_is_refused_with_the_legal_degrees() -> None:
    with pytest.raises(PlanError) as caught:
        require_mp(arch_of(V3), 32, fp8=True)
    assert str(caught.value) == (
        "model.layers.0.mlp.gate_proj.weight: 144 scale blocks cannot be split over 32 ranks.\n"
        "model.layers.3.mlp.shared_experts.gate_proj.weight: 16 scale blocks cannot be split over 32 ranks.\n"
        "Legal --mp for this FP8 checkpoint: 1, 2, 4, 8, 16. Use one of them, or add --to bf16."
    )


def test_a_degree_that_bf16_cannot_have_either_is_not_advertised() -> None:
    with pytest.raises(PlanError) as caught:
        require_mp(arch_of(V3), 3, fp8=True)
    text = str(caught.value)
    assert "num_attention_heads: 128 attention heads cannot be split over 3 ranks." in text
    assert "n_routed_experts: 256 routed experts cannot be split over 3 ranks." in text
    assert "model.embed_tokens.weight: dimension 129280 cannot be split over 3 ranks." in text
    assert "--to bf16" not in text


def test_a_partial_block_is_said_to_be_one() -> None:
    problems = [str(problem) for problem in mp_problems(arch_of(V2_LITE), 2, fp8=True)]
    assert any("10944, which ends within a scale block" in problem for problem in problems)


@pytest.mark.parametrize("n", [0, -1])
def test_no_ranks_are_refused(n: int) -> None:
    with pytest.raises(PlanError, match="not a number of ranks"):
        require_mp(arch_of(V3), n, fp8=False)


def test_heads_and_experts_must_divide() -> None:
    # 4 heads, 6 experts, every split width divisible by 4: only the experts forbid 4 ranks.
    config = {**SMALL, "moe_intermediate_size": 132, "quantization_config": None}
    assert [problem.where for problem in mp_problems(arch_of(config), 4, fp8=False)] == ["n_routed_experts"]
    assert legal_mp(arch_of(config), fp8=False) == (1, 2)


@pytest.mark.parametrize("fp8", [True, False])
def test_problems_agree_with_the_whole_blueprint(fp8: bool) -> None:
    """A degree is legal exactly if every tensor divides: tried on all of them, not on one of each kind."""
    arch = arch_of(V3 if fp8 else V3_BF16)
    split = {
        (record.shape[record.split_dim], 128 if record.scale_name else 1)
        for record in blueprint(arch).values()
        if record.split_dim is not None and not record.mtp
    }
    for n in (2, 3, 5, 16, 20, 64, 80, 128):
        divides = arch.num_attention_heads % n == 0 and arch.n_routed_experts % n == 0
        divides &= all(size % (unit * n) == 0 for size, unit in split)
        assert (not mp_problems(arch, n, fp8=fp8)) is divides, n


def test_expert_ranges_even_and_uneven() -> None:
    assert expert_ranges(8, 2) == (range(0, 4), range(4, 8))
    assert expert_ranges(8, 3) == (range(0, 3), range(3, 6), range(6, 8))


@settings(deadline=None)
@given(st.integers(1, 400), st.data())
def test_expert_ranges_cover_all_experts_once(n_experts: int, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, n_experts))
    ranges = expert_ranges(n_experts, ranks)
    assert len(ranges) == ranks
    assert [expert for experts in ranges for expert in experts] == list(range(n_experts))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("ranks", [0, 9])
def test_more_ranks_than_experts_are_refused(ranks: int) -> None:
    with pytest.raises(PlanError, match="cannot be spread"):
        expert_ranges(8, ranks)


@pytest.mark.parametrize(
    ("change", "first", "step", "last"),
    [
        ({}, 16, 8, 256),  # 8 groups of 2: 4 groups hold the 8 experts of a token
        ({"num_experts_per_tok": 16}, 32, 8, 256),
        ({"n_group": 1, "topk_group": 1}, 8, 1, 256),
        ({"num_experts_per_tok": 1}, 16, 8, 256),  # a group's score is the sum of its two best
    ],
)
def test_legal_expert_counts_of_v3(change: dict[str, Any], first: int, step: int, last: int) -> None:
    assert legal_expert_counts(arch_of({**V3, **change})) == tuple(range(first, last + 1, step))


def test_legal_expert_counts_of_v2() -> None:
    grouped = {**V2_LITE, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    assert legal_expert_counts(arch_of({**grouped, "num_experts_per_tok": 3}))[0] == 8  # V2 takes a group's best alone
    assert legal_expert_counts(arch_of(V2_LITE)) == tuple(range(6, 65))
