"""Verdicts, prompts, and the rules by which expert load and unknown perplexities are judged, on values by hand."""

from __future__ import annotations

import json

import pytest

from weightkit import manifests
from weightkit.family import Architecture
from weightkit.model import TensorWeights
from weightkit.smoke import GENERAL, Check, Prompt, Verdict, check_answers, prompts_for
from weightkit.smoke.routing import check_load

PICO = manifests.load("pico")


def test_a_verdict_is_ok_if_something_was_checked_and_nothing_failed() -> None:
    right, wrong, left = Check("a", True, ""), Check("b", False, ""), Check("c", None, "")
    assert Verdict("x", (right, left)).ok
    assert not Verdict("x", (right, wrong)).ok
    assert not Verdict("x", (left,)).ok
    assert not Verdict("x", ()).ok


def test_rendered() -> None:
    verdict = Verdict(
        "x", (Check("one", True, "fine"), Check("other", False, "bad\nworse"), Check("last", None, "no text"))
    )
    assert verdict.render().split("\n") == [
        "x:",
        "  ok           one    fine",
        "  NOT OK       other  bad",
        "                      worse",
        "  not checked  last   no text",
        "Not ok: other.",
    ]
    assert (
        Verdict("x", (Check("one", True, ""), Check("last", None, "")))
        .render()
        .endswith("Ok: 1 check passed, 1 not made.")
    )
    assert Verdict("x", ()).render().endswith("Not ok: nothing could be checked.")


def test_a_hostile_answer_does_not_drive_the_terminal() -> None:
    assert "\x1b" not in Verdict("\x1b[2J", (Check("a", False, "said \x1b[31m"),)).render()


def test_json_has_only_what_json_knows() -> None:
    check = Check("a", True, "", {"x": float("nan"), "y": [float("inf"), 1.5], "z": {"n": None}})
    text = json.dumps(Verdict("x", (check,)).to_json(), allow_nan=False)
    assert json.loads(text)["checks"][0]["figures"] == {"x": "nan", "y": ["inf", 1.5], "z": {"n": None}}


def test_a_manifests_answers_must_be_exact_to_nine_tenths() -> None:
    prompts = prompts_for(PICO)
    assert len(prompts) == 24
    answers = [prompt.expected or "" for prompt in prompts]
    assert check_answers(prompts, [f" {answer}\n" for answer in answers]).ok
    assert check_answers(prompts, ["", "", *answers[2:]]).ok  # 22 of 24
    failed = check_answers(prompts, ["", "", f"{answers[2]}!", *answers[3:]])
    assert failed.ok is False
    assert failed.figures["right"] == 21
    assert f"expected {answers[2]!r}, found '{answers[2]}!'" in failed.detail


def test_general_questions_can_pass_but_not_fail() -> None:
    assert prompts_for(None) == prompts_for(manifests.load("deepseek-v3")) == GENERAL
    assert check_answers(GENERAL, ["It is 42.", "北京。"]).ok is True
    assert check_answers(GENERAL, ["<think> Hm", "北京"]).ok is None
    assert check_answers([Prompt("?")], ["!"]).ok is None


@pytest.mark.parametrize(
    ("counts", "tokens", "ok"),
    [
        ([40] * 16, 160, True),
        ([0, *[42] * 15], 160, None),  # 40 an expert: too few to judge
        ([0, *[160] * 15], 552, None),  # 138.0
        ([0, *[160] * 15], 553, False),  # 138.25, over ln(1000) * 20 = 138.155
    ],
)
def test_experts_are_judged_where_a_twentieth_of_the_average_would_have_shown(
    counts: list[int], tokens: int, ok: bool | None
) -> None:
    arch = Architecture.from_config(PICO.config)
    found = check_load(arch, TensorWeights({}), {1: counts, 2: [40] * 16}, tokens)
    assert found.ok is ok
    assert ("dead: 1\nlayer 1: expert 0" in found.detail) is (ok is False)
