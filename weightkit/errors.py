"""Every exception that weightkit raises on purpose.

    WeightkitError
    ├── FormatError                 a file's bytes break its format
    │   ├── HeaderError             a safetensors header (one class a defect, in weightkit.checkpoint.header)
    │   └── IndexFileError          model.safetensors.index.json
    ├── CheckpointError             files that are each well-formed but do not make a checkpoint
    │   ├── NotACheckpointError     nothing recognisable at a path
    │   ├── MissingFileError        a shard or a rank file that is not there
    │   ├── MissingTensorError      a name that no file holds
    │   ├── ScaleError              an FP8 weight without its scale, or a scale that does not fit
    │   └── Problems                several of any kind, found in one go
    ├── ConfigError                 config.json lacks a field or contradicts itself
    │   └── UnsupportedError        an architecture or layout that weightkit knows it cannot handle
    ├── PlanError                   a request that has no valid result (an illegal --mp, say)
    ├── WriteError                  the writing of a plan
    │   ├── SpaceError              not enough disk or memory
    │   ├── TargetError             the target is in use, or holds something else
    │   ├── SourceChangedError      a source file is not what the plan was made from
    │   └── Interrupted             stopped by a signal; the next run continues
    ├── DeviceError                 a device that is absent or cannot do what was asked
    └── GenerationError             text could not be generated
        ├── TokenizerError          no usable tokenizer or chat template
        └── NonFiniteError          NaN or Inf in logits

Each one says what went wrong, where, what was expected and found, and what to do next. The command line catches
``WeightkitError`` alone: anything else is a defect of ours.
"""

from __future__ import annotations

from collections.abc import Sequence


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

    def __str__(self) -> str:
        text = self.what.rstrip(".")
        if self.where is not None:
            text = f"{self.where}: {text}"
        facts = [
            f"{word} {value}"
            for word, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        if facts:
            text = f"{text}: {', '.join(facts)}"
        return f"{text}.\n{self.fix}" if self.fix else f"{text}."


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


class ScaleError(CheckpointError):
    """An FP8 weight has no scale, or one that does not fit it."""


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


class DeviceError(WeightkitError):
    """A device is absent or cannot do what was asked."""


class GenerationError(WeightkitError):
    """Text could not be generated."""


class TokenizerError(GenerationError):
    """No usable tokenizer or chat template."""


class NonFiniteError(GenerationError):
    """The logits hold NaN or Inf."""


class Problems(CheckpointError):  # noqa: N818 - the plural says it
    """Several defects found in one go.

    Args:
        what: what they stand in the way of, in one sentence.
        problems: each an exception of its own, in the order found.
    """

    SHOWN_A_KIND = 5

    def __init__(
        self, what: str, problems: Sequence[WeightkitError], *, where: object = None, fix: str | None = None
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        lines = [f"{place}{self.what} ({len(self.problems)} problem{'s' * (len(self.problems) > 1)})."]
        kinds: dict[type[WeightkitError], list[WeightkitError]] = {}
        for problem in self.problems:
            kinds.setdefault(type(problem), []).append(problem)
        for found in kinds.values():
            lines += [f"  {problem}".replace("\n", "\n  ") for problem in found[: self.SHOWN_A_KIND]]
            if len(found) > self.SHOWN_A_KIND:
                lines.append(f"  ... and {len(found) - self.SHOWN_A_KIND} more of this kind.")
        return "\n".join([*lines, self.fix] if self.fix else lines)


def raise_all(what: str, problems: Sequence[WeightkitError], *, where: object = None, fix: str | None = None) -> None:
    """Raise nothing for no problems, the problem itself for one, and ``Problems`` for several."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(what, problems, where=where, fix=fix)
