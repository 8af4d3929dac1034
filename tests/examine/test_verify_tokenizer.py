"""Tokenizers and chat templates with which a whole checkpoint generates nothing, or nonsense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny

import weightkit as wk
from weightkit.errors import WeightkitError
from weightkit.examine.tokenizer import MAX_TEMPLATE_BYTES, tokenizer_problems

VOCABULARY = {"<b>": 0, "<e>": 1, "a": 2, "b": 3}
TOKENIZER = {"added_tokens": [{"id": 4, "content": "<p>"}], "model": {"type": "BPE", "vocab": VOCABULARY, "merges": []}}
CONFIG = {"bos_token": "<b>", "eos_token": {"content": "<e>"}, "chat_template": "{{ messages }}"}


def examined(
    folder: Path, *, vocab_size: int | None = 8, **changed: Mapping[str, Any]
) -> tuple[list[WeightkitError], list[str]]:
    """With ``tokenizer.json`` and others as above where they are not given."""
    given = {"tokenizer": TOKENIZER, "tokenizer_config": CONFIG, **changed}
    (folder / "tokenizer.json").touch()
    return tokenizer_problems(folder, {f"{name}.json": content for name, content in given.items()}, vocab_size)


def only(folder: Path, **changed: Any) -> WeightkitError:
    problems, _ = examined(folder, **changed)
    assert len(problems) == 1, problems
    return problems[0]


def test_a_tokenizer_that_is_right(tmp_path: Path) -> None:
    ids = {"bos_token_id": 0, "eos_token_id": [1, 3], "pad_token_id": -1}
    assert examined(tmp_path, config=ids, generation_config={"eos_token_id": 1, "pad_token_id": 4}) == ([], [])


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"vocab": [["<b>", 0.0], ["<e>", -1.5]]}},  # Unigram
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<b>"}, {"id": 2, "content": "<e>"}]},
    ],
)
def test_other_forms_of_a_vocabulary(tokenizer: Mapping[str, Any], tmp_path: Path) -> None:
    assert examined(tmp_path, tokenizer=tokenizer) == ([], [])


@pytest.mark.parametrize(
    "tokenizer",
    [
        {},
        {"model": None},
        {"model": {"vocab": 3}},
        {"model": {"vocab": {"a": "0"}}},
        {"model": {"vocab": {"a": True}}},
        {"model": {"vocab": ["a"]}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]},
        {"model": {"vocab": {"a": 0}}, "added_tokens": ["<b>"]},
    ],
)
def test_what_is_no_tokenizer(tokenizer: Mapping[str, Any], tmp_path: Path) -> None:
    assert only(tmp_path, tokenizer=tokenizer).what == "not a tokenizer"


def test_a_vocabulary_beyond_the_embedding(tmp_path: Path) -> None:
    problem = only(tmp_path, vocab_size=3)
    assert (problem.expected, problem.found) == ("ids up to 2", "2 others, such as 4 of '<p>'")
    assert examined(tmp_path, vocab_size=None) == ([], [])
    later = {**CONFIG, "added_tokens_decoder": {"9": {"content": "<x>"}}}
    assert only(tmp_path, tokenizer_config=later).found == "1 others, such as 9 of '<x>'"


def test_special_tokens_that_are_none(tmp_path: Path) -> None:
    problem = only(tmp_path, tokenizer_config={**CONFIG, "eos_token": "<end>"})
    assert (problem.what, problem.found) == ("eos_token is no token of tokenizer.json", "'<end>'")
    later = {**CONFIG, "eos_token": "<end>", "added_tokens_decoder": {"5": {"content": "<end>"}}}
    assert examined(tmp_path, tokenizer_config=later) == ([], [])
    problem = only(tmp_path, generation_config={"eos_token_id": [1, 6]})
    assert problem.what == "eos_token_id is the id of no token in tokenizer.json"
    assert (problem.where, problem.found) == (str(tmp_path / "generation_config.json"), "6")
    assert examined(tmp_path, config={"eos_token_id": [1, 8, "x"]})[0] == []  # beyond the embedding, or no number


def test_special_tokens_that_disagree_are_a_note(tmp_path: Path) -> None:
    """Kimi-K2 ends a text and an answer with different tokens; several ids with one in common are usual."""
    problems, notes = examined(tmp_path, config={"eos_token_id": 1}, generation_config={"eos_token_id": 3})
    where = "[1] in config.json, [3] in generation_config.json, [1] in tokenizer_config.json"
    assert (problems, notes) == ([], [f"eos_token_id differs: {where}"])
    assert examined(tmp_path, config={"bos_token_id": 2})[1] == [
        "bos_token_id differs: [2] in config.json, [0] in tokenizer_config.json"
    ]
    assert examined(tmp_path, config={"eos_token_id": 1}, generation_config={"eos_token_id": [3, 1]}) == ([], [])


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% if messages %}", "line 1: Unexpected end of template"),
        ("a\n{{ messages", "line 2: "),
        ("{% unheard_of %}", "line 1: Encountered unknown tag"),
        (" \n", "an empty chat template"),
        (3, "a chat template that is not text"),
        ({"default": "{% for"}, "does not parse"),
        ([{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{"}], "does not parse"),
        ([{"name": "default"}], "not text"),
        ("{{ " + "9" * 5000 + " }}", "does not parse"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "does not parse"),
        ("x" * (MAX_TEMPLATE_BYTES + 1), "too large"),
    ],
    ids=["block", "print", "tag", "empty", "number", "dict", "list", "nothing", "digits", "depth", "length"],
)
def test_templates_that_render_nothing(template: object, what: str, tmp_path: Path) -> None:
    problem = only(tmp_path, tokenizer_config={**CONFIG, "chat_template": template})
    assert what in problem.what
    assert str(problem.where).startswith(f"{tmp_path / 'tokenizer_config.json'}: chat_template")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.tool %}{% continue %}{% endif %}{{ m.content | tojson }}{% endfor %}",
        "{% generation %}{{ messages }}{%- endgeneration -%}",
        "{{ 9 ** 9 ** 9 ** 9 }}",  # parsed in no time: it is not computed
    ],
)
def test_templates_that_parse(template: str, tmp_path: Path) -> None:
    assert examined(tmp_path, tokenizer_config={**CONFIG, "chat_template": template}) == ([], [])


def test_a_template_in_its_own_file(tmp_path: Path) -> None:
    config = {"bos_token": "<b>"}
    assert examined(tmp_path, tokenizer_config=config)[1] == [
        "no chat template, neither in tokenizer_config.json nor as chat_template.jinja"
    ]
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert examined(tmp_path, tokenizer_config=config) == ([], [])
    for damaged in (b"{% for", b"\xff"):
        (tmp_path / "chat_template.jinja").write_bytes(damaged)
        assert only(tmp_path, tokenizer_config=config).where == str(tmp_path / "chat_template.jinja")


def test_verify_asks(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    vocabulary = {**VOCABULARY, "z": 64}  # the embedding has 64 rows
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    report = wk.verify(tmp_path, quick=True, progress=False)
    assert [problem.what for problem in report.problems] == ["tokens without a row in the embedding"]
    assert [note for note in report.notes if "eos_token_id differs" in note]
