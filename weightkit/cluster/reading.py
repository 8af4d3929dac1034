"""The files of a checkpoint, read by the nodes of a Ray cluster. See ``weightkit.examine.stream.Readers``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from weightkit.checkpoint.once import READ_AHEAD_BYTES
from weightkit.checkpoint.stamp import Stamp, stamp_file
from weightkit.cluster.connection import connect
from weightkit.cluster.crew import Crew, Needs
from weightkit.cluster.news import Desk, News, tell
from weightkit.cluster.sight import require_build, require_seen
from weightkit.compute.engines import DeviceName
from weightkit.errors import PlanError, WeightkitError
from weightkit.examine.replicas import Digests
from weightkit.examine.stream import CHUNK_BYTES, Reading, read_one
from weightkit.progress import Progress as ProgressBar
from weightkit.sha256 import hash_apart
from weightkit.version import build

#: Of a worker's process: Python and Ray, and what consumers hold of a file.
MEMORY_BYTES = (512 << 20) + CHUNK_BYTES + READ_AHEAD_BYTES


class RayReaders:
    """Reads files as tasks of a Ray cluster: ``wk.verify(..., readers=RayReaders())``. See ``RayExecutor``."""

    def __init__(self, address: str | None = None, *, jobs: int | None = None) -> None:
        if jobs is not None and jobs < 1:
            raise PlanError("not a number of jobs", where="--jobs", expected="at least 1", found=jobs)
        self.address, self.jobs = address, jobs

    def read_all(self, readings: Sequence[Reading], *, desc: str, progress: bool) -> list[WeightkitError]:
        """What the consumers and the reading found, in the order of the files.

        Raises:
            ClusterError: no cluster, or nodes that do not see the files.
        """
        ray = connect(self.address)
        bar = ProgressBar(sum(reading.size_bytes for reading in readings), desc, shown=progress, parts=len(readings))
        errands = [_Reading(reading, bar) for reading in readings]
        paths = [reading.path.absolute() for reading in readings]
        stamps = {str(path): stamp_file(path) for path in paths if path.is_file()}
        with bar:
            Crew(
                ray,
                read_file,
                Needs(MEMORY_BYTES),
                jobs=self.jobs,
                look=(look, (stamps, build())),
                tell=bar.tell,
            ).carry_out(errands)
        return [problem for errand in errands for problem in errand.problems]


@dataclass(frozen=True)
class Found:
    """What became of a reading: problems, and what ``Digests`` among its consumers hold, by their place."""

    problems: list[WeightkitError]
    digests: Mapping[int, Mapping[str, bytes]]


class _Reading:
    """The errand of one file."""

    def __init__(self, reading: Reading, bar: ProgressBar) -> None:
        self.reading, self.bar = reading, bar
        self.name, self.size_bytes = str(reading.path), reading.size_bytes
        self.problems: list[WeightkitError] = []
        self._shown = 0

    def order(self, device: DeviceName) -> Reading:
        return replace(self.reading, path=self.reading.path.absolute())

    def heard(self, news: News) -> None:
        self._show(news.position)
        if isinstance(news.result, Found):
            self.problems = news.result.problems
            for place, values in news.result.digests.items():
                consumer = self.reading.consumers[place]
                if isinstance(consumer, Digests):
                    consumer.adopt(values)
            self.bar.part_done()

    def lost(self) -> None:
        self._show(0)

    def _show(self, position: int) -> None:
        self.bar.add(position - self._shown)
        self._shown = position


# --- what runs on a node ----------------------------------------------------------------------------------------------


def look(stamps: Mapping[str, Stamp], expected: str) -> None:
    """Whether this node can do the work. Raises ``ClusterError``."""
    require_build(expected)
    require_seen(stamps)


def read_file(reading: Reading) -> Iterator[News]:
    """Feed a file to its consumers; the result is a ``Found``."""
    yield from tell(partial(_read, reading), lambda: True)


def _read(reading: Reading, desk: Desk) -> Found:
    hash_apart()
    problems = read_one(reading, desk.wrote, desk.stop)
    desk.check_stop()
    consumers = enumerate(reading.consumers)
    digests = {place: item.values() for place, item in consumers if isinstance(item, Digests) and item.complete}
    return Found(problems, digests)
