"""Text to ids and back, and chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pytest
from small_checkpoint import BOS, EOS, TEMPLATE, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from weightkit.checkpoint.folder import SideFile
from weightkit.errors import TokenizerError
from weightkit.generation import TextStream, Tokenizer

CONFIG: dict[str, Any] = {"bos_token": {"content": BOS}, "eos_token": EOS, "add_bos_token": True}
# the shape of DeepSeek-V3's own template: namespaces, loops over messages, special tokens, control of whitespace
DEEPSEEK_LIKE = """
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='', first=true) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- if ns.first %}{% set ns.system = ns.system + message['content'] %}{% set ns.first = false %}
        {%- else %}{% set ns.system = ns.system + '\\n\\n' + message['content'] %}{% endif %}
    {%- endif %}
{%- endfor %}
{{ bos_token }}{{ ns.system }}
{% for message in messages %}
    {% if message['role'] == 'user' %}
<User>{{ message['content'] }}
    {% elif message['role'] == 'assistant' %}
        {% if message['content'] is none %}{% continue %}{% endif %}
<Assistant>{% generation %}{{ message['content'].split('</think>')[-1] }}{% endgeneration %}{{ eos_token }}
    {% endif %}
{% endfor %}
{{ {'tools': tools, 'text': '值 <b>'} | tojson }}
{% if add_generation_prompt %}<Assistant>{% endif %}"""
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "6 乘 7？"},
    {"role": "assistant", "content": "<think>hm</think>42"},
    {"role": "user", "content": "Sure?"},
]


def side_files(config: Mapping[str, Any] | None = None, **others: str) -> dict[str, SideFile]:
    texts = {
        "tokenizer.json": byte_tokenizer().to_str(),
        "tokenizer_config.json": json.dumps(config or CONFIG),
        **others,
    }
    return {name: SideFile(content=text.encode()) for name, text in texts.items()}


def with_template(source: str) -> Tokenizer:
    return Tokenizer.from_side_files(side_files({**CONFIG, "chat_template": source}), "here")


def test_text_goes_there_and_back() -> None:
    tokenizer = Tokenizer.from_side_files(side_files(), "here")
    text = "Bytes: 688,574,839,360; 权重 🎲"
    ids = tokenizer.encode(text)
    assert ids[0] == 256
    assert tokenizer.decode(ids) == text  # without the special token


def test_bos_is_not_doubled() -> None:
    tokenizer = Tokenizer.from_side_files(side_files(), "here")
    assert tokenizer.encode(f"{BOS}a") == tokenizer.encode("a")
    no_bos = Tokenizer.from_side_files(side_files({**CONFIG, "add_bos_token": False}), "here")
    assert no_bos.encode("a") == tokenizer.encode("a")[1:]


def test_stream_gives_whole_characters_only() -> None:
    tokenizer = Tokenizer.from_side_files(side_files(), "here")
    text = "权 is 3 bytes, 🎲 four"
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(text)[1:]
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[:4] == ["", "", "权", " "]


def test_stream_gives_up_on_bytes_that_are_no_text() -> None:
    """Random weights write such bytes; held for ever, they would hide everything after them."""
    tokenizer = Tokenizer.from_side_files(side_files(), "here")
    start = tokenizer.encode("权")[1]  # the first of three bytes, again and again
    stream = TextStream(tokenizer)
    assert "".join(stream.push(start) for _ in range(40))
    stream = TextStream(tokenizer)
    assert stream.push(start) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("source", [TEMPLATE, DEEPSEEK_LIKE], ids=["plain", "deepseek-like"])
def test_templates_render_as_in_transformers(source: str) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token=BOS, eos_token=EOS)
    theirs.chat_template = source
    expected = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    ours = with_template(source)
    assert ours.render(CONVERSATION) == expected
    ids = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(CONVERSATION) == ids


def test_template_file_goes_before_the_one_in_the_config() -> None:
    files = side_files({**CONFIG, "chat_template": "config"}, **{"chat_template.jinja": "file"})
    assert Tokenizer.from_side_files(files, "here").render([]) == "file"


def test_default_of_several_named_templates() -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert with_template(named).render([]) == "plain"  # type: ignore[arg-type]


def test_variables_reach_the_template() -> None:
    tokenizer = with_template("{% if thinking %}<think>{% else %}</think>{% endif %}")
    assert tokenizer.render([]) == "</think>"
    assert tokenizer.render([], {"thinking": True}) == "<think>"


def test_strftime_now() -> None:
    assert with_template("{{ strftime_now('%Y') }}").render([]) in {str(datetime.now().year + i) for i in (-1, 0)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "does not parse"),
        ("{{ messages[0].content.split(1) }}", "refused these messages"),
        ("{{ ''.__class__.__mro__ }}", "refused these messages"),  # the sandbox
        ("{{ messages.append(1) }}", "refused these messages"),  # immutable
    ],
)
def test_failing_templates_are_named(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        with_template(source).render([{"role": "user", "content": "a"}])


def test_conversation_without_template_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        Tokenizer.from_side_files(side_files(), "here").render(CONVERSATION)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"here: no tokenizer\.json"),
        ({"tiktoken.model": SideFile(content=b"IQ== 0\n")}, "only a tiktoken vocabulary.*found tiktoken.model"),
        ({"tokenizer.json": SideFile(content=b"{}")}, r"tokenizer\.json: not a tokenizer"),
        ({"tokenizer.json": SideFile(content=b"\xff")}, "cannot be read as UTF-8"),
        ({**side_files(), "tokenizer_config.json": SideFile(content=b"{")}, r"tokenizer_config\.json: not JSON"),
        ({**side_files(), "tokenizer_config.json": SideFile(content=b"[]")}, "not a JSON object"),
    ],
)
def test_missing_and_damaged_files_are_named(files: dict[str, SideFile], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_side_files(files, "here")
