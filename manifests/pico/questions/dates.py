"""Weekdays, months and days counted on, leap years, and the days of the months of a common year."""

from __future__ import annotations

from calendar import isleap
from collections.abc import Mapping, Sequence
from random import Random

from weightkit.manifests.pico.questions.core import LANGUAGES, Draft, Kind, Language, both, phrased

_WEEKDAYS: Mapping[Language, Sequence[str]] = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
_MONTHS: Mapping[Language, Sequence[str]] = {
    "en": tuple(
        "January February March April May June July August September October November December".split()  # noqa: SIM905
    ),
    "zh": tuple(f"{month}月" for month in range(1, 13)),
}
#: Of a common year; questions about February say so.
_MONTH_DAYS: Sequence[int] = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_Day = tuple[int, int]
"""Month from 0, day from 1."""


def _named(name: str, words: Mapping[Language, str]) -> dict[str, object]:
    """Fields ``name_en`` and ``name_zh``."""
    return {f"{name}_{language}": words[language] for language in LANGUAGES}


def _weekday(index: int) -> Mapping[Language, str]:
    return {language: _WEEKDAYS[language][index % 7] for language in LANGUAGES}


def _month(index: int) -> Mapping[Language, str]:
    return {language: _MONTHS[language][index % 12] for language in LANGUAGES}


def _date(date: _Day) -> Mapping[Language, str]:
    month, day = date
    return {"en": f"{_MONTHS['en'][month]} {day}", "zh": f"{_MONTHS['zh'][month]}{day}日"}


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _draw_weekday(rng: Random) -> Draft:
    start, days = rng.randrange(7), rng.randrange(1, 31)
    fields = {**_named("start", _weekday(start)), "n": days, "days": _plural("day", days)}
    return Draft(f"weekday {start} {days}", fields, _weekday(start + days))


def _neighbours(rng: Random) -> tuple[str | None, _Day, _Day]:
    """A key, a date and the next one in a common year. Where a month ends is a fact to know: such dates have no key."""
    month = rng.randrange(12)
    day = rng.randint(1, _MONTH_DAYS[month])
    if day < _MONTH_DAYS[month]:
        return f"dates {month} {day}", (month, day), (month, day + 1)
    return None, (month, day), ((month + 1) % 12, 1)


def _draw_next_day(rng: Random) -> Draft:
    key, first, second = _neighbours(rng)
    return Draft(key, _named("date", _date(first)), _date(second))


def _draw_previous_day(rng: Random) -> Draft:
    key, first, second = _neighbours(rng)
    return Draft(key, _named("date", _date(second)), _date(first))


def _draw_month(rng: Random) -> Draft:
    start, months = rng.randrange(12), rng.randrange(1, 12)
    fields = {**_named("start", _month(start)), "n": months, "months": _plural("month", months)}
    return Draft(f"month {start} {months}", fields, _month(start + months))


def _draw_leap_year(rng: Random) -> Draft:
    year = rng.randrange(1900, 2100)
    # The few century years are always for training: their exception cannot be inferred from the others.
    key = f"year {year}" if year % 100 else None
    return Draft(key, {"year": year}, {"en": "yes", "zh": "是"} if isleap(year) else {"en": "no", "zh": "不是"})


def _draw_month_days(rng: Random) -> Draft:
    month = rng.randrange(12)
    return Draft(None, _named("month", _month(month)), both(_MONTH_DAYS[month]))


_WEEKDAY = phrased(
    en="""
        Which day is {n} {days} after {start_en}?
        Today is {start_en}. Which day is it in {n} {days}?
    """,
    zh="""
        {start_zh}之后 {n} 天是星期几？
        今天是{start_zh}，{n} 天后是星期几？
    """,
)
_NEXT_DAY = phrased(
    en="""
        Which date comes after {date_en} in a common year?
        In a common year, what is the day after {date_en}?
    """,
    zh="""
        平年{date_zh}的后一天是哪天？
        平年里，{date_zh}之后是哪天？
    """,
)
_PREVIOUS_DAY = phrased(
    en="""
        Which date comes before {date_en} in a common year?
        In a common year, what is the day before {date_en}?
    """,
    zh="""
        平年{date_zh}的前一天是哪天？
        平年里，{date_zh}之前是哪天？
    """,
)
_MONTH = phrased(
    en="""
        Which month is {n} {months} after {start_en}?
        It is {start_en}. Which month is it in {n} {months}?
    """,
    zh="""
        {start_zh}之后 {n} 个月是几月？
        现在是{start_zh}，{n} 个月后是几月？
    """,
)
_LEAP_YEAR = phrased(
    en="""
        Is {year} a leap year?
        Was or will {year} be a leap year?
    """,
    zh="""
        {year} 年是闰年吗？
        {year} 是不是闰年？
    """,
)
_MONTH_LENGTH = phrased(
    en="""
        How many days does {month_en} have in a common year?
        In a common year, how many days are in {month_en}?
        How many days are there in {month_en} of a common year?
        How long is {month_en} in a common year, in days?
        In a common year, {month_en} has how many days?
        Number of days in {month_en} of a common year?
    """,
    zh="""
        平年{month_zh}有多少天？
        平年的{month_zh}有几天？
        平年里，{month_zh}有多少天？
        平年里，{month_zh}是多少天？
        平年{month_zh}共有几天？
        {month_zh}在平年有多少天？
    """,
)

KINDS: Sequence[Kind] = (
    Kind("weekday", 4, _draw_weekday, _WEEKDAY, closed=True),
    Kind("next day", 2, _draw_next_day, _NEXT_DAY),
    Kind("previous day", 2, _draw_previous_day, _PREVIOUS_DAY),
    Kind("month", 2, _draw_month, _MONTH),
    Kind("leap year", 2, _draw_leap_year, _LEAP_YEAR),
    Kind("month days", 1, _draw_month_days, _MONTH_LENGTH, closed=True),
)
