"""What every category's questions are made of: operands, phrasings, and a hash that holds some of them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal
from zlib import crc32

Language = Literal["en", "zh"]
Split = Literal["train", "held_out"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

#: One key in this many is held out of what can be worked out, and of phrasings of facts.
HELD_OUT_ONE_IN = 16
HELD_OUT_PHRASINGS_ONE_IN = 6


@dataclass(frozen=True)
class Question:
    """A question with its only right answer.

    Attributes:
        category: what accuracy is reported by: arithmetic, bytes, ordering, copying, dates or itself.
        kind: the kind of question within the category.
        language: ``en`` or ``zh``.
        prompt: the user's words.
        answer: the assistant's words, to be matched exactly.
        is_held_out: whether the question belongs to the held-out split.
    """

    category: str
    kind: str
    language: Language
    prompt: str
    answer: str
    is_held_out: bool


@dataclass(frozen=True)
class Draft:
    """A question before it is put into words.

    Attributes:
        key: decides the split; None for the few that are always for training.
        fields: the operands, which fill the phrasings.
        answers: the right answer in each language.
    """

    key: str | None
    fields: Mapping[str, object]
    answers: Mapping[Language, str]


@dataclass(frozen=True)
class Kind:
    """One kind of question.

    Attributes:
        name: unique within the category.
        weight: how often it is drawn, beside the category's other kinds.
        draw: draws operands.
        phrasings: the words that ask for the answer.
        closed: facts and tables: the split goes by the finished words, whatever the draft's key.
    """

    name: str
    weight: int
    draw: Callable[[Random], Draft]
    phrasings: Mapping[Language, Sequence[str]]
    closed: bool = False

    def ask(self, category: str, language: Language, rng: Random) -> Question:
        """Draws operands and puts them into words."""
        draft = self.draw(rng)
        prompt = rng.choice(self.phrasings[language]).format_map(draft.fields)
        if self.closed:
            held = _falls_out(prompt, HELD_OUT_PHRASINGS_ONE_IN)
        else:
            held = draft.key is not None and _falls_out(draft.key, HELD_OUT_ONE_IN)
        return Question(category, self.name, language, prompt, draft.answers[language], held)


def _falls_out(key: str, one_in: int) -> bool:
    """Whether ``key`` is one of the one in ``one_in`` held out. CRC-32: stable over runs, machines and versions."""
    return crc32(key.encode()) % one_in == 0


def phrased(en: str, zh: str) -> Mapping[Language, Sequence[str]]:
    """A kind's phrasings from two texts with one phrasing a line; blank lines and indentation do not count."""
    return {"en": _lines(en), "zh": _lines(zh)}


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def both(answer: object) -> Mapping[Language, str]:
    """An answer that is the same in both languages."""
    return {"en": str(answer), "zh": str(answer)}


def product_key(a: int, b: int) -> str:
    """The key of a product and of its quotients, whatever a question dresses them in.

    So 48 / 2 held out keeps "24 BF16 values" out of training too.
    """
    return f"product {min(a, b)} {max(a, b)}"
