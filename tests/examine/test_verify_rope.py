"""A config's rotary embedding: what loaders compute differently, or not at all, is said; what is published is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import V3, write_tiny

import weightkit as wk
from weightkit.examine.rope import rope_notes, rope_problems

YARN = {
    "type": "yarn",
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}
NEWER = {**{key: value for key, value in YARN.items() if key != "type"}, "rope_type": "yarn", "rope_theta": 10000}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in YARN.items() if key not in keys}


@pytest.mark.parametrize(
    ("fields", "what", "found"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "no member of the family has", "dynamic"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "no member of the family has", "linear"),
        ({"rope_parameters": {**NEWER, "rope_type": "llama3"}}, "no member of the family has", "llama3"),
        ({"rope_scaling": {**YARN, "rope_type": "default"}}, "type and rope_type differ", "yarn and default"),
        ({"rope_scaling": without("type", "beta_fast", "beta_slow")}, "no type", "factor, mscale"),
        ({"rope_scaling": without("original_max_position_embeddings")}, "for which loaders put 4096", "none"),
        ({"rope_scaling": without("mscale")}, "one of mscale and mscale_all_dim", "mscale_all_dim 1.0"),
        ({"rope_scaling": without("mscale_all_dim")}, "one of mscale and mscale_all_dim", "mscale 1.0"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "shortens the context", "0.5"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 32}}, "less than beta_slow", "beta_fast 1"),
        ({"rope_scaling": {**YARN, "beta_slow": 33, "beta_fast": None}}, "less than beta_slow", "beta_fast 32"),
        (
            {"rope_scaling": YARN, "rope_parameters": {**NEWER, "factor": 4}},
            "rope_parameters differ",
            "factor 40 and 4",
        ),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_parameters differ", "yarn and def"),
        ({"rope_theta": 50000, "rope_parameters": NEWER}, "rope_theta stands in several", "50000, 10000"),
    ],
)
def test_what_loaders_read_differently(fields: dict[str, Any], what: str, found: str) -> None:
    problems = list(rope_problems(fields, Path("config.json")))
    assert len(problems) == 1, problems
    assert what in problems[0].what
    assert found in str(problems[0].found)
    assert problems[0].fix


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_scaling": None, "rope_theta": 10000},
        {"rope_scaling": {}},
        {"rope_scaling": YARN, "rope_theta": 10000},
        {"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0}},  # Kimi-K2
        {"rope_scaling": YARN, "rope_parameters": NEWER, "rope_theta": 10000.0},
        {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},  # GLM-5
        {"rope_parameters": {"rope_theta": 1000000}},
    ],
)
def test_what_they_read_alike(fields: dict[str, Any]) -> None:
    assert list(rope_problems(fields, Path("config.json"))) == []
    assert list(rope_notes(fields)) == []


def test_yarn_without_either_mscale_is_a_note() -> None:
    fields = {"rope_scaling": without("mscale", "mscale_all_dim")}
    assert list(rope_problems(fields, Path("config.json"))) == []
    assert "without mscale and mscale_all_dim" in next(rope_notes(fields))


def test_verify_asks(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    scaling = without("mscale", "mscale_all_dim")
    (tmp_path / "config.json").write_text(json.dumps({**V3.config(), "rope_scaling": scaling}))
    report = wk.verify(tmp_path, quick=True, progress=False)
    assert report.ok, report.render()
    assert any("YaRN" in note for note in report.notes)
    scaling["type"] = "dynamic"
    (tmp_path / "config.json").write_text(json.dumps({**V3.config(), "rope_scaling": scaling}))
    report = wk.verify(tmp_path, quick=True, progress=False)
    assert [problem.found for problem in report.problems] == ["dynamic"]
