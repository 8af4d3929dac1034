"""The whole road on pico, the trained model that ships with the package, with proof after each step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from weightkit import manifests, workspace
from weightkit.checkpoint import Reader
from weightkit.compute.engines import DeviceName
from weightkit.errors import CheckpointError, GenerationError, raise_all
from weightkit.examine import verify
from weightkit.generation import Runtime
from weightkit.hub import fetch
from weightkit.hub.mirror import can_serve, serve
from weightkit.layouts import open_checkpoint
from weightkit.manifests.pico.questions import Question, held_out
from weightkit.transforms import cast, merge, shard, strip_mtp
from weightkit.units import human_bytes
from weightkit.writer import write

MODEL = "pico"
REPOSITORY = "weightkit/pico"
#: Of each of pico's six kinds of question and two languages; none of them occurred in training.
QUESTIONS_A_KIND = 2
QUESTION_SEED = 2026
#: pico answers 98.6 % of all held-out questions right; wrong weights leave nothing of that.
LEAST_RIGHT = 0.9


@dataclass(frozen=True)
class Step:
    """One step of the road.

    Attributes:
        command: what a user would type after ``weightkit``.
        folder: the checkpoint that it read or wrote.
        size_bytes: of its tensors.
        wall_s: seconds, the proof not counted.
        shown: what was proven of the result.
    """

    command: str
    folder: Path
    size_bytes: int
    wall_s: float
    shown: str

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return asdict(self) | {"folder": str(self.folder)}

    def render(self) -> str:
        """A line of the table."""
        size = human_bytes(self.size_bytes)
        return f"{self.command:<16} {self.folder.name:<12} {size:>8} {self.wall_s:6.2f} s   {self.shown}"


def demo(device: DeviceName = "auto") -> Iterator[Step]:
    """Take pico down the road in the workspace, replacing what an earlier demo left; each step is yielded once proven.

    Raises:
        CheckpointError: a result that does not verify, or does not hold the bytes it must.
        GenerationError: answers that are wrong, or not those of the checkpoint as it ships.
    """
    folder = workspace.model_folder(MODEL)
    if can_serve():
        yield _fetch()
    source = workspace.source(MODEL)
    checkpoint, questions = open_checkpoint(source), held_out(QUESTION_SEED, QUESTIONS_A_KIND)
    started = time.monotonic()
    shown = _verified(source)
    yield Step("verify", source, checkpoint.size_bytes, time.monotonic() - started, shown)

    started = time.monotonic()
    answers, right = _ask(source, questions, device)
    if right < LEAST_RIGHT * len(questions):
        raise GenerationError("pico's answers are wrong", where=source, found=f"{right} of {len(questions)} right")
    shown = f"{right} of {len(questions)} held-out questions right"
    yield Step("generate", source, checkpoint.size_bytes, time.monotonic() - started, shown)

    for command, name, make in (
        ("strip", "fp8-no-mtp", lambda: strip_mtp(checkpoint)),
        ("cast --to bf16", "bf16", lambda: cast(checkpoint, "bf16")),
        ("shard --mp 8", "mp8", lambda: shard(checkpoint, mp=8)),
        ("merge", "mp8-merged", lambda: merge(open_checkpoint(folder / "mp8"))),
    ):
        target = folder / name
        started = time.monotonic()
        write(make(), target, device=device, progress=False, force=True)
        wall_s = time.monotonic() - started
        shown = f"{_verified(target)}; same answers"
        if _ask(target, questions, device)[0] != answers:
            raise GenerationError("not the answers of the checkpoint as it ships", where=target)
        if command == "merge":
            shown += f"; {_equal_tensors(target, folder / 'fp8-no-mtp')} tensors equal strip's, byte for byte"
        yield Step(command, target, open_checkpoint(target).size_bytes, wall_s, shown)


def _fetch() -> Step:
    """From a mirror of what ships with the package, on loopback, into the workspace."""
    shipped = manifests.load(MODEL).path
    if shipped is None:
        raise CheckpointError("pico does not ship with this package", where=MODEL, fix="Install weightkit again.")
    started = time.monotonic()
    with serve({REPOSITORY: shipped}) as endpoint, _environment("HF_ENDPOINT", endpoint):
        done = fetch(MODEL, hub="huggingface", progress=False)
    got = sum(done.fetched_bytes.values())
    shown = f"{done.files} files from a mirror on loopback, {human_bytes(got)} fetched, all verified"
    return Step("fetch", done.target, done.size_bytes, time.monotonic() - started, shown)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _verified(path: Path) -> str:
    report = verify(path, progress=False)
    raise_all("does not verify", report.problems, where=path)
    return f"{report.tensors} tensors, {human_bytes(report.hashed_bytes)} of checksums right"


def _ask(path: Path, questions: Sequence[Question], device: DeviceName) -> tuple[list[tuple[int, ...]], int]:
    """The token ids of each answer, and how many answers are right."""
    with Runtime(path, device=device) as runtime:
        results = [runtime.generate(question.prompt, max_new_tokens=32) for question in questions]
    right = sum(result.text == question.answer for result, question in zip(results, questions, strict=True))
    return [result.token_ids for result in results], right


def _equal_tensors(one: Path, other: Path) -> int:
    """The number of tensors of two checkpoints of plain tensors. Raises ``CheckpointError`` where any of them
    differ."""
    left, right = open_checkpoint(one), open_checkpoint(other)
    with Reader() as reader:
        differing = left.tensors.keys() ^ right.tensors.keys() or {
            name for name in left.tensors if (reader.read(left[name]) != reader.read(right[name])).any()
        }
    if differing:
        raise CheckpointError("tensors differ", where=f"{one} and {other}", found=", ".join(sorted(differing)[:4]))
    return len(left.tensors)
