"""Prompts from a file: a line of text each, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightkit.errors import GenerationError, WeightkitError, raise_all
from weightkit.generation.tokenizer import Messages

Prompt = str | Sequence[int] | Messages
"""Plain text, token ids, or a conversation."""

_FIELDS = "prompt, messages or token_ids"


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a UTF-8 file, blank lines left out.

    A file whose first prompt begins with ``{``, or that is named ``.jsonl``, holds a JSON object a line, with one of
    ``prompt`` (text), ``messages`` (a conversation: a list of objects with ``role`` and ``content``) and ``token_ids``
    (a list of integers). Any other file holds a line of text each.

    Raises:
        GenerationError: the file cannot be read, is empty, or has lines that are no prompts; all of them at once.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise GenerationError(
            f"cannot be read ({exc.strerror})", where=path, fix="Name a UTF-8 file of prompts, a line each."
        ) from exc
    except UnicodeDecodeError as exc:
        raise GenerationError(f"not UTF-8 at byte {exc.start}", where=path, fix="Save the file as UTF-8.") from exc
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise GenerationError("no prompts in the file", where=path, expected="a line each", found="no line")
    if path.suffix != ".jsonl" and not lines[0][1].startswith("{"):
        return [line for _, line in lines]
    prompts: list[Prompt] = []
    problems: list[WeightkitError] = []
    for number, line in lines:
        try:
            prompts.append(_from_json(line, f"{path}:{number}"))
        except GenerationError as problem:
            problems.append(problem)
    raise_all("lines that are no prompts", problems, where=path)
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise GenerationError("not JSON", where=where, expected=f"an object with {_FIELDS}", found=str(exc)) from exc
    given = [field for field in ("prompt", "messages", "token_ids") if isinstance(record, dict) and field in record]
    if len(given) != 1:
        found = ", ".join(given) or (", ".join(record) if isinstance(record, dict) else type(record).__name__)
        raise GenerationError("not one prompt", where=where, expected=f"one of {_FIELDS}", found=found or "nothing")
    value = record[given[0]]
    if given[0] == "prompt" and isinstance(value, str):
        return value
    if given[0] == "messages" and isinstance(value, list) and value and all(isinstance(m, Mapping) for m in value):
        return value
    if given[0] == "token_ids" and isinstance(value, list) and all(type(token) is int for token in value):
        return value
    kinds = {"prompt": "text", "messages": "a list of objects", "token_ids": "a list of integers"}
    raise GenerationError(
        f"{given[0]} of the wrong kind", where=where, expected=kinds[given[0]], found=repr(value)[:60]
    )
