"""Carrying out a fetch: workers that take segments of files, until all files are right or known not to come."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from weightkit.checkpoint.lock import Lock
from weightkit.checkpoint.stamp import Stamp
from weightkit.durable import PARTIAL, write_whole
from weightkit.errors import FetchError, SpaceError, TargetError, WeightkitError
from weightkit.hub.line import Line, RangeIgnored, Shared
from weightkit.hub.listing import RemoteFile
from weightkit.hub.mend import Mender
from weightkit.hub.partial import Digests, Grain, Partial, disk_problem
from weightkit.hub.plan import FetchPlan, is_ours, serving
from weightkit.hub.state import FileStamp, Record, make_lock
from weightkit.hub.transport import Transport
from weightkit.progress import Progress
from weightkit.remote.patience import Stopped, interrupted

#: Files below this come first: config and tokenizer are there while the weights still arrive.
SMALL_BYTES = 16 << 20
#: How long workers are given to end when the fetch is stopped; what they wait for is cut off.
STOP_S = 1.0
_READ_BYTES = 1 << 20


@dataclass
class Job:
    """One file on its way. All fields but ``line`` are changed under the run's lock, or by the one worker at it.

    Attributes:
        stage: ``check`` (there, to be hashed), ``checking``, ``new``, ``opening``, ``ready`` (segments may be taken),
            ``finishing``, ``done`` or ``failed``.
        untaken: segments that nobody has taken.
        active: workers at it.
        shown: bytes that the bar has counted.
    """

    file: RemoteFile
    line: Line
    stage: str = "new"
    partial: Partial | None = None
    untaken: list[int] = field(default_factory=list)
    active: int = 0
    shown: int = 0
    error: WeightkitError | None = None

    @property
    def over(self) -> bool:
        return self.stage in ("done", "failed")


@dataclass(frozen=True)
class Claim:
    """A worker's next piece of work: ``segment`` of a file to fetch, or the file as a whole."""

    job: Job
    segment: int | None = None


class Run:
    """One execution of a plan.

    Args:
        plan: what to do.
        record: where stamps go.
        shared: patience, rate and health.
        grain: how files are divided.
        bar: progress.
    """

    def __init__(self, plan: FetchPlan, record: Record, shared: Shared, grain: Grain, bar: Progress) -> None:
        self.plan, self.record, self.shared, self.grain, self.bar = plan, record, shared, grain, bar
        self._changed = threading.Condition()
        self._fatal: BaseException | None = None
        self._transports: list[Transport] = []
        self._threads: list[threading.Thread] = []
        self.jobs = [self._job(path) for path in self._order()]

    def _order(self) -> list[str]:
        paths = [*self.plan.unchecked, *self.plan.damaged, *self.plan.missing]
        return sorted(paths, key=lambda path: (self.plan.files[path].size_bytes >= SMALL_BYTES, path))

    def _job(self, path: str) -> Job:
        file = self.plan.files[path]
        line = Line(file, serving(file, self.plan.sources, self.plan.listings), self.shared)
        return Job(file, line, "check" if path in self.plan.unchecked else "new")

    # the whole

    def execute(self, workers: int) -> None:
        """Fetch all files.

        Raises:
            FetchError: some could not be; all others are in place.
            SpaceError, TargetError: the disk does not take them.
            Interrupted: by Ctrl-C.
        """
        segments = sum(max(1, -(-job.file.size_bytes // self.grain.segment_bytes)) for job in self.jobs)
        threads = self._threads = [
            threading.Thread(target=self._work, daemon=True, name=f"fetch-{number}")
            for number in range(min(workers, segments))
        ]
        try:
            for thread in threads:
                thread.start()
            while (alive := next((thread for thread in threads if thread.is_alive()), None)) is not None:
                alive.join(0.1)
                self._say_hubs()
                if self._fatal is not None:
                    break
        except KeyboardInterrupt:
            self._stop(threads)
            raise interrupted(self.plan.target) from None
        except BaseException:
            self._stop(threads)
            raise
        if self._fatal is not None:
            self._stop(threads)
            raise self._fatal
        failed = [job.error for job in self.jobs if job.error is not None]
        if failed:
            raise FetchError(
                f"{len(failed):,} of {len(self.plan.files):,} files could not be fetched; all others are in place",
                failed,
                where=self.plan.target,
                fix="Run the same command again: it fetches only what is missing.",
            )

    def _stop(self, threads: Sequence[threading.Thread]) -> None:
        """End all work soon: streams are cut, and what a worker still does it does not write."""
        self.shared.stop.set()
        with self._changed:
            self._changed.notify_all()
        for transport in self._transports:
            transport.abort()
        deadline = time.monotonic() + STOP_S
        with suppress(KeyboardInterrupt):  # once more: then no longer
            for thread in threads:
                if thread.is_alive():
                    thread.join(max(0.0, deadline - time.monotonic()))

    def _say_hubs(self) -> None:
        given = {name: health.bytes_fetched for name, health in self.shared.health.items() if health.bytes_fetched}
        if len(given) > 1:
            total = sum(given.values())
            self.bar.note(", ".join(f"{name} {100 * count / total:.0f} %" for name, count in given.items()))
        else:
            self.bar.note("".join(given))

    # workers

    def _work(self) -> None:
        transport = Transport(self.shared.patience, self.shared.stop)
        self._transports.append(transport)
        last: Job | None = None
        try:
            while (claim := self._claim(last)) is not None:
                last = claim.job
                self._carry_out(claim, transport)
        except Stopped:
            pass
        except BaseException as error:
            self._fatal = self._fatal or error
            self.shared.stop.set()
        finally:
            transport.close()
            with self._changed:
                self._changed.notify_all()

    def _claim(self, last: Job | None) -> Claim | None:
        """The next piece of work; waits while others may yet leave some. None where nothing is left."""
        with self._changed:
            while not self.shared.stop.is_set():
                claim = self._find(last)
                if claim is not None:
                    claim.job.active += 1
                    return claim
                if all(job.over for job in self.jobs):
                    return None
                # What is left is being opened or finished, or its segments are all taken.
                if not any(job.stage in ("checking", "opening", "ready") for job in self.jobs):
                    return None
                self._changed.wait(0.5)
        return None

    def _find(self, last: Job | None) -> Claim | None:
        """A segment of the file that the worker was at, a file that nobody is at, or a segment of the file with most
        left."""
        if last is not None and self._is_open(last):
            return Claim(last, last.untaken.pop(0))
        for job in self.jobs:
            if job.stage in ("check", "new"):
                job.stage = "checking" if job.stage == "check" else "opening"
                return Claim(job)
        left = [job for job in self.jobs if self._is_open(job)]
        if not left:
            return None
        most = max(left, key=lambda job: len(job.untaken))
        return Claim(most, most.untaken.pop(0))

    def _is_open(self, job: Job) -> bool:
        return job.stage == "ready" and bool(job.untaken) and not (job.line.whole_only and job.active)

    def _carry_out(self, claim: Claim, transport: Transport) -> None:
        job = claim.job
        try:
            if job.stage == "checking":
                self._check(job)
            elif claim.segment is None:
                self._open(job, transport)
            else:
                self._fetch(job, claim.segment, transport)
            self._finish_if_whole(job, transport)
        except RangeIgnored:
            self._release(job, claim.segment)
        except (SpaceError, Stopped):
            raise
        except WeightkitError as error:
            self._fail(job, error)
        except OSError as error:
            problem = disk_problem(error, self.plan.target / job.file.path)
            if isinstance(problem, SpaceError):
                raise problem from error
            self._fail(job, problem)
        finally:
            with self._changed:
                job.active -= 1
                self._changed.notify_all()

    def _release(self, job: Job, segment: int | None) -> None:
        """Give a segment back: the server sends only whole files, so one worker has to take all that is left."""
        with self._changed:
            if segment is not None and segment not in job.untaken:
                job.untaken = sorted([segment, *job.untaken])

    def _fail(self, job: Job, error: WeightkitError) -> None:
        with self._changed:
            if job.stage != "failed":
                job.stage, job.error = "failed", error
        self.shared.tell(f"Failed: {error.message}")

    # steps

    def _check(self, job: Job) -> None:
        """Hash a file that is there under its final name; where it is wrong and ours, it is to be mended."""
        path = self.plan.target / job.file.path
        digests, prefixes, before = self._hash_file(job, path)
        if digests.match(job.file) and Stamp.of(path.stat()) == Stamp.of(before):
            stamp = FileStamp.of(before, digests.sha256.hexdigest(), job.file.content, prefixes, self.grain.chunk_bytes)
            self.record.stamp(job.file.path, stamp)
            self._done(job)
            return
        if not is_ours(job.file.path, self.plan.state):
            raise TargetError(
                "a file that no fetch put there is in the way",
                where=path,
                expected=job.file.content,
                found=f"sha256:{digests.sha256.hexdigest()}",
                fix="Move it away, or name another target.",
            )
        self.shared.tell(f"{job.file.path}: damaged since it was fetched; mended")
        self._show(job, -job.shown)
        with self._changed:
            job.stage = "new"

    def _hash_file(self, job: Job, path: Path) -> tuple[Digests, bytes, os.stat_result]:
        digests, prefixes, left = Digests(job.file), bytearray(), self.grain.chunk_bytes
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            while data := file.read(min(_READ_BYTES, left)):
                self._check_stop()
                digests.update(data)
                self._show(job, len(data))
                left -= len(data)
                if left == 0:
                    prefixes += digests.prefix()
                    left = self.grain.chunk_bytes
        if left < self.grain.chunk_bytes:
            prefixes += digests.prefix()
        return digests, bytes(prefixes), before

    def _open(self, job: Job, transport: Transport) -> None:
        """Take up what is there of a file: hash it, mend what is damaged."""
        path = job.file.path
        stamp, final = self.plan.state.stamps.get(path), self.plan.target / path
        kept = b""
        if os.path.lexists(final):  # ours, and damaged
            final.rename(final.with_name(final.name + PARTIAL))
        if stamp is not None and stamp.content == job.file.content and stamp.chunk_bytes == self.grain.chunk_bytes:
            kept = bytes.fromhex(stamp.prefixes)
        partial = Partial(self.plan.target, job.file, self.grain, kept)
        job.partial = partial
        self._show(job, partial.arrived_bytes)
        Mender(partial, job.line, transport, self._check_stop).hash_on()
        untaken = [n for n in range(partial.segments) if partial.next_of(n) < partial.end_of(n)]
        with self._changed:
            job.untaken, job.stage = untaken, "ready"

    def _fetch(self, job: Job, segment: int, transport: Transport) -> None:
        """One segment; of a file that comes only whole, all that is left."""
        partial = job.partial
        if partial is None or job.over:
            return
        whole = job.line.whole_only
        with self._changed:
            if whole:
                job.untaken = []
        begin = partial.front() if whole else partial.next_of(segment)
        end = partial.file.size_bytes if whole else partial.end_of(segment)

        def write(offset: int, data: bytes) -> None:
            self._check_stop()
            if job.error is not None:  # another worker found that the file does not come
                raise job.error
            partial.write(offset, data)
            self._show(job, len(data))

        if begin < end:
            job.line.pour(transport, begin, end, write, whole_ok=whole)
        partial.begin_writing_back(begin, end - begin)
        if partial.segments > 1:
            Mender(partial, job.line, transport, self._check_stop).hash_on()

    def _finish_if_whole(self, job: Job, transport: Transport) -> None:
        partial = job.partial
        with self._changed:
            if job.stage != "ready" or job.active > 1 or partial is None or not partial.whole:
                return
            job.stage = "finishing"
        mender = Mender(partial, job.line, transport, self._check_stop)
        if not mender.is_right():
            self.shared.tell(f"{job.file.path}: the checksum is wrong; looking for the damage")
            mender.mend()
        self._check_stop()
        sha256, prefixes, status = partial.finish()
        stamp = FileStamp.of(status, sha256, job.file.content, prefixes, self.grain.chunk_bytes)
        self.record.stamp(job.file.path, stamp)
        job.partial = None
        self._done(job)

    def _done(self, job: Job) -> None:
        with self._changed:
            job.stage = "done"
        self.bar.part_done()

    def _show(self, job: Job, count: int) -> None:
        job.shown += count
        self.bar.add(count)

    def _check_stop(self) -> None:
        if self.shared.stop.is_set():
            raise Stopped

    def close(self) -> None:
        """Let go of files that are not finished."""
        if any(thread.is_alive() for thread in self._threads):
            return  # still in a system call: a handle closed now could be another file's when it comes back
        for job in self.jobs:
            if job.partial is not None:
                job.partial.close()


def write_derived(plan: FetchPlan) -> None:
    """Write the files that ``--no-mtp`` has in place of the hub's, and stamp them."""
    for path, content in plan.derived.items():
        place = plan.target / path
        if path in plan.stale_derived:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, content)
        plan.state.stamps[path] = FileStamp.of(place.stat(), hashlib.sha256(content).hexdigest(), "derived")


def seal(plan: FetchPlan, record: Record) -> None:
    """All files are in place: derived ones, the record, the lock."""
    write_derived(plan)
    with suppress(OSError):
        for path in plan.skipped:  # begun before MTP files were left out
            (plan.target / (path + PARTIAL)).unlink(missing_ok=True)
    named = {path: plan.listing.files[path] for path in (*plan.files, *plan.derived)}
    lock = make_lock(plan.listing, named, plan.state, no_mtp=plan.no_mtp)
    if plan.state.lock is not None:
        earlier = {path: file for path, file in plan.state.lock.files.items() if path in plan.listing.files}
        lock = Lock({**earlier, **lock.files}, lock.origin)
    record.complete(lock)
