"""The tokens that GPTQ is calibrated with: from text, conversations or token ids to an array [samples, seq_len].

Documents come in an order that the seed decides, are tokenized, and are laid end to end; the stream is cut every
``seq_len`` tokens, so that a document that crosses a cut goes on in the next sequence and only the last is cut short.
Tokenizing stops when there is enough. The same file, seed and tokenizer give the same tokens on any machine; a file of
any size is read with bounded memory. Nothing here imports torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

import weightkit.manifests as manifests
from weightkit.errors import CalibrationError, TokenizerError
from weightkit.quantization.documents import DocumentKind, Shuffled, encode_document, read_documents
from weightkit.quantization.token_arrays import Tokens, draw_sequences, open_sources, unknown_id
from weightkit.units import counted

if TYPE_CHECKING:
    from weightkit.generation.tokenizer import Tokenizer

Kind = Literal["text", "jsonl", "parquet", "tokens"]

_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".npy": "tokens",
    ".safetensors": "tokens",
}
_FORMATS = ".txt, .jsonl, .json (these also with .gz), .parquet, .npy or .safetensors"
#: Bytes of text kept for each token that is needed: several times what a token takes, so that one pass is enough.
_BYTES_A_TOKEN = 32
_LEAST_BUDGET_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)
class Calibration:
    """What goes through the model while it is quantized.

    Attributes:
        tokens: ids, I32 [samples, seq_len].
        source: the path that they come from.
        sha256: over the shape and the ids: equal for equal tokens, on any machine.
        seed: what the documents were drawn with.
        documents_used: documents with at least one token in it; of token ids, sequences.
        documents_found: documents, or sequences, that there were to draw from.
        kind: ``text``, ``jsonl``, ``parquet`` or ``tokens``.
    """

    tokens: Tokens
    source: str
    sha256: str
    seed: int
    documents_used: int
    documents_found: int
    kind: Kind


@dataclass(frozen=True)
class _Request:
    path: Path
    samples: int
    seq_len: int
    seed: int
    vocab_size: int

    @property
    def needed(self) -> int:
        return self.samples * self.seq_len


def load_calibration(
    path: Path,
    tokenizer: Tokenizer | Path | None,
    *,
    samples: int = 512,
    seq_len: int = 4096,
    seed: int = 0,
    vocab_size: int,
    max_position_embeddings: int | None = None,
) -> Calibration:
    """Calibration tokens from a file, or from a folder with files of one kind.

    Args:
        path: see ``weightkit.quantization.documents`` and ``token_arrays`` for formats. Of a folder, hidden files and
            those with other suffixes are left out, and its own folders are searched too.
        tokenizer: the checkpoint's, or its folder; None is enough for token ids.
        samples: sequences.
        seq_len: tokens of each.
        seed: decides which documents are drawn, and their order; from 0 up.
        vocab_size: of the model.
        max_position_embeddings: of the model, where known: most tokens of a sequence.

    Raises:
        CalibrationError: a missing, damaged or malformed file, too few tokens, ids that the model does not have, or a
            request that is none.
        TokenizerError: text, and no usable tokenizer.
        HeaderError: a damaged ``.safetensors`` file.
    """
    request = _Request(Path(path), samples, seq_len, seed, vocab_size)
    _check(request, max_position_embeddings)
    kind, files = _find(request.path)
    if kind == "tokens":
        tokens, used, found = _from_arrays(files, request)
    else:
        tokens, used, found = _from_documents(files, kind, _opened(tokenizer, request.path), request)
    return Calibration(tokens, str(path), _digest(tokens), seed, used, found, kind)


@dataclass(frozen=True)
class Size:
    """How much of calibration data is taken: ``samples`` sequences of ``seq_len`` tokens."""

    samples: int = 512
    seq_len: int = 4096


def default_size(model_name: str) -> Size:
    """What suits a known model's calibration data. Raises ``PlanError`` where no such model is known."""
    data, usual = manifests.load(model_name).calibration, Size()
    if data is None:
        return usual
    return Size(data.samples or usual.samples, data.seq_len or usual.seq_len)


def default_calibration(model_name: str, folder: Path = Path("calibration")) -> Path:
    """The calibration data that a known model's manifest names: what ships with weightkit, or lies in ``folder``.

    Raises:
        CalibrationError: it is not there yet: the message has the command that fetches it. Or the manifest names none.
        PlanError: no model of this name is known.
    """
    data = manifests.load(model_name).calibration
    if data is None:
        raise CalibrationError(
            "no calibration data is known for this model",
            where=model_name,
            fix=f"Give text of the kind that it will be used for: --calibration FILE, {_FORMATS}.",
        )
    if data.dataset is None:
        if data.path is None or not data.path.is_file():
            raise CalibrationError("no such file", where=data.path, fix="Restore it by reinstalling weightkit.")
        return data.path
    fetched = folder / data.file
    if fetched.is_file():
        return fetched
    raise _not_fetched(model_name, data.dataset, data.file, folder)


def _not_fetched(model_name: str, dataset: manifests.Hub, file: str, folder: Path) -> CalibrationError:
    words = ["hf", "download", dataset.id, file, "--repo-type", "dataset", "--revision", dataset.revision]
    command = shlex.join([*words, "--local-dir", str(folder)])
    takes = " (reading it takes pyarrow: pip install pyarrow)" if file.endswith(".parquet") else ""
    return CalibrationError(
        f"this model's calibration data does not ship with weightkit: {file} of the data set {dataset.id}",
        where=model_name,
        fix=f"Fetch it{takes}, or give text of your own to --calibration:\n"
        f"    {command}\n"
        f"    --calibration {shlex.quote(str(folder / file))}",
    )


def _check(request: _Request, longest: int | None) -> None:
    for name, value, least in (
        ("samples", request.samples, 1),
        ("seq_len", request.seq_len, 1),
        ("vocab_size", request.vocab_size, 1),
        ("seed", request.seed, 0),
    ):
        if value < least:
            raise CalibrationError(f"no such {name}", expected=f"a number from {least} up", found=value)
    if longest is not None and request.seq_len > longest:
        raise CalibrationError(
            "sequences longer than the model's context",
            expected=f"at most {longest:,} tokens (max_position_embeddings)",
            found=f"{request.seq_len:,}",
            fix=f"Use --seq-len {longest} or less.",
        )


# Which files.


def _find(path: Path) -> tuple[Kind, list[Path]]:
    """What kind of data lies at a path, and in which files."""
    try:
        if not path.exists():
            raise CalibrationError("no such file or folder", where=path, fix="Check the path.")
        files = _inside(path) if path.is_dir() else [path]
    except OSError as exc:
        raise CalibrationError(f"cannot be read ({exc.strerror})", where=path) from exc
    kinds = {kind for file in files if (kind := _kind(file)) is not None}
    if len(kinds) == 1 and all(file.is_file() for file in files):
        return kinds.pop(), files
    if len(kinds) > 1:
        raise _of_several_kinds(path, files)
    what = "no calibration data in this folder" if path.is_dir() else "not a file of calibration data"
    raise CalibrationError(what, where=path, expected=_FORMATS)


def _of_several_kinds(folder: Path, files: Sequence[Path]) -> CalibrationError:
    examples = {_kind(file): file.relative_to(folder).as_posix() for file in reversed(files)}
    return CalibrationError(
        "files of more than one kind",
        where=folder,
        found=", ".join(sorted(examples.values())),
        fix="Give one file, or a folder with files of one kind.",
    )


def _inside(folder: Path) -> list[Path]:
    """A folder's files in a known format, by relative path."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    visible = (name for name in names if not any(part.startswith(".") for part in name.split("/")))
    return [folder / name for name in visible if _kind(Path(name)) is not None]


def _kind(file: Path) -> Kind | None:
    is_packed = file.suffix.lower() == ".gz"
    kind = _KINDS.get(Path(file.stem if is_packed else file.name).suffix.lower())
    return None if is_packed and kind not in ("text", "jsonl") else kind


# Tokens from files.


def _from_documents(
    files: Sequence[Path], kind: DocumentKind, tokenizer: Tokenizer, request: _Request
) -> tuple[Tokens, int, int]:
    """Tokens I32 [samples, seq_len], documents used, documents found."""
    budget = max(_LEAST_BUDGET_BYTES, _BYTES_A_TOKEN * request.needed)
    documents = Shuffled(lambda: read_documents(files, kind), seed=request.seed, budget_bytes=budget)
    tokens, filled, used = np.empty(request.needed, np.int32), 0, 0
    for document in documents:
        ids = np.array(encode_document(document, kind, tokenizer), np.int64)
        unknown = np.flatnonzero((ids < 0) | (ids >= request.vocab_size))
        if unknown.size:
            raise unknown_id(int(ids[unknown[0]]), request.vocab_size, document.where)
        taken = ids[: request.needed - filled]
        tokens[filled : filled + taken.size] = taken
        filled += taken.size
        used += taken.size > 0
        if filled == request.needed:
            return tokens.reshape(request.samples, request.seq_len), used, documents.found
    raise _too_short(request, filled, filled // request.seq_len, counted(documents.found, "document"))


def _from_arrays(files: Sequence[Path], request: _Request) -> tuple[Tokens, int, int]:
    """Tokens I32 [samples, seq_len], sequences used, sequences found."""
    sources = open_sources(files, request.seq_len)
    found = sum(source.sequences for source in sources)
    if found < request.samples:
        whole = counted(found, "whole sequence")
        raise _too_short(request, sum(source.tokens for source in sources), found, whole)
    tokens = draw_sequences(sources, request.samples, seed=request.seed, vocab_size=request.vocab_size)
    return tokens, request.samples, found


def _too_short(request: _Request, tokens: int, most: int, parts: str) -> CalibrationError:
    smaller = f", or use --samples {most}" if most else f", or use --seq-len {tokens} or less" if tokens else ""
    return CalibrationError(
        "too little calibration data" if tokens else "no calibration data in it",
        where=request.path,
        expected=f"{request.needed:,} tokens ({request.samples:,} samples of {request.seq_len:,})",
        found=f"{tokens:,} tokens in {parts}",
        fix=f"Give more{smaller}.",
    )


def _opened(tokenizer: Tokenizer | Path | None, path: Path) -> Tokenizer:
    if tokenizer is None:
        raise TokenizerError(
            "text takes a tokenizer, and there is none",
            where=path,
            fix="Put tokenizer.json beside the weights, or give token ids (.npy or .safetensors).",
        )
    if not isinstance(tokenizer, Path):
        return tokenizer
    from weightkit.checkpoint.folder import side_files
    from weightkit.generation.tokenizer import Tokenizer

    if not tokenizer.is_dir():
        raise TokenizerError("no such folder", where=tokenizer)
    return Tokenizer.from_side_files(side_files(tokenizer), tokenizer)


def _digest(tokens: Tokens) -> str:
    shape = "x".join(map(str, tokens.shape))
    return sha256(f"{shape} I32 ".encode() + tokens.astype("<i4").tobytes()).hexdigest()
