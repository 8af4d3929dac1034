"""``weightkit generate``: many prompts, streaming, and the plan, on the model that ships with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from weightkit import manifests
from weightkit.cli.generate import command
from weightkit.errors import GenerationError, SpaceError

PICO = str(manifests.load("pico").path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(command, [PICO, "--device", "cpu", *arguments])


def as_json(*arguments: str) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return as_json("--prompt", "What is 17 + 25?")


def test_one_prompt(whole: dict[str, Any]) -> None:
    assert whole["text"] == "42"
    assert "plan" not in whole
    assert whole["cache"]["misses"] > 0


def test_streamed_text_is_the_same_and_says_what_it_costs(whole: dict[str, Any]) -> None:
    result = invoke("--prompt", "What is 17 + 25?", "--stream", "--host-memory", "1GB")
    assert result.exit_code == 0, result.exception
    assert result.stdout == "42\n"
    assert "Weights     7.7 MB as stored, 30.4 MB in float32" in result.stderr
    assert "/s measured" in result.stderr
    assert "stopped by eos" in result.stderr


def test_many_prompts(tmp_path: Path, whole: dict[str, Any]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "What is 17 + 25?"}\n{"prompt": "What is 20 + 5?"}\n')
    found = as_json("--prompts", str(path))
    assert [generation["text"] for generation in found["generations"]] == ["42", "25"]
    assert found["generations"][0]["token_ids"] == whole["token_ids"]
    assert found["plan"]["prompts"] == 2
    shown = invoke("--prompts", str(path))
    assert shown.stdout == "--- prompt 1\n42\n--- prompt 2\n25\n"
    assert shown.stderr.startswith("[2 prompts, ")


def test_dry_run_prints_the_plan_alone() -> None:
    result = invoke("--dry-run", "--host-memory", "1GB")
    assert result.exit_code == 0, result.exception
    assert [line.split("  ")[0] for line in result.stdout.splitlines()] == [
        "Weights",
        "Memory",
        "Prompt",
        "New token",
        "Disk",
    ]
    found = as_json("--dry-run", "--stream", "--host-memory", "1GB")
    assert found["is_streamed"] is True
    assert found["token_s"] == found["token_read_bytes"] / found["rate"]["bytes_per_s"]


def test_bad_requests(tmp_path: Path) -> None:
    result = invoke("--host-memory", "20MB")
    assert isinstance(result.exception, SpaceError)
    assert "at least" in str(result.exception)
    result = invoke("--prompts", str(tmp_path / "none"))
    assert isinstance(result.exception, GenerationError)
    assert invoke("--prompts", str(tmp_path / "none"), "--prompt", "a").exit_code == 2
    assert invoke("--host-memory", "lots").exit_code == 2
