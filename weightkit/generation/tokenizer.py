"""Text to token ids and back: ``tokenizer.json``, the special tokens, and the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightkit.errors import TokenizerError
from weightkit.generation.template import render_template
from weightkit.remote.path import as_path

if TYPE_CHECKING:
    import tokenizers

    from weightkit.checkpoint.folder import SideFile

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"

Messages = Sequence[Mapping[str, Any]]
"""A conversation: ``{"role": "user", "content": "..."}`` and so on, as chat templates read it."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_REPLACEMENT = "\ufffd"
_LONGEST_HOLD = 8  # a character is at most four bytes, so four tokens; what stays broken for longer is broken text


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        where: the folder, for messages.
        special_tokens: ``bos_token``, ``eos_token``, ... to their text.
        template: the chat template's source, or None.
        add_bos: whether plain text starts with ``bos_token``.
    """

    where: str
    core: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    template: str | None
    add_bos: bool

    @classmethod
    def from_side_files(cls, side_files: Mapping[str, SideFile], where: object) -> Tokenizer:
        """The tokenizer among a checkpoint's side files.

        Raises:
            TokenizerError: no ``tokenizer.json``, or files that are damaged.
        """
        files = _Files(side_files, str(where))
        core = _load_core(files)
        config = files.json_object(TOKENIZER_CONFIG_NAME)
        return cls(
            where=str(where),
            core=core,
            special_tokens=_special_tokens(config),
            template=_template(files, config),
            add_bos=config.get("add_bos_token") is True,
        )

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, after ``bos_token`` where the tokenizer's config asks for it."""
        ids: list[int] = self.core.encode(text, add_special_tokens=True).ids
        bos = self.token_id("bos_token") if self.add_bos else None
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def encode_chat(self, messages: Messages, variables: Mapping[str, object] | None = None) -> list[int]:
        """The ids of a conversation, ready for the model's answer.

        Args:
            messages: the conversation.
            variables: for the template, such as ``thinking`` of V3.1.

        Raises:
            TokenizerError: there is no template, or it raised.
        """
        ids: list[int] = self.core.encode(self.render(messages, variables), add_special_tokens=False).ids
        return ids

    def render(self, messages: Messages, variables: Mapping[str, object] | None = None) -> str:
        """The conversation as the chat template writes it. Raises as ``encode_chat``."""
        if self.template is None:
            raise TokenizerError(
                "there is no chat template",
                where=self.where,
                expected=f"{TEMPLATE_NAME}, or chat_template in {TOKENIZER_CONFIG_NAME}",
                fix="Generate from plain text instead of a conversation.",
            )
        known = {**self.special_tokens, "messages": list(messages), "add_generation_prompt": True}
        return render_template(self.template, {**known, **(variables or {})}, where=self.where)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        text: str = self.core.decode(list(ids), skip_special_tokens=True)
        return text

    def token_id(self, role: str) -> int | None:
        """The id of a special token by its role, such as ``eos_token``."""
        text = self.special_tokens.get(role)
        found: int | None = None if text is None else self.core.token_to_id(text)
        return found


class TextStream:
    """Ids one at a time to pieces of text that are whole: no half of a character is ever given out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # decoding starts at a token whose text is out, because some decoders treat the first token apart
        self._start = 0
        self._done = 0  # ids whose text is out

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._pending()
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._done < _LONGEST_HOLD:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """What is still held, with U+FFFD for bytes that never became a character."""
        return self._emit(self._pending())

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._done])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]

    def _emit(self, text: str) -> str:
        if text:
            self._start, self._done = self._done, len(self._ids)
        return text


class _Files:
    """Side files by name, with errors that say which."""

    def __init__(self, files: Mapping[str, SideFile], where: str) -> None:
        self.files = files
        self.where = where

    def path(self, name: str) -> str:
        return str(as_path(self.where) / name)

    def text(self, name: str) -> str | None:
        """A file's text; None where there is no such file."""
        if name not in self.files:
            return None
        try:
            return self.files[name].read().decode("utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise TokenizerError(f"cannot be read as UTF-8 ({exc})", where=self.path(name)) from exc

    def json_object(self, name: str) -> dict[str, Any]:
        """A JSON file's object; empty where there is no such file."""
        text = self.text(name)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise TokenizerError(f"not JSON ({exc})", where=self.path(name)) from exc
        if not isinstance(value, dict):
            raise TokenizerError("not a JSON object", where=self.path(name), found=type(value).__name__)
        return value


def _load_core(files: _Files) -> tokenizers.Tokenizer:
    import tokenizers

    text = files.text(TOKENIZER_NAME)
    if text is None:
        tiktoken = sorted(name for name in files.files if name.endswith((".tiktoken", "tiktoken.model")))
        raise TokenizerError(
            f"no {TOKENIZER_NAME}"
            + (", only a tiktoken vocabulary, which weightkit does not read" if tiktoken else ""),
            where=files.where,
            expected=TOKENIZER_NAME,
            found=", ".join(tiktoken) or None,
            fix=f"Put a {TOKENIZER_NAME} for this model beside its weights"
            + (" (transformers converts tiktoken vocabularies)" if tiktoken else "")
            + ", or give the prompt as token ids.",
        )
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as exc:  # the library raises bare Exception
        raise TokenizerError(f"not a tokenizer ({exc})", where=files.path(TOKENIZER_NAME)) from exc


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens: written as strings, or as objects with ``content``."""
    return {role: text for role in _SPECIAL_TOKENS for text in _texts(config.get(role))}


def _texts(value: object) -> Iterator[str]:
    content = value.get("content") if isinstance(value, Mapping) else value
    if isinstance(content, str):
        yield content


def _template(files: _Files, config: Mapping[str, Any]) -> str | None:
    """The chat template: its own file, else the config's, of which there may be several by name."""
    own = files.text(TEMPLATE_NAME)
    if own is not None:
        return own
    inline = config.get("chat_template")
    if isinstance(inline, list):
        inline = {
            item["name"]: item["template"]
            for item in inline
            if isinstance(item, dict) and {"name", "template"} <= {*item}
        }
    if isinstance(inline, dict):
        inline = inline.get("default")
    if inline is not None and not isinstance(inline, str):
        found = type(inline).__name__
        raise TokenizerError("chat_template is not text", where=files.path(TOKENIZER_CONFIG_NAME), found=found)
    return inline
