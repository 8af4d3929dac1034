"""The smoke test of DeepSeek's demo, which serves nothing: it reads messages from a file, answers them, and ends."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from weightkit.errors import EngineError
from weightkit.manifests import Manifest
from weightkit.serving.endpoint import MAX_NEW_TOKENS, insane
from weightkit.serving.launch import Launch
from weightkit.serving.process import EngineProcess, ended, wait_for
from weightkit.smoke import Check, Prompt, Verdict, check_answers, prompts_for

MOST_MESSAGES = 8
"""``max_batch_size`` of ``ModelArgs`` in ``inference/model.py``: it answers a file at once, and no more than that."""


def smoke_demo(
    launch: Launch, log: Path, *, manifest: Manifest | None, timeout_s: float, tell: Callable[[str], None]
) -> Verdict:
    """Let the demo answer the prompts greedily, and judge what it printed.

    Raises:
        EngineError: it failed, or was not done in time.
    """
    prompts = [prompt for prompt in prompts_for(manifest) if "\n" not in prompt.text][:MOST_MESSAGES]
    with tempfile.NamedTemporaryFile("w", prefix="weightkit-prompts-", suffix=".txt", encoding="utf-8") as file:
        file.write("".join(f"{prompt.text}\n" for prompt in prompts))
        file.flush()
        options = ["--input-file", file.name, "--max-new-tokens", str(MAX_NEW_TOKENS), "--temperature", "0"]
        with EngineProcess([*launch.argv, *options], launch.env, log) as process:
            _wait_for_end(process, timeout_s, tell)
    answers = printed_answers(log.read_text("utf-8", "replace"), [prompt.text for prompt in prompts])
    return Verdict(f"{launch.engine.title}, {launch.tp} ranks", _checks(prompts, answers))


def _wait_for_end(process: EngineProcess, timeout_s: float, tell: Callable[[str], None]) -> None:
    """It is done when it has ended well."""
    try:
        wait_for(process, lambda: False, timeout_s=timeout_s, every_s=0.2, tell=tell)
    except EngineError:
        code = process.poll()
        if code is None:
            raise
        if code != 0:
            raise ended(process, code) from None


def _checks(prompts: Sequence[Prompt], answers: Sequence[str | None]) -> tuple[Check, ...]:
    missing = sum(answer is None for answer in answers)
    if missing:
        return (Check("completions", False, f"{missing} of {len(answers)} are not in its output"),)
    given = [answer or "" for answer in answers]
    reasons = [f"{p.text!r}: {reason}" for p, answer in zip(prompts, given, strict=True) if (reason := insane(answer))]
    sane = Check("sane text", not reasons, "\n".join(reasons[:3]) if reasons else f"{given[0][:60]!r}")
    return (Check("completions", True, f"{len(given)} printed"), sane, check_answers(prompts, given))


def printed_answers(output: str, prompts: Sequence[str]) -> list[str | None]:
    """The completion of each prompt, as ``generate.py`` prints them: ``Prompt: ...``, ``Completion: ...``, a blank
    line. None for one that is not there."""
    found: list[str | None] = []
    for prompt in prompts:
        pattern = rf"^Prompt: {re.escape(prompt)}\nCompletion: (.*?)\n(?=\nPrompt: |\n?\Z|\n)"
        match = re.search(pattern, output, re.MULTILINE | re.DOTALL)
        found.append(match[1] if match else None)
    return found
