"""The text pico is trained on: questions with one right answer, in English and Chinese, written by a seeded program.

``generate(split, seed)`` is an endless stream of :class:`Question`. A question belongs to the held-out split by a hash
of its *key*, not of its words: all phrasings of a question, in both languages and in both orders of its operands, fall
on one side; a quotient that is held out is held out too where it hides in a question about bytes. Facts (about itself,
about months and dtypes) and tables that are learned by heart (products, weekdays) cannot be inferred by a network of
this size: they are held out by phrasing. Nothing here imports torch.

One module a category; the order of its kinds and phrasings is part of the stream: the published checkpoint was trained
on these bytes, and its figures are for these held-out questions.
"""

from __future__ import annotations

from weightkit.manifests.pico.questions.core import LANGUAGES, Language, Question, Split
from weightkit.manifests.pico.questions.stream import CATEGORIES, draw, generate, held_out

__all__ = ["CATEGORIES", "LANGUAGES", "Language", "Question", "Split", "draw", "generate", "held_out"]
