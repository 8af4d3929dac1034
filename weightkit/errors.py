"""Every exception that weightkit raises on purpose.

    WeightkitError
    ├── FormatError                 a file's bytes break its format
    │   ├── HeaderError             a safetensors header (one class a defect, in weightkit.checkpoint.header)
    │   └── IndexFileError          model.safetensors.index.json
    ├── CheckpointError             files that are each well-formed but do not make a checkpoint
    │   ├── NotACheckpointError     nothing recognisable at a path
    │   ├── MissingFileError        a shard or a rank file that is not there
    │   ├── MissingTensorError      a name that no file holds
    │   ├── TensorError             a tensor that the config does not call for, or of another dtype or shape
    │   ├── ScaleError              an FP8 weight without its scale, or a scale that does not fit
    │   ├── ChecksumError           a file whose size or SHA-256 is not the recorded one
    │   ├── ValuesError             NaN or Inf in weights, or a scale that is not positive and finite
    │   └── Problems                several of any kind, found in one go
    ├── ConfigError                 config.json lacks a field or contradicts itself
    │   └── UnsupportedError        an architecture or layout that weightkit knows it cannot handle
    ├── PlanError                   a request that has no valid result (an illegal --mp, say)
    ├── WriteError                  the writing of a plan
    │   ├── SpaceError              not enough disk or memory
    │   ├── TargetError             the target is in use, or holds something else
    │   ├── SourceChangedError      a source file is not what the plan was made from
    │   └── Interrupted             stopped by a signal; the next run continues
    ├── HubError                    fetching from a hub, or reading from a bucket or a web server
    │   ├── RepositoryError         an unknown repository, revision or file
    │   ├── AccessError             gated, private, or a token that is not accepted
    │   ├── UnreachableError        no connection, or a hub that does not answer properly
    │   ├── ListingError            a listing that is hostile, contradicts itself or is not what it was
    │   ├── ContentError            bytes that are not what the listing says
    │   └── FetchError              files that could not be fetched; the others are in place
    ├── CalibrationError            calibration data that is missing, damaged or too little
    ├── QuantizationError           weights that cannot be quantized: NaN, inputs that are not finite
    ├── DeviceError                 a device that is absent or cannot do what was asked
    │   ├── RankError               one of several processes is gone, does not answer, or failed
    │   └── ClusterError            a Ray cluster cannot be reached, or its nodes lack what the work needs
    ├── GenerationError             text could not be generated
    │   ├── TokenizerError          no usable tokenizer or chat template
    │   └── NonFiniteError          NaN or Inf in logits
    └── ServingError                a server of a checkpoint
        ├── EndpointError           it does not answer, or with errors, or with what is no answer
        └── EngineError             it does not start, ends by itself, or never becomes ready

Each one says what went wrong, where, what was expected and found, and what to do next. The command line catches
``WeightkitError`` alone: anything else is a defect of ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Examples shown of each kind of problem.
SHOWN_A_KIND = 5
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


class WeightkitError(Exception):
    """Base of all. ``str()`` is the whole message: ``where: what: expected ..., found ...``, and a line with the next
    step.

    Args:
        what: the defect, in one sentence without its place.
        where: the file, tensor or field it concerns.
        expected: what a valid input has there.
        found: what is there.
        fix: the next step, in the imperative.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        """Errors cross between processes, whatever their own constructors take."""
        return _rebuilt, (type(self), self.args, self.__dict__)

    @property
    def facts(self) -> str:
        """``expected ..., found ...``, as far as they are known."""
        known = (("expected", self.expected), ("found", self.found))
        return printable(", ".join(f"{word} {value}" for word, value in known if value is not None))

    @property
    def message(self) -> str:
        """``str()`` without the next step."""
        place = "" if self.where is None else f"{self.where}: "
        return printable(": ".join(filter(None, (place + self.what.rstrip("."), self.facts)))) + "."

    def __str__(self) -> str:
        return f"{self.message}\n{printable(self.fix)}" if self.fix else self.message


def _rebuilt(kind: type[WeightkitError], args: tuple[object, ...], state: dict[str, object]) -> WeightkitError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class FormatError(WeightkitError):
    """A file's bytes break its format."""


class HeaderError(FormatError):
    """A safetensors header is damaged or hostile."""


class IndexFileError(FormatError):
    """``model.safetensors.index.json`` is damaged or hostile."""


class CheckpointError(WeightkitError):
    """The files do not make a checkpoint."""


class NotACheckpointError(CheckpointError):
    """Nothing at the path is recognisable as a checkpoint."""


class MissingFileError(CheckpointError):
    """A file that the checkpoint names is not there."""


class MissingTensorError(CheckpointError, KeyError):
    """A tensor that no file holds."""

    __str__ = WeightkitError.__str__


class TensorError(CheckpointError):
    """A tensor that the config does not call for, or that has another dtype or shape."""


class ScaleError(CheckpointError):
    """An FP8 weight has no scale, or one that does not fit it."""


class ChecksumError(CheckpointError):
    """A file's size or SHA-256 is not the recorded one."""


class ValuesError(CheckpointError):
    """Weights hold NaN or Inf, or a scale is not positive and finite."""


class ConfigError(WeightkitError):
    """``config.json`` lacks a field or contradicts itself."""


class UnsupportedError(ConfigError):
    """An architecture, layout or dtype that weightkit knows it cannot handle."""


class PlanError(WeightkitError):
    """A request that has no valid result."""


class WriteError(WeightkitError):
    """Writing a plan failed."""


class SpaceError(WriteError):
    """Not enough disk or memory."""


class TargetError(WriteError):
    """The target is in use by another writer, or holds something else."""


class SourceChangedError(WriteError):
    """A source file is not what the plan was made from."""


class Interrupted(WriteError):  # noqa: N818 - an interruption is no error of the user's
    """Stopped by a signal. What was done is kept; the next run continues."""


class HubError(WeightkitError):
    """Fetching from a hub failed, or reading from another place in the network."""


class RepositoryError(HubError):
    """There is no such repository, revision, bucket, folder or file."""


class AccessError(HubError):
    """A repository is gated or private, or the credentials are missing or not accepted."""


class UnreachableError(HubError):
    """A server cannot be reached, or does not answer properly."""


class ListingError(HubError):
    """A listing is hostile, contradicts itself, or is not what it was."""


class ContentError(HubError):
    """A hub sends other bytes than its listing says."""


class CalibrationError(WeightkitError):
    """Calibration data that is missing, damaged or too little."""


class QuantizationError(WeightkitError):
    """Weights that cannot be quantized: NaN among them or their inputs, a Hessian without a factor."""


class DeviceError(WeightkitError):
    """A device is absent or cannot do what was asked."""


class RankError(DeviceError):
    """One of several processes that work together is gone, does not answer, or failed."""


class ClusterError(DeviceError):
    """A Ray cluster cannot be reached, or its nodes lack what the work needs."""


class GenerationError(WeightkitError):
    """Text could not be generated."""


class TokenizerError(GenerationError):
    """No usable tokenizer or chat template."""


class NonFiniteError(GenerationError):
    """The logits hold NaN or Inf."""


class ServingError(WeightkitError):
    """A checkpoint could not be served, or its server does not work."""


class EndpointError(ServingError):
    """A server does not answer, or with an error, or with what is no answer."""


class EngineError(ServingError):
    """An engine does not start, ended by itself, or never became ready."""


class Problems(CheckpointError):  # noqa: N818 - the plural says it
    """Several defects found in one go.

    Args:
        what: what they stand in the way of, in one sentence.
        problems: each an exception of its own, in the order found.
    """

    def __init__(
        self, what: str, problems: Sequence[WeightkitError], *, where: object = None, fix: str | None = None
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        count = f"{len(self.problems):,} problem{'s' * (len(self.problems) > 1)}"
        lines = [f"{place}{self.what} ({count}).", render_problems(self.problems)]
        return "\n".join([*lines, self.fix] if self.fix else lines)


class FetchError(Problems, HubError):
    """Files that could not be fetched. All others are in place; the next run fetches only these."""


def printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped: names in hostile files must not drive a
    terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def group_problems(problems: Sequence[WeightkitError]) -> list[list[WeightkitError]]:
    """Those of one kind together, kinds in the order in which they come first.

    A kind is an exception class and a sentence, whatever names and numbers stand in it.
    """
    kinds: dict[tuple[type[WeightkitError], str], list[WeightkitError]] = {}
    for problem in problems:
        kinds.setdefault((type(problem), _sentence(problem.what)), []).append(problem)
    return list(kinds.values())


def _sentence(what: str) -> str:
    """``what`` without the words that vary within a kind: quoted names, tensors, fields, files, numbers."""
    words = _QUOTED.sub("…", what).split()
    return " ".join("…" if any(c in "./_" or c.isdigit() for c in word.rstrip(".")) else word for word in words)


def render_problems(problems: Sequence[WeightkitError], *, shown: int = SHOWN_A_KIND) -> str:
    """Problems for people: by kind, each with its count, the first few and the next step."""
    return "\n".join(line for group in group_problems(problems) for line in _render_group(group, shown))


def _render_group(group: Sequence[WeightkitError], shown: int) -> list[str]:
    first = group[0]
    if len(group) == 1:
        return _indented(str(first), 2)
    one_fix = all(problem.fix == first.fix for problem in group)
    if one_fix and all(problem.what == first.what and problem.where is not None for problem in group):
        lines = [f"  {len(group):,} times: {printable(first.what)}"]
        examples = [": ".join(filter(None, (printable(str(p.where)), p.facts))) for p in group[:shown]]
    else:
        lines = [f"  {len(group):,} of one kind:"]
        examples = [problem.message if one_fix else str(problem) for problem in group[:shown]]
    for example in examples:
        lines += _indented(example, 4)
    if len(group) > shown:
        lines.append(f"    ... and {len(group) - shown:,} more of this kind.")
    return [*lines, *_indented(first.fix, 2)] if one_fix and first.fix else lines


def _indented(text: str, width: int) -> list[str]:
    return [" " * width + line for line in text.split("\n")]


def raise_all(what: str, problems: Sequence[WeightkitError], *, where: object = None, fix: str | None = None) -> None:
    """Raise nothing for no problems, the problem itself for one, and ``Problems`` for several."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(what, problems, where=where, fix=fix)
