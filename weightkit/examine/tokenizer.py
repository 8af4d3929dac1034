"""A checkpoint's tokenizer and chat template, as far as files show: whether they can be read, whether each token has a
row of the embedding, whether the special tokens are tokens. Files of tiktoken and SentencePiece are not looked into."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from weightkit.checkpoint.folder import CONFIG_NAME
from weightkit.errors import CheckpointError, FormatError, WeightkitError
from weightkit.examine.loaders import TOKEN_FIELDS, listed_tokens
from weightkit.examine.sides import (
    GENERATION_NAME,
    TEMPLATE_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    TOKENIZER_NAMES,
)
from weightkit.examine.survey import attempt

#: The longest published templates have 20 KB.
MAX_TEMPLATE_BYTES = 1 << 20
_FIX = "Take the tokenizer's files, all of them, from the published repository."
#: Tags of transformers that mark the assistant's words; jinja2 does not know them.
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")

Contents = Mapping[str, Mapping[str, object]]
"""JSON files that could be read, by name."""


def tokenizer_problems(
    folder: Path, contents: Contents, vocab_size: int | None
) -> tuple[list[WeightkitError], list[str]]:
    """Defects of the tokenizer and the chat template; and what is missing or differs without being one: base models
    have no template, and some models end an answer with another token than a text.

    Args:
        vocab_size: rows of the embedding; None where they are not known.
    """
    config = contents.get(TOKENIZER_CONFIG_NAME, {})
    templates = list(_templates(folder, config))
    problems = [problem for where, source in templates if (problem := _template_problem(source, where)) is not None]
    vocabulary = _vocabulary(contents[TOKENIZER_NAME], config) if TOKENIZER_NAME in contents else {}
    if vocabulary is None:
        what, expected = "not a tokenizer", "the ids of tokens in model.vocab and added_tokens"
        problems.append(FormatError(what, where=folder / TOKENIZER_NAME, expected=expected, fix=_FIX))
    elif vocabulary:
        if vocab_size is not None:
            problems += _size_problems(vocabulary, vocab_size, folder / TOKENIZER_NAME)
        problems += _special_problems(vocabulary, folder, contents, vocab_size)
    return problems, [*_missing(folder, has_template=bool(templates)), *_differing(vocabulary or {}, contents)]


def _missing(folder: Path, *, has_template: bool) -> Iterator[str]:
    if not any((folder / name).is_file() for name in TOKENIZER_NAMES):
        yield f"no tokenizer ({', '.join(TOKENIZER_NAMES)}): weights alone generate no text"
    elif not has_template:
        yield f"no chat template, neither in {TOKENIZER_CONFIG_NAME} nor as {TEMPLATE_NAME}"


def _templates(folder: Path, config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Where each chat template stands, and what stands there, or why it cannot be read."""
    path = folder / TEMPLATE_NAME
    if path.is_file():
        yield str(path), attempt(lambda: _read_template(path), path)
    inline, where = config.get("chat_template"), f"{folder / TOKENIZER_CONFIG_NAME}: chat_template"
    if isinstance(inline, list):  # several by name
        for item in inline:
            named = item if isinstance(item, Mapping) else {}
            yield f"{where} {str(named.get('name'))[:40]!r}", named.get("template")
    elif isinstance(inline, Mapping):
        yield from ((f"{where} {name[:40]!r}", source) for name, source in inline.items())
    elif inline is not None:
        yield where, inline


def _read_template(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_TEMPLATE_BYTES + 1).decode()


def _template_problem(source: object, where: str) -> WeightkitError | None:
    if isinstance(source, WeightkitError):
        return source
    if not isinstance(source, str):
        return FormatError("a chat template that is not text", where=where, found=type(source).__name__, fix=_FIX)
    if not source.strip():
        return FormatError(
            "an empty chat template: the model would see nothing of a conversation", where=where, fix=_FIX
        )
    if len(source) > MAX_TEMPLATE_BYTES:
        return FormatError(
            "too large for a chat template", where=where, expected=f"at most {MAX_TEMPLATE_BYTES:,} bytes"
        )
    defect = _syntax_error(source)
    return (
        None if defect is None else FormatError(f"the chat template does not parse ({defect})", where=where, fix=_FIX)
    )


def _syntax_error(source: str) -> str | None:
    """Why Jinja cannot parse it. It is not compiled: that would compute constants, of whatever size."""
    import jinja2

    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION_TAG.sub("", source))
    except jinja2.TemplateSyntaxError as exc:
        return f"line {exc.lineno}: {exc.message}"
    except (ValueError, RecursionError) as exc:
        return str(exc) or "nested too deeply"
    return None


def _vocabulary(tokenizer: Mapping[str, object], config: Mapping[str, object]) -> dict[str, int] | None:
    """Token to id, added ones included; None where the files are not those of a tokenizer."""
    model, added, declared = tokenizer.get("model"), tokenizer.get("added_tokens"), config.get("added_tokens_decoder")
    listed = model.get("vocab") if isinstance(model, Mapping) else None
    try:
        if isinstance(listed, Mapping):
            tokens = {str(token): _id(number) for token, number in listed.items()}
        elif isinstance(listed, list):  # Unigram: tokens with their scores
            tokens = {str(token): number for number, (token, _) in enumerate(listed)}
        else:
            return None
        if isinstance(added, list):
            tokens.update((str(token["content"]), _id(token["id"])) for token in added)
        if isinstance(declared, Mapping):
            tokens.update((str(token["content"]), int(number)) for number, token in declared.items())
    except (KeyError, TypeError, ValueError):
        return None
    return tokens


def _id(value: object) -> int:
    if type(value) is not int:
        raise TypeError("an id that is no integer")
    return value


def _size_problems(vocabulary: Mapping[str, int], vocab_size: int, where: Path) -> Iterator[WeightkitError]:
    beyond = {token: number for token, number in vocabulary.items() if not 0 <= number < vocab_size}
    if beyond:
        token, number = max(beyond.items(), key=lambda item: item[1])
        yield CheckpointError(
            "tokens without a row in the embedding",
            where=where,
            expected=f"ids up to {vocab_size - 1}",
            found=f"{len(beyond):,} others, such as {number} of {token[:40]!r}",
            fix="Take the tokenizer of this model, or extend the embedding and vocab_size.",
        )


def _special_problems(
    vocabulary: Mapping[str, int], folder: Path, contents: Contents, vocab_size: int | None
) -> Iterator[WeightkitError]:
    """Special tokens that the tokenizer does not know, by text or by id: the text never ends, or begins wrongly."""
    for field in TOKEN_FIELDS:
        role = field.removesuffix("_id")
        text = _text_of(contents.get(TOKENIZER_CONFIG_NAME, {}).get(role))
        if text is not None and text not in vocabulary:
            yield CheckpointError(
                f"{role} is no token of {TOKENIZER_NAME}",
                where=folder / TOKENIZER_CONFIG_NAME,
                found=repr(text[:40]),
                fix=_FIX,
            )
    ids = set(vocabulary.values())
    for name in (CONFIG_NAME, GENERATION_NAME):
        for field in TOKEN_FIELDS:
            for token in listed_tokens(contents.get(name, {}), field):
                # one beyond the embedding is reported with the config
                if type(token) is int and token not in ids and (vocab_size is None or 0 <= token < vocab_size):
                    yield CheckpointError(
                        f"{field} is the id of no token in {TOKENIZER_NAME}", where=folder / name, found=token, fix=_FIX
                    )


def _differing(vocabulary: Mapping[str, int], contents: Contents) -> Iterator[str]:
    """Special tokens for which the files have no id in common."""
    for field in ("bos_token_id", "eos_token_id"):
        meant = dict(_meanings(field, vocabulary, contents))
        if meant and not frozenset.intersection(*meant.values()):
            yield f"{field} differs: " + ", ".join(f"{sorted(ids)} in {name}" for name, ids in meant.items())


def _meanings(field: str, vocabulary: Mapping[str, int], contents: Contents) -> Iterator[tuple[str, frozenset[int]]]:
    """The ids of a special token by the file that says so."""
    for name in (CONFIG_NAME, GENERATION_NAME):
        ids = frozenset(token for token in listed_tokens(contents.get(name, {}), field) if isinstance(token, int))
        if ids:
            yield name, ids
    text = _text_of(contents.get(TOKENIZER_CONFIG_NAME, {}).get(field.removesuffix("_id")))
    if text is not None and text in vocabulary:
        yield TOKENIZER_CONFIG_NAME, frozenset((vocabulary[text],))


def _text_of(token: object) -> str | None:
    """The text of a special token: written as a string, or as an object with ``content``."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None
