"""pico's calibration text: what the program writes, of training questions alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import weightkit.manifests as manifests
from weightkit.manifests.pico import calibration
from weightkit.manifests.pico.questions import held_out
from weightkit.quantization import default_calibration, load_calibration

MANIFEST = manifests.load("pico")
MOST_BYTES = 400_000


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    lines = default_calibration("pico").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_the_file_is_what_the_program_writes() -> None:
    path = default_calibration("pico")
    assert path.read_text(encoding="utf-8") == calibration.text()
    assert path.stat().st_size < MOST_BYTES


def test_the_manifest_names_it() -> None:
    assert MANIFEST.calibration == manifests.CalibrationData(
        file="calibration.jsonl", path=default_calibration("pico"), samples=512, seq_len=128
    )
    assert dict(calibration.MANIFEST_ENTRY) == {"file": "calibration.jsonl", "samples": 512, "seq_len": 128}


def test_nothing_that_is_evaluated_is_in_it(conversations: list[list[dict[str, str]]]) -> None:
    asked = {message["content"] for messages in conversations for message in messages if message["role"] == "user"}
    assert len(asked) > 2_000
    evaluation = held_out(2026, 200)  # greedy accuracy and perplexity are measured on these
    for questions in (evaluation, held_out(1, 200)):
        assert not asked & {question.prompt for question in questions}
    text = default_calibration("pico").read_text(encoding="utf-8")
    assert not [question.prompt for question in evaluation if f'"{question.prompt}"' in text]


def test_turns_alternate(conversations: list[list[dict[str, str]]]) -> None:
    for messages in conversations:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)


def test_it_is_enough_for_what_the_manifest_asks() -> None:
    data = MANIFEST.calibration
    assert data is not None
    assert data.samples is not None
    assert data.seq_len is not None
    folder = MANIFEST.path or Path("no checkpoint ships")
    found = load_calibration(
        default_calibration("pico"), folder, samples=data.samples, seq_len=data.seq_len, vocab_size=512
    )
    assert found.tokens.shape == (512, 128)
    begin, end, user, assistant = 0, 1, 3, 4
    stream = found.tokens.flatten().tolist()
    # as many answers ended as begun, save what is cut off at the end; no conversation begins but after one ended
    assert abs(stream.count(assistant) - stream.count(end)) <= 1
    assert stream.count(begin) == found.documents_used
    assert all(stream[place - 1] == end for place, token in enumerate(stream) if token == begin and place)
    assert all(stream[place + 1] == user for place, token in enumerate(stream[:-1]) if token == begin)
    # pinned: the same on every machine
    assert found.sha256 == "7039c70182f063df7191602fcf17277afadcf5ff340dee2ba97e3b1d0cb6af91"
