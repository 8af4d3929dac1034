"""The smoke test of a server: does it answer, completely, the same twice, and sanely."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from weightkit.errors import EndpointError
from weightkit.manifests import Manifest
from weightkit.serving.client import TIMEOUT_S, Answer, Client, SilentServerError, UnreachableServerError
from weightkit.smoke import Check, Prompt, Verdict, check_answers, prompts_for
from weightkit.units import counted

MAX_NEW_TOKENS = 64
FEWEST_REPEATS = 12
"""From so many repetitions of one piece on, an answer that has nothing else is none that a model means."""
LONGEST_PIECE = 8
_NAMES = ("models", "chat", "sane text", "answers", "stream", "repeatable", "log-probabilities")


def smoke_endpoint(
    url: str,
    *,
    model: str | None = None,
    manifest: Manifest | None = None,
    timeout_s: float = TIMEOUT_S,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Verdict:
    """Test an OpenAI-compatible server: its list of models, chat completions, streaming, and what it says.

    The prompts are those that a checkpoint is asked, greedily. What a broken server does is a failed check in the
    verdict, and what then cannot be tried is not checked; nothing waits longer than one time limit after the first
    silence.

    Args:
        url: the server's address, such as ``http://127.0.0.1:8000``.
        model: which of the models that it serves; default the first.
        manifest: the model's manifest, whose answers must come; None: general questions.
        timeout_s: what one request may take.
        max_new_tokens: of each answer.

    Raises:
        EndpointError: the address is none, or nothing listens there.
    """
    with Client(url, timeout_s=timeout_s) as client:
        test = _Test(client, prompts_for(manifest), model, max_new_tokens)
        return Verdict(client.base, test.run())


@dataclass
class _Test:
    client: Client
    prompts: tuple[Prompt, ...]
    wanted: str | None
    max_new_tokens: int
    model: str = ""
    answers: list[Answer] = field(default_factory=list)
    again: list[Answer] = field(default_factory=list)
    silent: str | None = None

    def run(self) -> tuple[Check, ...]:
        steps: tuple[Callable[[], Check], ...] = (
            self.models,
            self.chat,
            self.sane,
            self.known,
            self.stream,
            self.repeatable,
            self.logprobs,
        )
        return tuple(self._try(name, step) for name, step in zip(_NAMES, steps, strict=True))

    def _try(self, name: str, step: Callable[[], Check]) -> Check:
        if self.silent is not None:
            return Check(name, None, self.silent)
        try:
            return step()
        except UnreachableServerError as exc:
            if name == "models":
                raise
            self.silent = "the server is gone"
            return Check(name, False, str(exc))
        except SilentServerError as exc:
            self.silent = "not tried: the server was silent before"
            return Check(name, False, str(exc))
        except EndpointError as exc:
            return Check(name, False, str(exc))

    def models(self) -> Check:
        try:
            served = self.client.models()
        except (UnreachableServerError, SilentServerError):
            raise
        except EndpointError as exc:
            self.model = self.wanted or ""
            if not self.model:
                self.silent = "not tried: the server names no model"
            return Check("models", False, str(exc))
        listing = ", ".join(served[:4]) + (f" and {len(served) - 4} more" if len(served) > 4 else "")
        self.model = self.wanted or served[0]
        if self.model not in served:
            self.silent = "not tried: no such model"
            return Check("models", False, f"{self.model} is not served: expected one of {listing}")
        return Check("models", True, listing, {"served": list(served), "asked": self.model})

    def chat(self) -> Check:
        for prompt in self.prompts:
            self.answers.append(self.client.chat(self.model, prompt.text, max_tokens=self.max_new_tokens))
        other = next((a.model for a in self.answers if a.model not in (None, self.model)), None)
        if other is not None:
            return Check("chat", False, f"another model answered: expected {self.model}, found {other}")
        seconds = sum(answer.wall_s for answer in self.answers)
        counts = [answer.tokens for answer in self.answers if answer.tokens is not None]
        figures: dict[str, object] = {"wall_s": seconds, "tokens": sum(counts) if counts else None}
        pace = f", {sum(counts) / seconds:.1f} tokens/s" if counts and seconds > 0 else ""
        return Check("chat", True, f"{len(self.answers)} answers in {seconds:.1f} s{pace}", figures)

    def sane(self) -> Check:
        if not self.answers:
            return Check("sane text", None, "no answer came")
        found = [(p, reason) for p, a in zip(self.prompts, self.answers, strict=False) if (reason := insane(a.text))]
        if not found:
            return Check("sane text", True, f"{self.answers[0].text[:60]!r}")
        lines = [f"{prompt.text!r}: {reason}" for prompt, reason in found[:3]]
        return Check(
            "sane text", False, "\n".join([f"{len(found)} of {len(self.answers)} answers are no text", *lines])
        )

    def known(self) -> Check:
        if len(self.answers) < len(self.prompts):
            return Check("answers", None, "not all answers came")
        return check_answers(self.prompts, [answer.text for answer in self.answers])

    def stream(self) -> Check:
        answer = self.client.stream(self.model, self.prompts[0].text, max_tokens=self.max_new_tokens)
        self.again.append(answer)
        if answer.model not in (None, self.model):
            return Check("stream", False, f"another model answered: expected {self.model}, found {answer.model}")
        first = f", the first after {answer.first_s:.2f} s" if answer.first_s is not None else ""
        figures = {"pieces": answer.pieces, "first_s": answer.first_s, "wall_s": answer.wall_s}
        return Check("stream", True, f"{counted(answer.pieces, 'piece')}{first}", figures)

    def repeatable(self) -> Check:
        """The first answer, the streamed one and one more; where they differ and each is right, there is no telling."""
        if not self.answers:
            return Check("repeatable", None, "no answer to compare with")
        prompt, first = self.prompts[0], self.answers[0].text
        self.again.append(self.client.chat(self.model, prompt.text, max_tokens=self.max_new_tokens))
        other = next((answer.text for answer in self.again if answer.text != first), None)
        if other is None:
            return Check("repeatable", True, f"{len(self.again) + 1} greedy answers are the same")
        detail = f"greedy answers to one message differ\n{first[:60]!r}\n{other[:60]!r}"
        right = prompt.accepts(first) and prompt.accepts(other)
        return Check("repeatable", None if right else False, detail + ("\nboth are right" if right else ""))

    def logprobs(self) -> Check:
        """Log-probabilities show NaN where the text still looks like something. Servers may refuse to give them."""
        name = "log-probabilities"
        try:
            answer = self.client.chat(self.model, self.prompts[0].text, max_tokens=4, logprobs=True)
        except (UnreachableServerError, SilentServerError):
            raise
        except EndpointError as exc:
            if "out of range float" in str(exc).lower():  # what Python says of NaN on its way into JSON
                return Check(name, False, str(exc))
            return Check(name, None, f"the server does not give them: {exc.message}")
        if not answer.logprobs:
            return Check(name, None, "the server gives none")
        bad = [value for value in answer.logprobs if not math.isfinite(value) or value > 1e-3]
        figures = {"logprobs": list(answer.logprobs)}
        if bad:
            return Check(name, False, f"expected finite numbers up to 0, found {bad[0]}", figures)
        return Check(name, True, f"finite, {', '.join(f'{value:.3f}' for value in answer.logprobs)}", figures)


def insane(text: str) -> str | None:
    """Why an answer is no text that a model means; None for any other.

    Logits of NaN, and weights that were read wrongly, give nothing, one token for ever (``!!!!`` where it is the
    vocabulary's first), or bytes that are no characters. A model that is only small, or wrong, is not insane.
    """
    stripped = text.strip()
    if not stripped:
        return "empty"
    broken = sum(c == "�" or (not c.isprintable() and not c.isspace()) for c in stripped)
    if broken > len(stripped) // 4:
        return f"no characters: {stripped[:40]!r}"
    for length in range(1, min(LONGEST_PIECE, len(stripped) // FEWEST_REPEATS) + 1):
        piece = stripped[:length]
        if stripped == (piece * (len(stripped) // length + 1))[: len(stripped)]:
            return f"one piece for ever: {stripped[:40]!r}"
    return None
