"""The spool: no more of the disk than was given, nothing unverified, nobody waits forever, hardly a byte twice."""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from weightkit.checkpoint import Stored
from weightkit.checkpoint.stamp import Stamp
from weightkit.errors import ChecksumError, Interrupted, SpaceError, UnreachableError
from weightkit.layouts import FileSet
from weightkit.remote.ranges import Version
from weightkit.writer.executor import Written, execute
from weightkit.writer.plan import Plan, make_plan
from weightkit.writer.sourcing import Sourcing, plan_sourcing
from weightkit.writer.spool import Spool

SIZE = 40_000
NAMES = [f"https://host/source{n}" for n in range(5)]
CONTENT = {name: random.Random(name).randbytes(SIZE) for name in NAMES}


class Server:
    """In the place of ``RemoteFiles``: hands out ``content``, counts, and fails where it is told to."""

    def __init__(self, folder: Path) -> None:
        self.stop = threading.Event()
        self.content = dict(CONTENT)
        self.sent: Counter[str] = Counter()
        self.fail_from: dict[str, int] = {}
        self.most_on_disk = 0
        self._folder, self._lock = folder, threading.Lock()

    def read(self, address: str, version: Version, offset: int, out: memoryview) -> None:
        if offset + len(out) > self.fail_from.get(address, SIZE):
            raise UnreachableError("down", where=address)
        out[:] = self.content[address][offset : offset + len(out)]
        with self._lock:
            self.sent[address] += len(out)
            self.most_on_disk = max(self.most_on_disk, sum(_size(path) for path in self._folder.iterdir()))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # dropped since it was listed
        return 0


def plan_of(target: Path, outputs: dict[str, list[str]], *, known: bool = True) -> Plan:
    """Outputs that hold all bytes of these sources, a tensor each, in this order."""
    files = {
        f"{output}.safetensors": {
            f"{place}.{name.rpartition('/')[2]}": Stored(name, 0, "U8", (SIZE,)) for place, name in enumerate(names)
        }
        for output, names in outputs.items()
    }
    stamps = {
        name: Stamp(SIZE, 0, "tag", hashlib.sha256(CONTENT[name]).hexdigest() if known else None) for name in NAMES
    }
    return make_plan(FileSet(files, {}, False, stamps, "https://host"), target)


@contextmanager
def spool_of(plan: Plan, server: Server, limit: int, told: list[str] | None = None, jobs: int = 0) -> Iterator[Spool]:
    sourcing = Sourcing(plan.stamps, tuple(plan.stamps), limit, jobs or len(plan.files))
    verified: list[str] = []
    outputs = [(file, 0) for file in plan.files]
    said = [] if told is None else told
    spool = Spool(server._folder, sourcing, outputs, server, verified=verified.append, tell=said.append)  # type: ignore[arg-type]
    try:
        yield spool
    finally:
        spool.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr("weightkit.writer.spool.CHUNK_BYTES", 9_000)
    (tmp_path / "spool").mkdir()
    return Server(tmp_path / "spool")


def read_through(spool: Spool, plan: Plan, which: int) -> list[bytes]:
    """As a worker does: all tensors of an output, one after the other."""
    output, found = plan.files[which], []
    position = len(output.header)
    spool.begin(output, 0)
    for tensor in output.tensors.values():
        assert isinstance(tensor, Stored)
        out = np.empty(SIZE, np.uint8)
        for start in range(0, SIZE, 15_000):
            spool.read(tensor.path, start, out[start : start + 15_000])
            position += len(out[start : start + 15_000])
            spool.passed(output, position)
        found.append(out.tobytes())
    spool.end(output)
    return found


def in_threads(spool: Spool, plan: Plan) -> list[list[bytes]]:
    with ThreadPoolExecutor(len(plan.files)) as workers:
        found = [workers.submit(read_through, spool, plan, which) for which in range(len(plan.files))]
        waiting = wait(found, timeout=60).not_done
        if waiting:
            spool.close()  # else they would never end
    assert not waiting, "workers wait for each other"
    return [future.result() for future in found]


def test_each_file_is_fetched_once_and_dropped(tmp_path: Path, server: Server) -> None:
    """Eight ranks go through the same five files: two of them on the disk at a time are enough."""
    plan = plan_of(tmp_path / "out", {f"rank{n}": NAMES for n in range(8)})
    with spool_of(plan, server, 2 * SIZE) as spool:
        assert in_threads(spool, plan) == [[CONTENT[name] for name in NAMES]] * 8
        assert list(server._folder.iterdir()) == []
    assert server.sent == dict.fromkeys(NAMES, SIZE)
    assert spool.fetched_bytes == 5 * SIZE
    assert server.most_on_disk <= 2 * SIZE


def test_workers_in_opposite_directions_come_through(tmp_path: Path, server: Server) -> None:
    """With room for one file each holds what the other waits for: one is given up and fetched again."""
    plan = plan_of(tmp_path / "out", {"up": NAMES, "down": NAMES[::-1]})
    told: list[str] = []
    with spool_of(plan, server, SIZE, told) as spool:
        up, down = in_threads(spool, plan)
    assert up == [CONTENT[name] for name in NAMES] == down[::-1]
    assert server.most_on_disk <= SIZE
    assert any("fetched again" in line for line in told)


def test_a_later_output_does_not_hold_up_the_first(tmp_path: Path, server: Server) -> None:
    """One worker, two outputs of the same files, room for two files: what only the second needs is given up."""
    plan = plan_of(tmp_path / "out", {"first": NAMES, "second": NAMES})
    with spool_of(plan, server, 2 * SIZE, jobs=1) as spool:
        for which in range(2):
            assert read_through(spool, plan, which) == [CONTENT[name] for name in NAMES]
    assert server.most_on_disk <= 2 * SIZE


def test_wrong_bytes_are_fetched_again_and_then_named(tmp_path: Path, server: Server) -> None:
    plan = plan_of(tmp_path / "out", {"out": NAMES[:1]})
    server.content[NAMES[0]] = bytes(SIZE)
    with spool_of(plan, server, SIZE) as spool, pytest.raises(ChecksumError, match=f"{NAMES[0]}: the content"):
        read_through(spool, plan, 0)
    assert server.sent[NAMES[0]] == 2 * SIZE
    assert list(server._folder.iterdir()) == [], "nothing that is wrong stays"


@pytest.mark.parametrize("damaged", [False, True])
def test_a_stopped_fetch_is_continued(damaged: bool, tmp_path: Path, server: Server) -> None:
    plan = plan_of(tmp_path / "out", {"out": NAMES[:1]})
    server.fail_from[NAMES[0]] = 30_000
    with spool_of(plan, server, SIZE) as spool, pytest.raises(UnreachableError):
        read_through(spool, plan, 0)
    (left,) = server._folder.iterdir()
    assert left.stat().st_size == 27_000
    if damaged:
        with left.open("r+b") as file:
            file.write(b"\0\0\0\0")
    server.fail_from.clear()
    server.sent.clear()
    server.stop.clear()
    with spool_of(plan, server, SIZE) as spool:
        assert read_through(spool, plan, 0) == [CONTENT[NAMES[0]]]
    assert server.sent[NAMES[0]] == SIZE - 27_000 + damaged * SIZE


def test_a_read_that_waits_is_stopped(tmp_path: Path, server: Server) -> None:
    plan = plan_of(tmp_path / "out", {"out": NAMES[:1]})

    def read(address: str, *_: object) -> None:
        assert server.stop.wait(10)
        raise Interrupted("stopped", where=address)

    server.read = read  # type: ignore[assignment,method-assign]
    with spool_of(plan, server, SIZE) as spool:
        threading.Timer(0.1, server.stop.set).start()
        with pytest.raises(Interrupted):
            read_through(spool, plan, 0)


def test_what_nobody_needs_is_removed_at_the_start(tmp_path: Path, server: Server) -> None:
    (server._folder / ("0" * 64)).write_bytes(b"of another source")
    plan = plan_of(tmp_path / "out", {"out": NAMES[:1]})
    with spool_of(plan, server, SIZE):
        assert "0" * 64 not in {path.name for path in server._folder.iterdir()}


# --- how much, and for what -------------------------------------------------------------------------------------------


def test_ranks_that_share_their_sources_are_written_together(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "out", {f"rank{n}": NAMES for n in range(12)})
    assert plan_sourcing(plan, {}).jobs == 12
    assert plan_sourcing(plan, {}, jobs=3).jobs == 3
    assert plan_sourcing(plan, {}, jobs=3, limit_bytes=2 * SIZE).refetched == 4
    assert plan_sourcing(plan, {}).refetched == 1


def test_a_spool_that_is_too_small_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "out", {"out": NAMES})
    with pytest.raises(
        SpaceError, match=f"--spool: too small .* expected at least {SIZE:,} bytes, found 39,999"
    ) as told:
        plan_sourcing(plan, {}, limit_bytes=SIZE - 1)
    assert "--spool 0 reads ranges alone" in str(told.value)
    assert plan_sourcing(plan, {}, limit_bytes=SIZE).limit_bytes == SIZE


def test_a_disk_with_less_room_than_wished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path / "out", {"out": NAMES})
    outputs = plan.bytes_written + (16 << 20)
    monkeypatch.setattr("weightkit.writer.sourcing.free_disk_bytes", lambda target: outputs + 2 * SIZE)
    assert plan_sourcing(plan, {}).limit_bytes == 2 * SIZE
    monkeypatch.setattr("weightkit.writer.sourcing.free_disk_bytes", lambda target: outputs + SIZE - 1)
    with pytest.raises(SpaceError, match="not enough free space for the source files on their way"):
        plan_sourcing(plan, {})


def test_what_is_not_recorded_or_not_wanted_is_read_by_ranges(tmp_path: Path) -> None:
    outputs = {"out": NAMES[:2]}
    for sourcing in (
        plan_sourcing(plan_of(tmp_path / "out", outputs, known=False), {}),
        plan_sourcing(plan_of(tmp_path / "out", outputs), {}, limit_bytes=0),
        plan_sourcing(plan_of(tmp_path / "out", outputs), {}, elsewhere=True),
    ):
        assert (sourcing.spooled, sourcing.limit_bytes) == ((), 0)
        assert sourcing.unverified == tuple(NAMES[:2])


# --- through the writer -----------------------------------------------------------------------------------------------


@pytest.fixture
def remote(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Readers read from ``server``."""
    monkeypatch.setattr("weightkit.checkpoint.reading.RemoteFiles", lambda stop: _Stoppable(server, stop))
    server._folder = tmp_path / "out/.weightkit/spool"
    server._folder.mkdir(parents=True)
    return server


class _Stoppable:
    def __init__(self, server: Server, stop: threading.Event) -> None:
        self.stop, self.read = stop, server.read

    def close(self) -> None:
        pass


def write(plan: Plan, **options: int | None) -> Written:
    return execute(plan, progress=False, **options)  # type: ignore[arg-type]


def test_a_run_that_failed_is_continued_and_says_all_that_was_verified(tmp_path: Path, remote: Server) -> None:
    plan = plan_of(tmp_path / "out", {"a": NAMES[:2], "b": NAMES[2:]})
    remote.fail_from[NAMES[4]] = 0
    with pytest.raises(UnreachableError):
        write(plan, jobs=1, spool_bytes=2 * SIZE)  # no room for the last source before the first output is made
    assert (tmp_path / "out/a.safetensors").exists()
    remote.fail_from.clear()
    remote.sent.clear()
    written = write(plan, jobs=1)
    assert set(remote.sent) <= set(NAMES[2:]), "the first output needs nothing any more"
    assert written.verified == tuple(NAMES)
    assert (tmp_path / "out/b.safetensors").read_bytes().endswith(b"".join(CONTENT[name] for name in NAMES[2:]))
    assert not (tmp_path / "out/.weightkit").exists()


def test_what_an_earlier_run_read_by_ranges_is_not_called_verified(tmp_path: Path, remote: Server) -> None:
    plan = plan_of(tmp_path / "out", {"a": NAMES[:2], "b": NAMES[2:]})
    remote.fail_from[NAMES[4]] = 0
    with pytest.raises(UnreachableError):
        write(plan, jobs=1, spool_bytes=0)
    remote.fail_from.clear()
    written = write(plan, jobs=1)
    assert written.unverified == tuple(NAMES)
