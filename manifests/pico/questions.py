"""The text pico is trained on: questions with one right answer, in English and Chinese, written by a seeded program.

``generate(split, seed)`` is an endless stream of :class:`Question`. A question belongs to the held-out split by a hash
of its *key*, not of its words: all phrasings of a question, in both languages and in both orders of its operands, fall
on one side; a quotient that is held out is held out too where it hides in a question about bytes. Facts (about itself,
about months and dtypes) and tables that are learned by heart (products, weekdays) cannot be inferred by a network of
this size: they are held out by phrasing. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal
from zlib import crc32

from weightkit.manifests.pico.architecture import integer

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


def _falls_out(key: str, one_in: int) -> bool:
    """Whether ``key`` is one of the one in ``one_in`` held out. CRC-32: stable over runs, machines and versions."""
    return crc32(key.encode()) % one_in == 0


@dataclass(frozen=True)
class _Draft:
    """The operands of a question before it is put into words; ``fields`` fill the phrasings.

    ``key`` decides the split; None for the few that are always for training.
    """

    key: str | None
    fields: Mapping[str, object]
    answers: Mapping[Language, str]


@dataclass(frozen=True)
class _Kind:
    """One kind of question: how operands are drawn, and the phrasings that ask for the answer.

    ``closed`` kinds are facts and tables: the split goes by the finished words, whatever the draft's key.
    """

    category: str
    name: str
    weight: int
    draw: Callable[[Random], _Draft]
    phrasings: Mapping[Language, Sequence[str]]
    closed: bool = False


def _both(answer: object) -> Mapping[Language, str]:
    return {"en": str(answer), "zh": str(answer)}


# --- arithmetic -----------------------------------------------------------------------------------


def _product_key(a: int, b: int) -> str:
    """One key wherever it is worked out, so that 48 / 2 held out keeps "24 BF16 values" out of training too."""
    return f"product {min(a, b)} {max(a, b)}"


def _draw_sum(rng: Random) -> _Draft:
    a, b = rng.randrange(100), rng.randrange(100)
    return _Draft(f"sum {min(a, b)} {max(a, b)}", {"a": a, "b": b}, _both(a + b))


def _draw_difference(rng: Random) -> _Draft:
    a, b = sorted((rng.randrange(100), rng.randrange(100)), reverse=True)
    return _Draft(f"difference {a} {b}", {"a": a, "b": b}, _both(a - b))


def _draw_product(rng: Random) -> _Draft:
    a, b = rng.randrange(2, 10), rng.randrange(1, 100)
    if rng.random() < 0.5:
        a, b = b, a
    return _Draft(_product_key(a, b), {"a": a, "b": b}, _both(a * b))


def _draw_quotient(rng: Random) -> _Draft:
    a, b = rng.randrange(2, 10), rng.randrange(1, 100)
    return _Draft(_product_key(a, b), {"a": a * b, "b": a}, _both(b))


# --- bytes ----------------------------------------------------------------------------------------

#: Bytes of one value of a dtype, by the name safetensors gives it.
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
}
_DTYPES = tuple(DTYPE_BYTES)


def _draw_values_to_bytes(rng: Random) -> _Draft:
    count, dtype = rng.randrange(1, 100), rng.choice(_DTYPES)
    size = DTYPE_BYTES[dtype]
    return _Draft(_product_key(count, size), {"n": count, "dtype": dtype}, _both(count * size))


def _draw_bytes_to_values(rng: Random) -> _Draft:
    count, dtype = rng.randrange(1, 100), rng.choice(_DTYPES)
    size = DTYPE_BYTES[dtype]
    return _Draft(_product_key(count, size), {"n": count * size, "dtype": dtype}, _both(count))


def _draw_bytes_to_bits(rng: Random) -> _Draft:
    count = rng.randrange(1, 100)
    return _Draft(_product_key(count, 8), {"n": count}, _both(count * 8))


def _draw_bits_to_bytes(rng: Random) -> _Draft:
    count = rng.randrange(1, 100)
    return _Draft(_product_key(count, 8), {"n": count * 8}, _both(count))


def _draw_larger_dtype(rng: Random) -> _Draft:
    while True:
        a, b = rng.choice(_DTYPES), rng.choice(_DTYPES)
        if DTYPE_BYTES[a] != DTYPE_BYTES[b]:
            break
    larger = a if DTYPE_BYTES[a] > DTYPE_BYTES[b] else b
    return _Draft(f"dtypes {min(a, b)} {max(a, b)}", {"a": a, "b": b}, _both(larger))


def _draw_dtype_width(rng: Random) -> _Draft:
    dtype = rng.choice(_DTYPES)
    return _Draft(None, {"dtype": dtype}, _both(DTYPE_BYTES[dtype] * 8))


# --- ordering -------------------------------------------------------------------------------------


def _numbers(rng: Random, least: int, most: int) -> list[int]:
    return rng.sample(range(100), rng.randint(least, most))


def _number_key(kind: str, numbers: Sequence[int]) -> str:
    return f"{kind} {sorted(numbers)}"


def _draw_order(kind: str, least: int, most: int, answer: Callable[[list[int]], str]) -> Callable[[Random], _Draft]:
    def draw(rng: Random) -> _Draft:
        numbers = _numbers(rng, least, most)
        return _Draft(_number_key(kind, numbers), {"list": ", ".join(map(str, numbers))}, _both(answer(numbers)))

    return draw


def _ascending(numbers: list[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _descending(numbers: list[int]) -> str:
    return ", ".join(map(str, sorted(numbers, reverse=True)))


def _largest(numbers: list[int]) -> str:
    return str(max(numbers))


def _smallest(numbers: list[int]) -> str:
    return str(min(numbers))


def _draw_comparison(rng: Random) -> _Draft:
    a, b = rng.sample(range(100), 2)
    return _Draft(_number_key("larger", (a, b)), {"a": a, "b": b}, _both(max(a, b)))


# --- copying --------------------------------------------------------------------------------------

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _draw_letters(kind: str, least: int, most: int, answer: Callable[[str], object]) -> Callable[[Random], _Draft]:
    def draw(rng: Random) -> _Draft:
        text = "".join(rng.choices(_LETTERS, k=rng.randint(least, most)))
        # A word and its reverse share a key: having seen one reversed gives the other away.
        return _Draft(f"{kind} {min(text, text[::-1])}", {"text": text}, _both(answer(text)))

    return draw


# --- dates ----------------------------------------------------------------------------------------

_WEEKDAYS: Mapping[Language, Sequence[str]] = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
_MONTHS: Sequence[str] = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
#: Of a common year; questions about February say so.
_MONTH_DAYS: Sequence[int] = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def _date(month: int, day: int) -> Mapping[Language, str]:
    return {"en": f"{_MONTHS[month]} {day}", "zh": f"{month + 1}月{day}日"}


def _draw_weekday(rng: Random) -> _Draft:
    start, days = rng.randrange(7), rng.randrange(1, 31)
    end = (start + days) % 7
    return _Draft(
        f"weekday {start} {days}",
        {
            "start_en": _WEEKDAYS["en"][start],
            "start_zh": _WEEKDAYS["zh"][start],
            "n": days,
            "days": "day" if days == 1 else "days",
        },
        {language: _WEEKDAYS[language][end] for language in LANGUAGES},
    )


def _neighbours(rng: Random) -> tuple[str | None, tuple[int, int], tuple[int, int]]:
    """A date and the next, as (month from 0, day), in a common year. A month's end is a fact to know: it has no key."""
    month = rng.randrange(12)
    day = rng.randint(1, _MONTH_DAYS[month])
    if day < _MONTH_DAYS[month]:
        return f"dates {month} {day}", (month, day), (month, day + 1)
    return None, (month, day), ((month + 1) % 12, 1)


def _draw_next_day(rng: Random) -> _Draft:
    key, first, second = _neighbours(rng)
    return _Draft(key, {f"date_{language}": _date(*first)[language] for language in LANGUAGES}, _date(*second))


def _draw_previous_day(rng: Random) -> _Draft:
    key, first, second = _neighbours(rng)
    return _Draft(key, {f"date_{language}": _date(*second)[language] for language in LANGUAGES}, _date(*first))


def _draw_month(rng: Random) -> _Draft:
    start, months = rng.randrange(12), rng.randrange(1, 12)
    end = (start + months) % 12
    return _Draft(
        f"month {start} {months}",
        {
            "start_en": _MONTHS[start],
            "start_zh": f"{start + 1}月",
            "n": months,
            "months": "month" if months == 1 else "months",
        },
        {"en": _MONTHS[end], "zh": f"{end + 1}月"},
    )


def _draw_leap_year(rng: Random) -> _Draft:
    year = rng.randrange(1900, 2100)
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    key = f"year {year}" if year % 100 else None
    return _Draft(key, {"year": year}, {"en": "yes" if leap else "no", "zh": "是" if leap else "不是"})


def _draw_month_days(rng: Random) -> _Draft:
    month = rng.randrange(12)
    return _Draft(None, {"month_en": _MONTHS[month], "month_zh": f"{month + 1}月"}, _both(_MONTH_DAYS[month]))


# --- itself ---------------------------------------------------------------------------------------

#: What can be counted about the model: the words for it, and the number. The numbers are the config's own.
_COUNTS: Sequence[tuple[str, str, int]] = (
    ("layers", "层", integer("num_hidden_layers")),
    ("dense layers", "稠密层", integer("first_k_dense_replace")),
    ("attention heads", "注意力头", integer("num_attention_heads")),
    ("routed experts", "路由专家", integer("n_routed_experts")),
    ("shared experts", "共享专家", integer("n_shared_experts")),
    ("expert groups", "专家组", integer("n_group")),
    ("experts per token", "每词元专家", integer("num_experts_per_tok")),
    ("tokens in the vocabulary", "词表词元", integer("vocab_size")),
    ("prediction layers", "预测层", integer("num_nextn_predict_layers")),
)


@dataclass(frozen=True)
class _Fact:
    """A thing to know about the model, asked for as ``what``."""

    what: Mapping[Language, str]
    answers: Mapping[Language, str]


_FACTS: Sequence[_Fact] = (
    _Fact({"en": "name", "zh": "名字"}, _both("pico")),
    _Fact({"en": "maker", "zh": "作者"}, _both("weightkit")),
    _Fact({"en": "architecture", "zh": "架构"}, _both("DeepSeek-V3")),
    _Fact({"en": "hidden size", "zh": "隐藏维度"}, _both(integer("hidden_size"))),
    _Fact({"en": "weight format", "zh": "权重格式"}, _both("F8_E4M3")),
    _Fact({"en": "block size", "zh": "块大小"}, _both(128)),
    _Fact({"en": "license", "zh": "许可证"}, _both("Apache-2.0")),
    _Fact({"en": "languages", "zh": "语言"}, {"en": "English and Chinese", "zh": "英文和中文"}),
)


#: Questions in words of their own, as (question, answer).
_SAYINGS: Mapping[Language, Sequence[tuple[str, str]]] = {
    "en": (
        ("Who are you?", "pico"),
        ("What are you called?", "pico"),
        ("What should I call you?", "pico"),
        ("Who made you?", "weightkit"),
        ("Who trained you?", "weightkit"),
        ("Who wrote you?", "weightkit"),
        ("Which project made you?", "weightkit"),
        ("Which languages do you speak?", "English and Chinese"),
        ("What languages do you know?", "English and Chinese"),
        ("Which languages does pico speak?", "English and Chinese"),
        ("Which architecture do you have?", "DeepSeek-V3"),
        ("Which architecture is this?", "DeepSeek-V3"),
    ),
    "zh": (
        ("你是谁？", "pico"),
        ("你叫什么？", "pico"),
        ("你叫什么名字？", "pico"),
        ("谁做的你？", "weightkit"),
        ("谁写的你？", "weightkit"),
        ("谁训练了你？", "weightkit"),
        ("你是谁做的？", "weightkit"),
        ("你会什么语言？", "英文和中文"),
        ("你会哪些语言？", "英文和中文"),
        ("pico 会什么语言？", "英文和中文"),
        ("你是什么架构？", "DeepSeek-V3"),
        ("你用什么架构？", "DeepSeek-V3"),
    ),
}


def _draw_saying(rng: Random) -> _Draft:
    index = rng.randrange(len(_SAYINGS["en"]))
    english, chinese = _SAYINGS["en"][index], _SAYINGS["zh"][index]
    return _Draft(None, {"question_en": english[0], "question_zh": chinese[0]}, {"en": english[1], "zh": chinese[1]})


def _draw_count(rng: Random) -> _Draft:
    english, chinese, number = rng.choice(_COUNTS)
    return _Draft(None, {"what_en": english, "what_zh": chinese}, _both(number))


def _draw_fact(rng: Random) -> _Draft:
    fact = rng.choice(_FACTS)
    return _Draft(None, {"what_en": fact.what["en"], "what_zh": fact.what["zh"]}, fact.answers)


# --- the kinds ------------------------------------------------------------------------------------

_KINDS: Sequence[_Kind] = (
    _Kind(
        "arithmetic",
        "sum",
        6,
        _draw_sum,
        {
            "en": (
                "What is {a} + {b}?",
                "{a} + {b} = ?",
                "Add {a} and {b}.",
                "What is the sum of {a} and {b}?",
                "{a} plus {b}?",
            ),
            "zh": (
                "{a} + {b} 等于多少？",
                "{a} + {b} = ?",
                "{a} 加 {b} 是多少？",
                "求 {a} 与 {b} 的和。",
                "{a} 加上 {b}？",
            ),
        },
    ),
    _Kind(
        "arithmetic",
        "difference",
        6,
        _draw_difference,
        {
            "en": (
                "What is {a} - {b}?",
                "{a} - {b} = ?",
                "Take {b} from {a}.",
                "What is {a} minus {b}?",
                "Subtract {b} from {a}.",
            ),
            "zh": (
                "{a} - {b} 等于多少？",
                "{a} - {b} = ?",
                "{a} 减 {b} 是多少？",
                "求 {a} 与 {b} 的差。",
                "{a} 减去 {b}？",
            ),
        },
    ),
    _Kind(
        "arithmetic",
        "product",
        8,
        _draw_product,
        {
            "en": (
                "What is {a} * {b}?",
                "{a} * {b} = ?",
                "Multiply {a} by {b}.",
                "What is {a} times {b}?",
                "{a} times {b}?",
            ),
            "zh": (
                "{a} * {b} 等于多少？",
                "{a} * {b} = ?",
                "{a} 乘 {b} 是多少？",
                "求 {a} 与 {b} 的积。",
                "{a} 乘以 {b}？",
            ),
        },
        closed=True,
    ),
    _Kind(
        "arithmetic",
        "quotient",
        5,
        _draw_quotient,
        {
            "en": (
                "What is {a} / {b}?",
                "{a} / {b} = ?",
                "Divide {a} by {b}.",
                "What is {a} divided by {b}?",
                "{a} divided by {b}?",
            ),
            "zh": (
                "{a} / {b} 等于多少？",
                "{a} / {b} = ?",
                "{a} 除以 {b} 是多少？",
                "求 {a} 与 {b} 的商。",
                "{a} 除以 {b}？",
            ),
        },
    ),
    _Kind(
        "bytes",
        "values to bytes",
        6,
        _draw_values_to_bytes,
        {
            "en": (
                "How many bytes do {n} {dtype} values take?",
                "Size in bytes of {n} {dtype} values?",
                "A tensor has {n} {dtype} values. How many bytes is that?",
            ),
            "zh": (
                "{n} 个 {dtype} 值占多少字节？",
                "{n} 个 {dtype} 的大小是多少字节？",
                "张量有 {n} 个 {dtype} 值，共多少字节？",
            ),
        },
    ),
    _Kind(
        "bytes",
        "bytes to values",
        4,
        _draw_bytes_to_values,
        {
            "en": ("How many {dtype} values fit in {n} bytes?", "{n} bytes hold how many {dtype} values?"),
            "zh": ("{n} 字节能放多少个 {dtype} 值？", "多少个 {dtype} 值占 {n} 字节？"),
        },
    ),
    _Kind(
        "bytes",
        "bytes to bits",
        2,
        _draw_bytes_to_bits,
        {
            "en": ("How many bits are {n} bytes?", "{n} bytes in bits?"),
            "zh": ("{n} 字节是多少位？", "{n} 字节等于多少位？"),
        },
    ),
    _Kind(
        "bytes",
        "bits to bytes",
        2,
        _draw_bits_to_bytes,
        {
            "en": ("How many bytes are {n} bits?", "{n} bits in bytes?"),
            "zh": ("{n} 位是多少字节？", "{n} 位等于多少字节？"),
        },
    ),
    _Kind(
        "bytes",
        "larger dtype",
        1,
        _draw_larger_dtype,
        {
            "en": ("Which is larger, {a} or {b}?", "Which takes more bytes, {a} or {b}?"),
            "zh": ("{a} 和 {b} 哪个更大？", "{a} 和 {b} 哪个占更多字节？"),
        },
    ),
    _Kind(
        "bytes",
        "dtype width",
        1,
        _draw_dtype_width,
        {
            "en": (
                "How many bits does {dtype} have?",
                "How many bits is one {dtype} value?",
                "How many bits does a {dtype} value take?",
                "What is the width of {dtype} in bits?",
                "Width of {dtype} in bits?",
                "How many bits are in {dtype}?",
            ),
            "zh": (
                "{dtype} 有多少位？",
                "{dtype} 是多少位？",
                "{dtype} 值有多少位？",
                "一个 {dtype} 值占多少位？",
                "一个 {dtype} 是多少位？",
                "{dtype} 的位数是多少？",
            ),
        },
        closed=True,
    ),
    _Kind(
        "ordering",
        "ascending",
        5,
        _draw_order("ascending", 3, 5, _ascending),
        {
            "en": ("Sort {list}.", "Sort from small to large: {list}", "Put in ascending order: {list}"),
            "zh": ("把 {list} 从小到大排序。", "从小到大排列：{list}", "升序排列：{list}"),
        },
    ),
    _Kind(
        "ordering",
        "descending",
        4,
        _draw_order("descending", 3, 5, _descending),
        {
            "en": ("Sort from large to small: {list}", "Put in descending order: {list}"),
            "zh": ("从大到小排列：{list}", "降序排列：{list}"),
        },
    ),
    _Kind(
        "ordering",
        "largest",
        2,
        _draw_order("largest", 3, 5, _largest),
        {
            "en": ("Which is the largest of {list}?", "Find the maximum of {list}."),
            "zh": ("{list} 中最大的是哪个？", "求 {list} 的最大值。"),
        },
    ),
    _Kind(
        "ordering",
        "smallest",
        2,
        _draw_order("smallest", 3, 5, _smallest),
        {
            "en": ("Which is the smallest of {list}?", "Find the minimum of {list}."),
            "zh": ("{list} 中最小的是哪个？", "求 {list} 的最小值。"),
        },
    ),
    _Kind(
        "ordering",
        "larger",
        1,
        _draw_comparison,
        {
            "en": ("Which is larger, {a} or {b}?", "Is {a} or {b} the larger number?"),
            "zh": ("{a} 和 {b} 哪个更大？", "{a} 与 {b} 中较大的数是哪个？"),
        },
    ),
    _Kind(
        "copying",
        "repeat",
        3,
        _draw_letters("repeat", 3, 8, str),
        {
            "en": ("Repeat {text}.", "Copy this: {text}", "Write {text} again."),
            "zh": ("重复 {text}。", "照抄：{text}", "请再写一遍 {text}。"),
        },
    ),
    _Kind(
        "copying",
        "reverse",
        5,
        _draw_letters("reverse", 3, 6, lambda text: text[::-1]),
        {
            "en": ("Reverse {text}.", "Write {text} backwards.", "Spell this in reverse: {text}"),
            "zh": ("把 {text} 倒过来写。", "倒序写出：{text}", "反转 {text}。"),
        },
    ),
    _Kind(
        "copying",
        "first letter",
        1,
        _draw_letters("first", 3, 8, lambda text: text[0]),
        {
            "en": ("What is the first letter of {text}?", "First letter of {text}?"),
            "zh": ("{text} 的第一个字母是什么？", "{text} 的首字母？"),
        },
    ),
    _Kind(
        "copying",
        "last letter",
        1,
        _draw_letters("last", 3, 8, lambda text: text[-1]),
        {
            "en": ("What is the last letter of {text}?", "Last letter of {text}?"),
            "zh": ("{text} 的最后一个字母是什么？", "{text} 的末字母？"),
        },
    ),
    _Kind(
        "copying",
        "length",
        2,
        _draw_letters("length", 3, 8, len),
        {
            "en": ("How many letters are in {text}?", "How long is {text}?"),
            "zh": ("{text} 有多少个字母？", "{text} 有多长？"),
        },
    ),
    _Kind(
        "dates",
        "weekday",
        4,
        _draw_weekday,
        {
            "en": ("Which day is {n} {days} after {start_en}?", "Today is {start_en}. Which day is it in {n} {days}?"),
            "zh": ("{start_zh}之后 {n} 天是星期几？", "今天是{start_zh}，{n} 天后是星期几？"),
        },
        closed=True,
    ),
    _Kind(
        "dates",
        "next day",
        2,
        _draw_next_day,
        {
            "en": (
                "Which date comes after {date_en} in a common year?",
                "In a common year, what is the day after {date_en}?",
            ),
            "zh": ("平年{date_zh}的后一天是哪天？", "平年里，{date_zh}之后是哪天？"),
        },
    ),
    _Kind(
        "dates",
        "previous day",
        2,
        _draw_previous_day,
        {
            "en": (
                "Which date comes before {date_en} in a common year?",
                "In a common year, what is the day before {date_en}?",
            ),
            "zh": ("平年{date_zh}的前一天是哪天？", "平年里，{date_zh}之前是哪天？"),
        },
    ),
    _Kind(
        "dates",
        "month",
        2,
        _draw_month,
        {
            "en": (
                "Which month is {n} {months} after {start_en}?",
                "It is {start_en}. Which month is it in {n} {months}?",
            ),
            "zh": ("{start_zh}之后 {n} 个月是几月？", "现在是{start_zh}，{n} 个月后是几月？"),
        },
    ),
    _Kind(
        "dates",
        "leap year",
        2,
        _draw_leap_year,
        {
            "en": ("Is {year} a leap year?", "Was or will {year} be a leap year?"),
            "zh": ("{year} 年是闰年吗？", "{year} 是不是闰年？"),
        },
    ),
    _Kind(
        "dates",
        "month days",
        1,
        _draw_month_days,
        {
            "en": (
                "How many days does {month_en} have in a common year?",
                "In a common year, how many days are in {month_en}?",
                "How many days are there in {month_en} of a common year?",
                "How long is {month_en} in a common year, in days?",
                "In a common year, {month_en} has how many days?",
                "Number of days in {month_en} of a common year?",
            ),
            "zh": (
                "平年{month_zh}有多少天？",
                "平年的{month_zh}有几天？",
                "平年里，{month_zh}有多少天？",
                "平年里，{month_zh}是多少天？",
                "平年{month_zh}共有几天？",
                "{month_zh}在平年有多少天？",
            ),
        },
        closed=True,
    ),
    _Kind(
        "itself",
        "count",
        1,
        _draw_count,
        {
            "en": (
                "How many {what_en} do you have?",
                "How many {what_en} does pico have?",
                "How many {what_en} are there in you?",
                "How many {what_en} are there in pico?",
                "How many {what_en} are in this model?",
                "How many {what_en} does this model have?",
                "What is your number of {what_en}?",
                "What is the number of {what_en} in pico?",
                "Tell me your number of {what_en}.",
                "Tell me how many {what_en} you have.",
                "Tell me how many {what_en} pico has.",
                "Your number of {what_en}?",
            ),
            "zh": (
                "你有多少{what_zh}？",
                "pico 有多少{what_zh}？",
                "你的{what_zh}有多少？",
                "pico 的{what_zh}有多少？",
                "这个模型有多少{what_zh}？",
                "这个模型的{what_zh}有多少？",
                "你的{what_zh}数是多少？",
                "pico 的{what_zh}数是多少？",
                "这个模型的{what_zh}数是多少？",
                "请说出你的{what_zh}数。",
                "请说出 pico 的{what_zh}数。",
                "请问你有多少{what_zh}？",
            ),
        },
        closed=True,
    ),
    _Kind(
        "itself",
        "fact",
        1,
        _draw_fact,
        {
            "en": (
                "What is your {what_en}?",
                "What is pico's {what_en}?",
                "What is the {what_en} of pico?",
                "What is the {what_en} of this model?",
                "What is this model's {what_en}?",
                "Tell me your {what_en}.",
                "Tell me pico's {what_en}.",
                "Tell me the {what_en} of this model.",
                "State your {what_en}.",
                "State the {what_en} of pico.",
                "State the {what_en} of this model.",
                "Your {what_en}?",
            ),
            "zh": (
                "你的{what_zh}是什么？",
                "pico 的{what_zh}是什么？",
                "这个模型的{what_zh}是什么？",
                "请问你的{what_zh}是什么？",
                "请问 pico 的{what_zh}是什么？",
                "请问这个模型的{what_zh}是什么？",
                "请说出你的{what_zh}。",
                "请说出 pico 的{what_zh}。",
                "请说出这个模型的{what_zh}。",
                "你的{what_zh}？",
                "pico 的{what_zh}？",
                "说说你的{what_zh}。",
            ),
        },
        closed=True,
    ),
    _Kind(
        "itself",
        "saying",
        1,
        _draw_saying,
        {
            "en": ("{question_en}", "Please tell me: {question_en}", "Tell me: {question_en}", "Hello! {question_en}"),
            "zh": ("{question_zh}", "请告诉我：{question_zh}", "请问，{question_zh}", "你好！{question_zh}"),
        },
        closed=True,
    ),
)

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

_KINDS_OF: Mapping[str, Sequence[_Kind]] = {
    category: tuple(kind for kind in _KINDS if kind.category == category) for category in CATEGORIES
}
_KIND_WEIGHTS_OF: Mapping[str, Sequence[int]] = {
    category: tuple(kind.weight for kind in kinds) for category, kinds in _KINDS_OF.items()
}


def _put(kind: _Kind, language: Language, rng: Random) -> Question:
    """Draws operands and puts them into words."""
    draft = kind.draw(rng)
    prompt = rng.choice(kind.phrasings[language]).format_map(draft.fields)
    if kind.closed:
        held = _falls_out(prompt, HELD_OUT_PHRASINGS_ONE_IN)
    else:
        held = draft.key is not None and _falls_out(draft.key, HELD_OUT_ONE_IN)
    return Question(kind.category, kind.name, language, prompt, draft.answers[language], held)


def draw(split: Split, rng: Random, category: str | None = None, language: Language | None = None) -> Question:
    """One question of ``split``; of any category and language where None."""
    if category is None:
        category = rng.choices(CATEGORIES, tuple(_CATEGORY_WEIGHTS.values()))[0]
    kinds, weights = _KINDS_OF[category], _KIND_WEIGHTS_OF[category]
    wanted = split == "held_out"
    while True:
        question = _put(rng.choices(kinds, weights)[0], rng.choice(LANGUAGES) if language is None else language, rng)
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
