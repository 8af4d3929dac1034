"""pico's questions: answers checked by other means than the generator's, and a split that leaks nothing."""

from __future__ import annotations

import datetime
import re
from itertools import islice

import pytest

from weightkit.manifests.pico.questions import CATEGORIES, LANGUAGES, Question, generate, held_out

SAMPLE = 12_000


@pytest.fixture(scope="module")
def training() -> list[Question]:
    return list(islice(generate("train", 7), SAMPLE))


@pytest.fixture(scope="module")
def reserved() -> list[Question]:
    return held_out(7, 200)


def numbers(question: Question) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", re.sub(r"[A-Z]+\d+(_E\dM\d)?", "", question.prompt))]


def of_kind(questions: list[Question], kind: str) -> list[Question]:
    found = [question for question in questions if question.kind == kind]
    assert found, kind
    return found


def test_the_same_seed_writes_the_same_questions() -> None:
    assert list(islice(generate("train", 3), 500)) == list(islice(generate("train", 3), 500))
    assert list(islice(generate("train", 3), 500)) != list(islice(generate("train", 4), 500))


def test_held_out_questions_never_occur_in_training(training: list[Question], reserved: list[Question]) -> None:
    assert not {question.prompt for question in training} & {question.prompt for question in reserved}
    assert all(question.is_held_out for question in reserved)
    assert not any(question.is_held_out for question in training)


def test_operands_held_out_are_held_out_in_every_order_and_language(training: list[Question]) -> None:
    seen = {tuple(sorted(numbers(question))) for question in of_kind(training, "sum")}
    for question in of_kind(held_out(8, 400), "sum"):
        assert tuple(sorted(numbers(question))) not in seen


def test_a_quotient_held_out_is_not_taught_as_bytes(training: list[Question], reserved: list[Question]) -> None:
    def operands(question: Question) -> tuple[int, int]:
        dividend, divisor = numbers(question)
        return divisor, dividend // divisor

    quotients = {tuple(sorted(operands(question))) for question in of_kind(reserved, "quotient")}
    bits = {tuple(sorted((*numbers(question), 8))) for question in of_kind(training, "bytes to bits")}
    assert any(8 in pair for pair in quotients)
    assert not quotients & bits


def test_each_category_and_language_is_asked(reserved: list[Question]) -> None:
    assert {(question.category, question.language) for question in reserved} == {
        (category, language) for category in CATEGORIES for language in LANGUAGES
    }


def test_arithmetic_is_right(training: list[Question], reserved: list[Question]) -> None:
    both = training + reserved
    for question in of_kind(both, "sum"):
        assert sum(numbers(question)) == int(question.answer)
    for question in of_kind(both, "difference"):
        a, b = sorted(numbers(question))
        assert b - a == int(question.answer)
    for question in of_kind(both, "product"):
        a, b = numbers(question)
        assert a * b == int(question.answer)
    for question in of_kind(both, "quotient"):
        a, b = numbers(question)
        assert a == b * int(question.answer)


def test_bytes_are_right(training: list[Question]) -> None:
    import torch

    sizes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
    }

    def names(question: Question) -> list[str]:
        return re.findall(r"BF16|F8_E\dM\d|[FIU]\d+", question.prompt)

    for question in of_kind(training, "values to bytes"):
        assert numbers(question)[0] * sizes[names(question)[0]].itemsize == int(question.answer)
    for question in of_kind(training, "bytes to values"):
        assert numbers(question)[0] == sizes[names(question)[0]].itemsize * int(question.answer)
    for question in of_kind(training, "dtype width"):
        assert sizes[names(question)[0]].itemsize * 8 == int(question.answer)
    for question in of_kind(training, "larger dtype"):
        assert question.answer == max(names(question), key=lambda name: sizes[name].itemsize)


def test_order_and_copies_are_right(training: list[Question]) -> None:
    for question in of_kind(training, "ascending"):
        assert question.answer == ", ".join(map(str, sorted(numbers(question))))
    for question in of_kind(training, "descending"):
        assert question.answer == ", ".join(map(str, sorted(numbers(question), reverse=True)))
    for question in of_kind(training, "larger"):
        assert int(question.answer) == max(numbers(question))
    for question in of_kind(training, "reverse"):
        assert question.answer[::-1] in question.prompt
    for question in of_kind(training, "repeat"):
        assert question.answer in question.prompt


def test_dates_are_right(training: list[Question]) -> None:
    weekdays = [datetime.date(2024, 1, day).strftime("%A") for day in range(1, 8)]
    for question in of_kind(training, "weekday"):
        if question.language == "en":
            start = next(day for day in weekdays if day in question.prompt)
            end = datetime.date(2024, 1, 1 + weekdays.index(start)) + datetime.timedelta(days=numbers(question)[0])
            assert question.answer == end.strftime("%A")
    for kind, days in (("next day", 1), ("previous day", -1)):
        for question in of_kind(training, kind):
            if question.language == "zh":
                month, day = numbers(question)
                date = datetime.date(2023, month, day) + datetime.timedelta(days=days)
                assert question.answer == f"{date.month}月{date.day}日"
    for question in of_kind(training, "leap year"):
        year = numbers(question)[0]
        leap = (datetime.date(year + 1, 1, 1) - datetime.date(year, 1, 1)).days == 366
        assert question.answer == ({"en": "yes", "zh": "是"} if leap else {"en": "no", "zh": "不是"})[question.language]
