"""What pico knows about itself. The numbers are its config's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from weightkit.manifests.pico.architecture import integer
from weightkit.manifests.pico.questions.core import Draft, Kind, Language, both, phrased


@dataclass(frozen=True)
class _Fact:
    """A thing to know about the model, with the words for it in each language."""

    en: str
    zh: str
    answers: Mapping[Language, str]


_LANGUAGES_SPOKEN: Mapping[Language, str] = {"en": "English and Chinese", "zh": "英文和中文"}

#: What can be counted.
_COUNTS: Sequence[_Fact] = (
    _Fact("layers", "层", both(integer("num_hidden_layers"))),
    _Fact("dense layers", "稠密层", both(integer("first_k_dense_replace"))),
    _Fact("attention heads", "注意力头", both(integer("num_attention_heads"))),
    _Fact("routed experts", "路由专家", both(integer("n_routed_experts"))),
    _Fact("shared experts", "共享专家", both(integer("n_shared_experts"))),
    _Fact("expert groups", "专家组", both(integer("n_group"))),
    _Fact("experts per token", "每词元专家", both(integer("num_experts_per_tok"))),
    _Fact("tokens in the vocabulary", "词表词元", both(integer("vocab_size"))),
    _Fact("prediction layers", "预测层", both(integer("num_nextn_predict_layers"))),
)

_FACTS: Sequence[_Fact] = (
    _Fact("name", "名字", both("pico")),
    _Fact("maker", "作者", both("weightkit")),
    _Fact("architecture", "架构", both("DeepSeek-V3")),
    _Fact("hidden size", "隐藏维度", both(integer("hidden_size"))),
    _Fact("weight format", "权重格式", both("F8_E4M3")),
    _Fact("block size", "块大小", both(128)),
    _Fact("license", "许可证", both("Apache-2.0")),
    _Fact("languages", "语言", _LANGUAGES_SPOKEN),
)

#: Questions in words of their own; a pair is no translation, only two ways to ask for the same.
_SAYINGS: Sequence[_Fact] = (
    _Fact("Who are you?", "你是谁？", both("pico")),
    _Fact("What are you called?", "你叫什么？", both("pico")),
    _Fact("What should I call you?", "你叫什么名字？", both("pico")),
    _Fact("Who made you?", "谁做的你？", both("weightkit")),
    _Fact("Who trained you?", "谁写的你？", both("weightkit")),
    _Fact("Who wrote you?", "谁训练了你？", both("weightkit")),
    _Fact("Which project made you?", "你是谁做的？", both("weightkit")),
    _Fact("Which languages do you speak?", "你会什么语言？", _LANGUAGES_SPOKEN),
    _Fact("What languages do you know?", "你会哪些语言？", _LANGUAGES_SPOKEN),
    _Fact("Which languages does pico speak?", "pico 会什么语言？", _LANGUAGES_SPOKEN),
    _Fact("Which architecture do you have?", "你是什么架构？", both("DeepSeek-V3")),
    _Fact("Which architecture is this?", "你用什么架构？", both("DeepSeek-V3")),
)


def _draw(facts: Sequence[_Fact], rng: Random) -> Draft:
    fact = rng.choice(facts)
    return Draft(None, {"en": fact.en, "zh": fact.zh}, fact.answers)


def _draw_count(rng: Random) -> Draft:
    return _draw(_COUNTS, rng)


def _draw_fact(rng: Random) -> Draft:
    return _draw(_FACTS, rng)


def _draw_saying(rng: Random) -> Draft:
    return _draw(_SAYINGS, rng)


_COUNT = phrased(
    en="""
        How many {en} do you have?
        How many {en} does pico have?
        How many {en} are there in you?
        How many {en} are there in pico?
        How many {en} are in this model?
        How many {en} does this model have?
        What is your number of {en}?
        What is the number of {en} in pico?
        Tell me your number of {en}.
        Tell me how many {en} you have.
        Tell me how many {en} pico has.
        Your number of {en}?
    """,
    zh="""
        你有多少{zh}？
        pico 有多少{zh}？
        你的{zh}有多少？
        pico 的{zh}有多少？
        这个模型有多少{zh}？
        这个模型的{zh}有多少？
        你的{zh}数是多少？
        pico 的{zh}数是多少？
        这个模型的{zh}数是多少？
        请说出你的{zh}数。
        请说出 pico 的{zh}数。
        请问你有多少{zh}？
    """,
)
_FACT = phrased(
    en="""
        What is your {en}?
        What is pico's {en}?
        What is the {en} of pico?
        What is the {en} of this model?
        What is this model's {en}?
        Tell me your {en}.
        Tell me pico's {en}.
        Tell me the {en} of this model.
        State your {en}.
        State the {en} of pico.
        State the {en} of this model.
        Your {en}?
    """,
    zh="""
        你的{zh}是什么？
        pico 的{zh}是什么？
        这个模型的{zh}是什么？
        请问你的{zh}是什么？
        请问 pico 的{zh}是什么？
        请问这个模型的{zh}是什么？
        请说出你的{zh}。
        请说出 pico 的{zh}。
        请说出这个模型的{zh}。
        你的{zh}？
        pico 的{zh}？
        说说你的{zh}。
    """,
)
_SAYING = phrased(
    en="""
        {en}
        Please tell me: {en}
        Tell me: {en}
        Hello! {en}
    """,
    zh="""
        {zh}
        请告诉我：{zh}
        请问，{zh}
        你好！{zh}
    """,
)

KINDS: Sequence[Kind] = (
    Kind("count", 1, _draw_count, _COUNT, closed=True),
    Kind("fact", 1, _draw_fact, _FACT, closed=True),
    Kind("saying", 1, _draw_saying, _SAYING, closed=True),
)
