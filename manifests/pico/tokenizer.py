"""pico's tokenizer: byte-level BPE over its own text, with DeepSeek-V3's special tokens and chat format.

Digits, capital letters and CJK runs are separated before merging, as DeepSeek-V3 separates digits and CJK: a number is
its digits and a string of capitals is its letters, so arithmetic and copying see what they work on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from types import MappingProxyType

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from weightkit.manifests.pico.architecture import integer
from weightkit.manifests.pico.questions import draw

BOS, EOS, PAD, USER, ASSISTANT = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
BOS_ID, EOS_ID, PAD_ID, USER_ID, ASSISTANT_ID = range(5)

#: The published chat format: no space or newline anywhere, the begin token once, an end token after each answer.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '" + ASSISTANT + "' + message['content'] + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def _special(content: str) -> Mapping[str, object]:
    return {
        "__type": "AddedToken",
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }


TOKENIZER_CONFIG: Mapping[str, object] = MappingProxyType(
    {
        "add_bos_token": False,  # the chat template writes it
        "add_eos_token": False,
        "bos_token": _special(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": _special(EOS),
        "model_max_length": integer("max_position_embeddings"),
        "pad_token": _special(PAD),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
)


def prompt_text(question: str) -> str:
    """What the chat template makes of one user message, ready for the answer."""
    return f"{BOS}{USER}{question}{ASSISTANT}"


def _corpus(questions: int) -> Iterator[str]:
    """Training questions and answers. A prompt and an answer are separate texts: no merge may span them."""
    rng = Random(20)
    for _ in range(questions):
        question = draw("train", rng)
        yield question.prompt
        yield question.answer


def train_tokenizer(vocab_size: int = integer("vocab_size"), questions: int = 30_000) -> Tokenizer:
    """The tokenizer, the same on every run: trained on a seeded corpus, merges by count."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}|\p{Lu}"), "isolated"),
            pre_tokenizers.Split(Regex(r"[\u4e00-\u9fff]+"), "isolated"),
            pre_tokenizers.Split(Regex(r" ?\p{Ll}+| ?[^\s\p{L}\p{N}]|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD, USER, ASSISTANT)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(questions), trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` into ``folder``."""
    data = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(dict(TOKENIZER_CONFIG), ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
