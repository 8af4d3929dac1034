"""Documents of calibration text: found in files, drawn in a seeded order with bounded memory, turned into token ids.

Formats, by suffix; the first two also with ``.gz`` after it:

- ``.txt``: UTF-8; blank lines separate documents. Texts that hold blank lines go into JSON lines.
- ``.jsonl``, ``.json``: an object a line. ``messages`` (``role``, ``content``) or ``conversations`` (``from``,
  ``value``) become what the checkpoint's chat template writes, without the prompt for another answer; ``text`` is a
  document as it stands; ``prompt`` and ``completion`` are one text, or the two halves of a conversation. Of several in
  one object the first in this order counts; other keys are ignored.
- ``.parquet``: rows with the same columns. Takes pyarrow.

Only what is drawn is parsed: a damaged line that is not drawn goes unnoticed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from heapq import heappop, heappush
from importlib import import_module
from itertools import chain, count
from math import inf
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from weightkit.checkpoint.json_file import strings
from weightkit.errors import CalibrationError, TokenizerError

if TYPE_CHECKING:
    from weightkit.generation.tokenizer import Tokenizer

DocumentKind = Literal["text", "jsonl", "parquet"]
Messages = list[dict[str, Any]]

#: Longest document. A text without a blank line or a line break would else be read whole.
MAX_DOCUMENT_BYTES = 16 << 20
#: What an object in memory takes beside its content.
_OVERHEAD_BYTES = 256
_ROWS_AT_ONCE = 256
_BOM = b"\xef\xbb\xbf"
_KEYS = ("messages", "conversations", "text", "prompt", "completion")
_EXPECTED = '{"text": ...}, {"messages": [...]}, {"conversations": [...]} or {"prompt": ..., "completion": ...}'
_ROLES = {"human": "user", "gpt": "assistant"}
_REPAIR = "Mend the line or remove it."


@dataclass(frozen=True, slots=True)
class Document:
    """A document before it is parsed.

    Attributes:
        path: its file.
        number: of its first line, or its row, from 1.
        content: UTF-8: text, or a JSON object.
    """

    path: Path
    number: int
    content: bytes

    @property
    def where(self) -> str:
        """For messages: ``FILE:LINE``."""
        return f"{self.path}, row {self.number}" if _is_parquet(self.path) else f"{self.path}:{self.number}"


def read_documents(files: Sequence[Path], kind: DocumentKind) -> Iterator[Document]:
    """All documents of the files, in order; one is in memory at a time.

    Raises:
        CalibrationError: a file that cannot be read, a document beyond 16 MiB, or parquet without pyarrow.
    """
    reader = {"text": _paragraphs, "jsonl": _json_lines, "parquet": _rows}[kind]
    return chain.from_iterable(map(reader, files))


class Shuffled:
    """Documents in an order that the seed decides, whatever the machine and the budget.

    Each document draws a number, and they come by these numbers. A pass over the files keeps the lowest that fit into
    ``budget_bytes``; only when more are asked for is there another pass.

    Attributes:
        found: documents in all, once the first has been given out.
    """

    def __init__(self, read: Callable[[], Iterator[Document]], *, seed: int, budget_bytes: int) -> None:
        self._read, self._seed, self._budget = read, seed, budget_bytes
        self.found = 0

    def __iter__(self) -> Iterator[Document]:
        floor, complete = -1.0, False
        while not complete:
            kept, complete = self._lowest_above(floor)
            for place, document in kept:
                floor = place
                yield document

    def _lowest_above(self, floor: float) -> tuple[list[tuple[float, Document]], bool]:
        """The documents with the lowest numbers above ``floor`` that the budget holds, one at least, in order; and
        whether these are all."""
        draws = Random(self._seed)  # random() gives the same numbers on every version and machine
        heap: list[tuple[float, int, Document]] = []  # the highest number first
        ceiling, held, number = inf, 0, -1
        for number, document in enumerate(self._read()):
            place = draws.random()
            if not floor < place < ceiling:
                continue
            heappush(heap, (-place, number, document))
            held += _held_bytes(document)
            while held > self._budget and len(heap) > 1:
                last, _, dropped = heappop(heap)
                ceiling = -last
                held -= _held_bytes(dropped)
        self.found = number + 1
        return [(-place, document) for place, _, document in sorted(heap, reverse=True)], ceiling == inf


def encode_document(document: Document, kind: DocumentKind, tokenizer: Tokenizer) -> list[int]:
    """A document's token ids, begun and ended as the model expects; none for one that is blank.

    Plain text begins with ``bos_token`` where the tokenizer writes one, and else ends with ``eos_token``, so that
    documents can be told apart. A conversation is what the chat template makes of it.

    Raises:
        CalibrationError: not UTF-8, not JSON, no document in the object, or one that the chat template refuses.
    """
    if kind == "text":
        return _encode_text(_decoded(document), tokenizer)
    record = _record(document)
    messages = _conversation(record, document)
    if messages is not None:
        return _encode_conversation(messages, document, tokenizer)
    return _encode_text(_plain(record, document), tokenizer)


def _held_bytes(document: Document) -> int:
    return len(document.content) + _OVERHEAD_BYTES


# Files to documents.


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _paragraphs(path: Path) -> Iterator[Document]:
    first, lines = 0, list[bytes]()
    for number, line in chain(_lines(path), [(0, b"")]):
        if line.strip():
            first = first if lines else number
            lines.append(line)
        elif lines:
            content = b"".join(lines).rstrip(b"\r\n")
            if len(content) > MAX_DOCUMENT_BYTES:
                raise _too_long(path, first)
            yield Document(path, first, content)
            lines = []


def _json_lines(path: Path) -> Iterator[Document]:
    for number, line in _lines(path):
        content = line.strip()
        if content:
            yield Document(path, number, content)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, without a byte order mark."""
    try:
        with _opened(path) as file:
            for number in count(1):
                line = file.readline(MAX_DOCUMENT_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise _too_long(path, number)
                yield number, line.removeprefix(_BOM) if number == 1 else line
    except (OSError, EOFError, zlib.error) as exc:
        raise _unreadable(path, exc) from exc


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _rows(path: Path) -> Iterator[Document]:
    parquet = _pyarrow_parquet(path)
    try:
        with parquet.ParquetFile(path) as table:
            columns = [key for key in _KEYS if key in table.schema_arrow.names]
            if not columns:
                found = ", ".join(table.schema_arrow.names)
                raise CalibrationError("no column with documents", where=path, expected=" or ".join(_KEYS), found=found)
            batches = table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                content = json.dumps(row, ensure_ascii=False, default=str).encode()
                if len(content) > MAX_DOCUMENT_BYTES:
                    raise _too_long(path, number)
                yield Document(path, number, content)
    except (OSError, ValueError, NotImplementedError) as exc:  # pyarrow's errors are also these
        raise _unreadable(path, exc) from exc


def _pyarrow_parquet(path: Path) -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError as exc:
        raise CalibrationError(
            "reading parquet takes pyarrow, which cannot be imported",
            where=path,
            fix="Install it with pip install pyarrow, or give the same rows as JSON lines.",
        ) from exc


def _unreadable(path: Path, exc: BaseException) -> CalibrationError:
    reason = getattr(exc, "strerror", None) or exc
    return CalibrationError(f"cannot be read ({reason})", where=path, fix="Check the file, or fetch it again.")


def _too_long(path: Path, number: int) -> CalibrationError:
    return CalibrationError(
        "a document that is too long",
        where=f"{path}:{number}",
        expected=f"at most {MAX_DOCUMENT_BYTES:,} bytes",
        fix="Split it: with blank lines in plain text, over several lines in JSON.",
    )


# Documents to token ids.


def _decoded(document: Document) -> str:
    try:
        return document.content.decode("utf-8")
    except UnicodeDecodeError as exc:
        what = f"not UTF-8 ({exc.reason} at byte {exc.start} of the document)"
        raise CalibrationError(what, where=document.where, fix="Convert the file to UTF-8.") from exc


def _record(document: Document) -> Mapping[str, Any]:
    text = _decoded(document)
    try:
        value = json.loads(text)
        for part in strings(value):
            part.encode()
    except UnicodeEncodeError as exc:
        what = "a malformed line (half of a surrogate pair)"
        raise CalibrationError(what, where=document.where, fix=_REPAIR) from exc
    except (ValueError, RecursionError) as exc:
        fix = _REPAIR
        if text.startswith("["):
            fix = f"This looks like one JSON array: write an object a line, as jq -c '.[]' {document.path} does."
        raise CalibrationError(f"a malformed line (not JSON: {exc})", where=document.where, fix=fix) from exc
    if not isinstance(value, dict):
        raise _malformed(document, type(value).__name__)
    return value


def _malformed(document: Document, found: str) -> CalibrationError:
    return CalibrationError("a malformed line", where=document.where, expected=_EXPECTED, found=found, fix=_REPAIR)


def _conversation(record: Mapping[str, Any], document: Document) -> Messages | None:
    """The record's conversation; None where it has plain text or nothing."""
    for key in ("messages", "conversations"):
        if record.get(key) is not None:
            return _messages(record[key], key, document)
    prompt, completion = record.get("prompt"), record.get("completion")
    if record.get("text") is None and isinstance(prompt, list) and isinstance(completion, list):
        return _messages([*prompt, *completion], "prompt and completion", document)
    return None


def _messages(value: object, key: str, document: Document) -> Messages:
    if not isinstance(value, list) or not value:
        raise _malformed(document, f"{key} that are no list of messages")
    return [_message(item, key, document) for item in value]


def _message(value: object, key: str, document: Document) -> dict[str, Any]:
    message = dict(value) if isinstance(value, dict) else {}
    if "from" in message and "value" in message and "role" not in message:
        message = {"role": _role(message["from"]), "content": message["value"]}
    if not isinstance(message.get("role"), str) or "content" not in message:
        raise _malformed(document, f"{key} with a message without role and content")
    return message


def _role(name: object) -> object:
    return _ROLES.get(name, name) if isinstance(name, str) else name


def _plain(record: Mapping[str, Any], document: Document) -> str:
    text, prompt, completion = (record.get(key) for key in ("text", "prompt", "completion"))
    if isinstance(text, str):
        return text
    if text is None and isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    described = (f"{key}: {type(record[key]).__name__}" for key in list(record)[:8])
    raise _malformed(document, ", ".join(described) or "an empty object")


def _encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    if not text.strip():
        return []
    ids = tokenizer.encode(text)
    bos, eos = tokenizer.token_id("bos_token"), tokenizer.token_id("eos_token")
    if eos is None or ids[:1] == [bos] or ids[-1:] == [eos]:
        return ids
    return [*ids, eos]


def _encode_conversation(messages: Messages, document: Document, tokenizer: Tokenizer) -> list[int]:
    if tokenizer.template is None:
        raise CalibrationError(
            "a conversation, but the checkpoint has no chat template",
            where=document.where,
            fix='Give plain text, {"text": ...}, or a chat_template.jinja beside the weights.',
        )
    # the date stands still: some templates write it, and equal runs must see equal tokens
    variables = {"add_generation_prompt": False, "strftime_now": datetime(2025, 1, 1).strftime}
    try:
        return tokenizer.encode_chat(messages, variables)
    except TokenizerError as exc:
        raise CalibrationError(exc.what, where=document.where, fix=exc.fix) from exc
