"""Questions drawn from all categories: endless for training, a fixed set for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random

from weightkit.manifests.pico.questions import arithmetic, bytes, copying, dates, itself, ordering
from weightkit.manifests.pico.questions.core import LANGUAGES, Kind, Language, Question, Split

#: How often a category is drawn for training. Facts need fewer repetitions than algorithms.
_CATEGORY_WEIGHTS: Mapping[str, int] = {
    "arithmetic": 28,
    "bytes": 20,
    "ordering": 20,
    "copying": 14,
    "dates": 14,
    "itself": 4,
}
CATEGORIES: tuple[str, ...] = tuple(_CATEGORY_WEIGHTS)

_KINDS: Mapping[str, Sequence[Kind]] = {
    "arithmetic": arithmetic.KINDS,
    "bytes": bytes.KINDS,
    "ordering": ordering.KINDS,
    "copying": copying.KINDS,
    "dates": dates.KINDS,
    "itself": itself.KINDS,
}
_KIND_WEIGHTS: Mapping[str, Sequence[int]] = {
    category: tuple(kind.weight for kind in kinds) for category, kinds in _KINDS.items()
}


def draw(split: Split, rng: Random, category: str | None = None, language: Language | None = None) -> Question:
    """One question of ``split``; of any category and language where None."""
    if category is None:
        category = rng.choices(CATEGORIES, tuple(_CATEGORY_WEIGHTS.values()))[0]
    wanted = split == "held_out"
    while True:
        kind = rng.choices(_KINDS[category], _KIND_WEIGHTS[category])[0]
        question = kind.ask(category, rng.choice(LANGUAGES) if language is None else language, rng)
        if question.is_held_out == wanted:
            return question


def generate(split: Split, seed: int) -> Iterator[Question]:
    """An endless stream of questions of ``split``, the same for the same ``seed``."""
    rng = Random(seed)
    while True:
        yield draw(split, rng)


def held_out(seed: int, per_category_and_language: int) -> list[Question]:
    """A fixed set of held-out questions without repetitions, as many of each category and language.

    Where fewer exist (facts, say) all of them are taken, so the count may fall short.
    """
    rng = Random(seed)
    questions: list[Question] = []
    for category in CATEGORIES:
        for language in LANGUAGES:
            found: dict[str, Question] = {}
            for _ in range(per_category_and_language * 20):
                question = draw("held_out", rng, category, language)
                found.setdefault(question.prompt, question)
                if len(found) == per_category_and_language:
                    break
            questions.extend(found.values())
    return questions
