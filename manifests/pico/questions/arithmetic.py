"""Sums and differences below 200, the products of a digit and a number below 100, and their quotients."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from weightkit.manifests.pico.questions.core import Draft, Kind, both, phrased, product_key


def _draw_sum(rng: Random) -> Draft:
    a, b = rng.randrange(100), rng.randrange(100)
    return Draft(f"sum {min(a, b)} {max(a, b)}", {"a": a, "b": b}, both(a + b))


def _draw_difference(rng: Random) -> Draft:
    a, b = sorted((rng.randrange(100), rng.randrange(100)), reverse=True)
    return Draft(f"difference {a} {b}", {"a": a, "b": b}, both(a - b))


def _draw_product(rng: Random) -> Draft:
    a, b = rng.randrange(2, 10), rng.randrange(1, 100)
    if rng.random() < 0.5:
        a, b = b, a
    return Draft(product_key(a, b), {"a": a, "b": b}, both(a * b))


def _draw_quotient(rng: Random) -> Draft:
    a, b = rng.randrange(2, 10), rng.randrange(1, 100)
    return Draft(product_key(a, b), {"a": a * b, "b": a}, both(b))


_SUM = phrased(
    en="""
        What is {a} + {b}?
        {a} + {b} = ?
        Add {a} and {b}.
        What is the sum of {a} and {b}?
        {a} plus {b}?
    """,
    zh="""
        {a} + {b} 等于多少？
        {a} + {b} = ?
        {a} 加 {b} 是多少？
        求 {a} 与 {b} 的和。
        {a} 加上 {b}？
    """,
)
_DIFFERENCE = phrased(
    en="""
        What is {a} - {b}?
        {a} - {b} = ?
        Take {b} from {a}.
        What is {a} minus {b}?
        Subtract {b} from {a}.
    """,
    zh="""
        {a} - {b} 等于多少？
        {a} - {b} = ?
        {a} 减 {b} 是多少？
        求 {a} 与 {b} 的差。
        {a} 减去 {b}？
    """,
)
_PRODUCT = phrased(
    en="""
        What is {a} * {b}?
        {a} * {b} = ?
        Multiply {a} by {b}.
        What is {a} times {b}?
        {a} times {b}?
    """,
    zh="""
        {a} * {b} 等于多少？
        {a} * {b} = ?
        {a} 乘 {b} 是多少？
        求 {a} 与 {b} 的积。
        {a} 乘以 {b}？
    """,
)
_QUOTIENT = phrased(
    en="""
        What is {a} / {b}?
        {a} / {b} = ?
        Divide {a} by {b}.
        What is {a} divided by {b}?
        {a} divided by {b}?
    """,
    zh="""
        {a} / {b} 等于多少？
        {a} / {b} = ?
        {a} 除以 {b} 是多少？
        求 {a} 与 {b} 的商。
        {a} 除以 {b}？
    """,
)

KINDS: Sequence[Kind] = (
    Kind("sum", 6, _draw_sum, _SUM),
    Kind("difference", 6, _draw_difference, _DIFFERENCE),
    Kind("product", 8, _draw_product, _PRODUCT, closed=True),
    Kind("quotient", 5, _draw_quotient, _QUOTIENT),
)
