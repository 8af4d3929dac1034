"""What any target is asked, a checkpoint on this machine or a server, and what counts as a right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightkit.manifests import Manifest
from weightkit.smoke.verdict import Check

LEAST_RIGHT = 0.9
"""The share of a manifest's answers that must be right. Rounding to int4 may cost one of them; a wrong tensor costs
more."""

WRONG_SHOWN = 3


@dataclass(frozen=True)
class Prompt:
    """A user's message and the answer that is known for it.

    Attributes:
        text: the message.
        expected: the answer; None where none is known.
        exact: whether the answer is just that, white space around it aside; else it has it in it somewhere.
    """

    text: str
    expected: str | None = None
    exact: bool = True

    def accepts(self, answer: str) -> bool:
        """Whether ``answer`` is right. False where no answer is known."""
        if self.expected is None:
            return False
        return answer.strip() == self.expected if self.exact else self.expected in answer


#: For models whose manifest has no answers. Whoever has learned to answer at all gets these right, though a model that
#: thinks first may need more tokens than it is given: right answers count for it, wrong ones are not held against it.
GENERAL = (
    Prompt("What is 17 + 25? Answer with the number only.", "42", exact=False),
    Prompt("中国的首都是哪里？只回答城市名。", "北京", exact=False),
)


def prompts_for(manifest: Manifest | None) -> tuple[Prompt, ...]:
    """A manifest's prompts with their answers, which are exact; ``GENERAL`` where it has none."""
    if manifest is None or manifest.smoke is None or not manifest.smoke.answers:
        return GENERAL
    return tuple(Prompt(text, answer) for text, answer in manifest.smoke.answers)


def check_answers(prompts: Sequence[Prompt], answers: Sequence[str]) -> Check:
    """The check ``answers``: how many of the known answers ``answers`` (one a prompt, in their order) gives.

    Answers of a manifest must be right to ``LEAST_RIGHT``. Those to ``GENERAL`` prompts can only pass: that a model did
    not give them within few tokens proves nothing.
    """
    asked = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if prompt.expected is not None]
    if not asked:
        return Check("answers", None, "no expected answers are known for this model")
    wrong = [(prompt, answer) for prompt, answer in asked if not prompt.accepts(answer)]
    right = len(asked) - len(wrong)
    figures = {
        "asked": len(asked),
        "right": right,
        "wrong": [{"prompt": p.text, "expected": p.expected, "found": answer} for p, answer in wrong],
    }
    lines = [f"{right} of {len(asked)} right"]
    lines += [f"{p.text!r}: expected {p.expected!r}, found {_short(answer)!r}" for p, answer in wrong[:WRONG_SHOWN]]
    lines += [f"... and {len(wrong) - WRONG_SHOWN} more"] if len(wrong) > WRONG_SHOWN else []
    binding = all(prompt.exact for prompt, _ in asked)
    if binding:
        return Check("answers", right >= LEAST_RIGHT * len(asked), "\n".join(lines), figures)
    if wrong:
        lines[0] += "; not judged: no manifest says what this model answers in so few tokens"
    return Check("answers", True if not wrong else None, "\n".join(lines), figures)


def _short(text: str, most: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= most else text[:most] + "…"
