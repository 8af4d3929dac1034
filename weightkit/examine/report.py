"""What ``verify`` found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weightkit.errors import WeightkitError, group_problems, printable, render_problems
from weightkit.units import human_bytes, human_seconds


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at, or could not be.

    Attributes:
        name: ``headers``, ``index``, ``config``, ``tensors``, ``side files``, ``checksums``, ``values``, ``replicas``.
        done: whether it was looked at.
        detail: how much of it; of what was not looked at, why.
    """

    name: str
    done: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """All that is wrong with a checkpoint, and what was looked at to know.

    Attributes:
        path: what was verified.
        layout: ``published``, ``single file``, ``8 mp ranks`` or ``8 ep ranks``.
        files: weight files whose header could be read.
        tensors: tensors in them; a tensor on several ranks counts on each.
        size_bytes: bytes of their data, headers not counted.
        problems: every defect, each an exception of its own, in the order in which they were looked for.
        checks: what was looked at, and what could not be.
        notes: what is unusual and no defect, such as no tokenizer.
        hashed_bytes: bytes whose SHA-256 was computed for comparison with a lock or manifest.
        wall_s: seconds.
    """

    path: Path
    layout: str
    files: int
    tensors: int
    size_bytes: int
    problems: tuple[WeightkitError, ...]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    hashed_bytes: int
    wall_s: float

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def to_json(self) -> dict[str, object]:
        """Plain values by field; of each problem its class, sentence, place, facts and next step."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "layout": self.layout,
            "files": self.files,
            "tensors": self.tensors,
            "size_bytes": self.size_bytes,
            "problems": [_problem_json(problem) for problem in self.problems],
            "checks": [{"name": check.name, "done": check.done, "detail": check.detail} for check in self.checks],
            "notes": list(self.notes),
            "hashed_bytes": self.hashed_bytes,
            "wall_s": self.wall_s,
        }

    def render(self) -> str:
        """Text for a terminal: what was looked at, then the problems by kind, each with what to do."""
        what = f"{self.layout}, {_count(self.files, 'file')}, {_count(self.tensors, 'tensor')}"
        lines = [printable(f"{self.path}: {what}, {human_bytes(self.size_bytes)}.")]
        width = max((len(check.name) for check in self.checks), default=0)
        for check in self.checks:
            lines.append(
                f"  {'    ' if check.done else 'not '}checked  {check.name:{width}}  {printable(check.detail)}"
            )
        lines += [f"  note: {printable(note)}" for note in self.notes]
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        took = human_seconds(self.wall_s)
        if self.ok:
            return f"No problems ({took})."
        kinds = len(group_problems(self.problems))
        counts = f"{_count(len(self.problems), 'problem')} of {_count(kinds, 'kind')}"
        return f"{counts} ({took}):\n{render_problems(self.problems)}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _problem_json(problem: WeightkitError) -> dict[str, str | None]:
    fields = {"what": problem.what, "where": problem.where, "expected": problem.expected, "found": problem.found}
    return {"error": type(problem).__name__, **fields, "fix": problem.fix}
