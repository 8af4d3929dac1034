"""Random capital letters repeated, reversed, counted, and the first or last of them picked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from string import ascii_uppercase

from weightkit.manifests.pico.questions.core import Draft, Kind, both, phrased


def _draw_letters(kind: str, longest: int, answer: Callable[[str], object]) -> Callable[[Random], Draft]:
    """Draws of 3 to ``longest`` letters; ``answer`` works out what is asked of them."""

    def draw(rng: Random) -> Draft:
        text = "".join(rng.choices(ascii_uppercase, k=rng.randint(3, longest)))
        # A word and its reverse share a key: having seen one reversed gives the other away.
        return Draft(f"{kind} {min(text, text[::-1])}", {"text": text}, both(answer(text)))

    return draw


_REPEAT = phrased(
    en="""
        Repeat {text}.
        Copy this: {text}
        Write {text} again.
    """,
    zh="""
        重复 {text}。
        照抄：{text}
        请再写一遍 {text}。
    """,
)
_REVERSE = phrased(
    en="""
        Reverse {text}.
        Write {text} backwards.
        Spell this in reverse: {text}
    """,
    zh="""
        把 {text} 倒过来写。
        倒序写出：{text}
        反转 {text}。
    """,
)
_FIRST = phrased(
    en="""
        What is the first letter of {text}?
        First letter of {text}?
    """,
    zh="""
        {text} 的第一个字母是什么？
        {text} 的首字母？
    """,
)
_LAST = phrased(
    en="""
        What is the last letter of {text}?
        Last letter of {text}?
    """,
    zh="""
        {text} 的最后一个字母是什么？
        {text} 的末字母？
    """,
)
_LENGTH = phrased(
    en="""
        How many letters are in {text}?
        How long is {text}?
    """,
    zh="""
        {text} 有多少个字母？
        {text} 有多长？
    """,
)

KINDS: Sequence[Kind] = (
    Kind("repeat", 3, _draw_letters("repeat", 8, str), _REPEAT),
    Kind("reverse", 5, _draw_letters("reverse", 6, lambda text: text[::-1]), _REVERSE),
    Kind("first letter", 1, _draw_letters("first", 8, lambda text: text[0]), _FIRST),
    Kind("last letter", 1, _draw_letters("last", 8, lambda text: text[-1]), _LAST),
    Kind("length", 2, _draw_letters("length", 8, len), _LENGTH),
)
