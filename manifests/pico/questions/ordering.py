"""Numbers below 100 sorted, and the largest or smallest of them picked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from weightkit.manifests.pico.questions.core import Draft, Kind, both, phrased


def _key(kind: str, numbers: Sequence[int]) -> str:
    """One key whatever order the numbers are given in."""
    return f"{kind} {sorted(numbers)}"


def _joined(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _draw_of_list(kind: str, answer: Callable[[list[int]], str]) -> Callable[[Random], Draft]:
    """Draws of three to five different numbers; ``answer`` works out what is asked of them."""

    def draw(rng: Random) -> Draft:
        numbers = rng.sample(range(100), rng.randint(3, 5))
        return Draft(_key(kind, numbers), {"list": _joined(numbers)}, both(answer(numbers)))

    return draw


_draw_ascending = _draw_of_list("ascending", lambda numbers: _joined(sorted(numbers)))
_draw_descending = _draw_of_list("descending", lambda numbers: _joined(sorted(numbers, reverse=True)))
_draw_largest = _draw_of_list("largest", lambda numbers: str(max(numbers)))
_draw_smallest = _draw_of_list("smallest", lambda numbers: str(min(numbers)))


def _draw_larger(rng: Random) -> Draft:
    a, b = rng.sample(range(100), 2)
    return Draft(_key("larger", (a, b)), {"a": a, "b": b}, both(max(a, b)))


_ASCENDING = phrased(
    en="""
        Sort {list}.
        Sort from small to large: {list}
        Put in ascending order: {list}
    """,
    zh="""
        把 {list} 从小到大排序。
        从小到大排列：{list}
        升序排列：{list}
    """,
)
_DESCENDING = phrased(
    en="""
        Sort from large to small: {list}
        Put in descending order: {list}
    """,
    zh="""
        从大到小排列：{list}
        降序排列：{list}
    """,
)
_LARGEST = phrased(
    en="""
        Which is the largest of {list}?
        Find the maximum of {list}.
    """,
    zh="""
        {list} 中最大的是哪个？
        求 {list} 的最大值。
    """,
)
_SMALLEST = phrased(
    en="""
        Which is the smallest of {list}?
        Find the minimum of {list}.
    """,
    zh="""
        {list} 中最小的是哪个？
        求 {list} 的最小值。
    """,
)
_LARGER = phrased(
    en="""
        Which is larger, {a} or {b}?
        Is {a} or {b} the larger number?
    """,
    zh="""
        {a} 和 {b} 哪个更大？
        {a} 与 {b} 中较大的数是哪个？
    """,
)

KINDS: Sequence[Kind] = (
    Kind("ascending", 5, _draw_ascending, _ASCENDING),
    Kind("descending", 4, _draw_descending, _DESCENDING),
    Kind("largest", 2, _draw_largest, _LARGEST),
    Kind("smallest", 2, _draw_smallest, _SMALLEST),
    Kind("larger", 1, _draw_larger, _LARGER),
)
