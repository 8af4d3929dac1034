"""Known checkpoints: where they are published, what they are made of, how much of it there is.

One TOML file a checkpoint: ``NAME.toml``, or ``NAME/manifest.toml`` for one that ships with the package. Format:

    title = "DeepSeek-V3"
    checkpoint = "checkpoint"     # only of one that ships: its folder, relative to the manifest
    [hubs.huggingface]            # and [hubs.modelscope]
    id = "deepseek-ai/DeepSeek-V3"
    revision = "main"
    [architecture]                # the fields of config.json that say what the checkpoint is made of
    [expected]                    # totals over all stored tensors
    tensors, size_bytes, files    # files only where the number is known
    [expected.elements]           # by dtype, in safetensors spelling
    [files]                       # optional: what is known of each file
    [evaluation]                  # optional: what the checkpoint was measured to do
    [calibration]                 # optional: the text that quantization to int4 is calibrated with
    file = "data/train.parquet"   # in a data set on Hugging Face; without one, beside the manifest
    dataset = "owner/name"
    revision = "..."
    samples, seq_len              # optional: how much of it, where that is not the usual
    [smoke]                       # optional: what a smoke test may expect
    perplexity = 12.3             # a token of passage.txt, of the checkpoint as published
    answers = [["What is 17 + 25?", "42"]]      # a user's messages with the exact answers

Nothing here knows what the fields mean: ``weightkit.family.Architecture.from_config(manifest.config)`` does.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from weightkit.errors import ConfigError, PlanError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["CalibrationData", "Expectation", "Hub", "Manifest", "Smoke", "load", "names", "passage"]

_FOLDER = Path(__file__).parent
_HUBS = ("huggingface", "modelscope")
_RESTORE = "Restore the file by reinstalling weightkit."


@dataclass(frozen=True, slots=True)
class Hub:
    """A checkpoint's place on a hub.

    Attributes:
        id: ``owner/name``.
        revision: branch, tag or commit.
    """

    id: str
    revision: str


@dataclass(frozen=True, slots=True)
class Expectation:
    """Totals over all tensors that the checkpoint stores, MTP layers included.

    Attributes:
        tensors: number of tensors.
        size_bytes: bytes of data, headers not counted: the index's ``total_size``.
        elements: elements by dtype, in safetensors spelling.
        files: number of safetensors files; None where it is not known.
    """

    tensors: int
    size_bytes: int
    elements: Mapping[str, int]
    files: int | None = None


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """The text that suits a checkpoint's calibration.

    Attributes:
        file: its path within the data set; of one that ships, within the manifest's folder.
        path: where one that ships lies; else None.
        dataset: the data set on Hugging Face, for one that does not ship; else None.
        samples: sequences to calibrate with, where it is not the usual number.
        seq_len: tokens of each, likewise.
    """

    file: str
    path: Path | None = None
    dataset: Hub | None = None
    samples: int | None = None
    seq_len: int | None = None


@dataclass(frozen=True, slots=True)
class Smoke:
    """What a smoke test of a checkpoint may expect.

    Attributes:
        answers: a user's messages with the exact answers to them, greedy and through the chat template.
        perplexity: of ``passage()``, a token, of the checkpoint as published; None where it was not measured.
    """

    answers: tuple[tuple[str, str], ...] = ()
    perplexity: float | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A known checkpoint.

    Attributes:
        name: what ``--model`` and ``load`` call it.
        title: its name for people.
        config: the fields of its ``config.json`` that decide what it is made of.
        expected: its totals; None where the manifest gives none.
        hubs: where it is published, by hub (``huggingface``, ``modelscope``); empty for one that only ships.
        path: the folder of the checkpoint, for one that ships with the package; else None.
        files: the manifest's ``[files]`` table as it stands.
        evaluation: the manifest's ``[evaluation]`` table as it stands.
        calibration: the text to calibrate with; None where the manifest names none.
        smoke: what a smoke test may expect; None where nothing is known.
    """

    name: str
    title: str
    config: Mapping[str, object]
    expected: Expectation | None = None
    hubs: Mapping[str, Hub] = field(default_factory=dict)
    path: Path | None = None
    files: Mapping[str, object] = field(default_factory=dict)
    evaluation: Mapping[str, object] = field(default_factory=dict)
    calibration: CalibrationData | None = None
    smoke: Smoke | None = None


def passage() -> str:
    """The text that every model's perplexity is measured on: a few paragraphs in English, Chinese and Python, written
    for this. Nothing of it may change: the manifests' figures belong to it."""
    return (_FOLDER / "passage.txt").read_text(encoding="utf-8")


def names() -> tuple[str, ...]:
    """The names of all known checkpoints, sorted."""
    alone = (path.stem for path in _FOLDER.glob("*.toml"))
    with_folder = (path.parent.name for path in _FOLDER.glob("*/manifest.toml"))
    return tuple(sorted({*alone, *with_folder}))


def load(name: str) -> Manifest:
    """Read a manifest.

    Raises:
        PlanError: no manifest of this name; the message has the closest ones.
        ConfigError: the manifest is damaged.
    """
    path = _find(name)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"not TOML ({error})", where=path, fix="Restore the file by reinstalling weightkit."
        ) from error
    return _Parser(path).manifest(name, data)


def _find(name: str) -> Path:
    known = names()
    if name in known:  # and so never a path: `../x` is no manifest's name
        path = _FOLDER / f"{name}.toml"
        return path if path.is_file() else _FOLDER / name / "manifest.toml"
    close = get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else "Use one of these, or give the checkpoint's folder."
    raise PlanError("no model of this name is known", where=name, expected=f"one of {', '.join(known)}", fix=hint)


class _Parser:
    """Turns one manifest's tables into records, with the file's name in every error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def manifest(self, name: str, data: Mapping[str, object]) -> Manifest:
        folder = data.get("checkpoint")
        return Manifest(
            name=name,
            title=self.text(data, "title"),
            config=self.table(data, "architecture"),
            expected=self.expectation(self.table(data, "expected")) if "expected" in data else None,
            hubs=self.hubs(self.table(data, "hubs")) if "hubs" in data else {},
            path=None if folder is None else self.path.parent / self.text(data, "checkpoint"),
            files=self.table(data, "files") if "files" in data else {},
            evaluation=self.table(data, "evaluation") if "evaluation" in data else {},
            calibration=self.calibration(self.table(data, "calibration")) if "calibration" in data else None,
            smoke=self.smoke(self.table(data, "smoke")) if "smoke" in data else None,
        )

    def smoke(self, data: Mapping[str, object]) -> Smoke:
        pairs, perplexity = data.get("answers", []), data.get("perplexity")
        if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
            raise self.error("answers", "pairs of texts", pairs)
        if not (perplexity is None or (isinstance(perplexity, float) and perplexity > 1)):
            raise self.error("perplexity", "a number above 1, with its point", perplexity)
        return Smoke(tuple((prompt, answer) for prompt, answer in pairs), perplexity)

    def calibration(self, data: Mapping[str, object]) -> CalibrationData:
        file, published = self.text(data, "file"), "dataset" in data
        return CalibrationData(
            file=file,
            path=None if published else self.path.parent / file,
            dataset=Hub(self.text(data, "dataset"), self.text(data, "revision")) if published else None,
            samples=self.count(data, "samples") if "samples" in data else None,
            seq_len=self.count(data, "seq_len") if "seq_len" in data else None,
        )

    def hubs(self, data: Mapping[str, object]) -> dict[str, Hub]:
        unknown = sorted(set(data) - set(_HUBS))
        if unknown:
            raise self.error("hubs", f"one of {', '.join(_HUBS)}", ", ".join(unknown))
        tables = {hub: self.table(data, hub) for hub in data}
        return {hub: Hub(self.text(table, "id"), self.text(table, "revision")) for hub, table in tables.items()}

    def expectation(self, data: Mapping[str, object]) -> Expectation:
        elements = self.table(data, "elements")
        return Expectation(
            tensors=self.count(data, "tensors"),
            size_bytes=self.count(data, "size_bytes"),
            elements={dtype: self.count(elements, dtype) for dtype in elements},
            files=self.count(data, "files") if "files" in data else None,
        )

    def text(self, data: Mapping[str, object], key: str) -> str:
        value = data.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a string", value)
        return value

    def count(self, data: Mapping[str, object], key: str) -> int:
        value = data.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, "a number, at least 0", value)
        return value

    def table(self, data: Mapping[str, object], key: str) -> Mapping[str, object]:
        value = data.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "a table", value)
        return value

    def error(self, key: str, expected: str, found: object) -> ConfigError:
        return ConfigError(
            f"{key} is not what a manifest has there",
            where=self.path,
            expected=expected,
            found=repr(found),
            fix=_RESTORE,
        )


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) and text for text in value)
