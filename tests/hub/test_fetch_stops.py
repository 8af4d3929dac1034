"""A fetch that is killed, stopped or run twice: whatever happens, the next run continues."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from faulty_hub import Cut, Delay, FaultyHub, Flip, Stall, Status, Throttle
from fetching import FIRST, NAME, SIZE, WEIGHTS, content, get, kept_bytes, require_whole, total

from weightkit.durable import only_writer
from weightkit.errors import FetchError, FormatError, TargetError
from weightkit.hub import Grain

#: Of kills at random times. More: SEEDS=50.
SEEDS = int(os.environ.get("SEEDS", "1"))
#: Imports once, then forks a child for each run and kills it at a random time: a run begins in milliseconds.
FORKER = """
import json, os, random, signal, sys, time
import huggingface_hub, modelscope_hub, requests, weightkit.hub.api
from huggingface_hub import HfApi
sys.path.insert(0, {folder!r})
from fetching import get, kept_bytes
from pathlib import Path
target, source = Path({target!r}), Path({source!r})
chance, kept, failures = random.Random({seed}), [], 0
while True:
    child = os.fork()
    if child == 0:
        try:
            done = get(target, hub={hub!r}, jobs=4)
            print(sum(done.fetched_bytes.values()), flush=True)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if len(kept) < {least} or chance.random() < {later}:
        until = time.monotonic() + {progress_s}
        while kept_bytes(target, source) <= max(kept, default=0) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(chance.uniform({shortest}, {longest}))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and (status == 0 or failures == {failures}):
        print(json.dumps([os.WEXITSTATUS(status), kept]))
        break
    if os.WIFEXITED(status):
        failures += 1
        continue
    kept.append(kept_bytes(target, source))
    if len(kept) == {least}:
        print("enough", flush=True)
        sys.stdin.readline()
"""


@dataclass(frozen=True)
class Killed:
    """Of runs until one ended well: bytes in the target after each that was killed, and what the last one fetched."""

    kept: list[int]
    fetched_bytes: int


def run_killed(
    target: Path,
    source: Path,
    hub: str,
    shortest: float,
    longest: float,
    *,
    seed: int,
    least: int,
    later: float = 0.5,
    failures: int = 0,
    progress_s: float = 0,
    enough: Callable[[], object] = lambda: None,
) -> Killed:
    """Fetch until a run ends well. So many may end with an error before it.

    ``least`` runs are killed, unless one ends before; then ``enough`` is called, and a run is killed with the
    probability ``later``. Each is first given ``progress_s`` to bring something.
    """
    code = FORKER.format(
        folder=str(Path(__file__).parent),
        target=str(target),
        source=str(source),
        hub=hub,
        shortest=shortest,
        longest=longest,
        seed=seed,
        least=least,
        later=later,
        failures=failures,
        progress_s=progress_s,
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as forker:
        assert forker.stdout is not None
        if (said := forker.stdout.readline()) == "enough\n":
            enough()
            said = ""
        out, errors = forker.communicate("\n", timeout=600)
    assert forker.returncode == 0, errors
    *fetched, told = (said + out).splitlines()
    status, kept = json.loads(told)
    assert status == 0, errors
    return Killed(kept, *map(int, fetched))


@pytest.mark.slow
@pytest.mark.parametrize(("hub", "kills"), [("huggingface", 50), ("auto", 20)])
def test_killed_often_over_one_download(
    hub: str, kills: int, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    """Slow, and without an end, until all kills have hit; in the end the bytes are equal, and none that had arrived was
    fetched again."""
    fetch_hub.fail(Throttle(130_000, 2048), path="model-*", times=None)
    fetch_hub.fail(Stall(at=SIZE - 1), path="model-*", times=None)
    target = tmp_path / "target"
    killed = run_killed(
        target, fetch_source, hub, 0.0, 0.1, seed=1, least=kills, later=0, progress_s=120, enough=fetch_hub.clear
    )
    assert len(killed.kept) == kills
    assert killed.kept == sorted(set(killed.kept))  # each run brought something
    assert killed.fetched_bytes == total(fetch_source) - killed.kept[-1]
    require_whole(target, fetch_source)


@pytest.mark.parametrize("faults", [False, True], ids=["no faults", "faults"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_anywhere(seed: int, faults: bool, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """At full speed, so that kills fall on listings, renames, records, mending and locks, too."""
    if faults:
        fetch_hub.fail(Flip(at=400_000), path="model-*", times=6, skip=2)
        fetch_hub.fail(Cut(after=200_000), path="model-*", times=10)
    target, failures = tmp_path / "target", 3 if faults else 0
    run_killed(target, fetch_source, "huggingface", 0.005, 0.12, seed=seed, least=25, failures=failures)
    require_whole(target, fetch_source)


#: The command line, which waits for a silent server longer than the tests do.
PATIENT = """
import functools, sys
import weightkit.hub.api as api
api.Patience = functools.partial(api.Patience, stall_s=3600.0)
from weightkit.cli import main
main(sys.argv[1:])
"""


def command(hub: FaultyHub, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "MODELSCOPE_ENDPOINT": hub.endpoint}
    return subprocess.Popen(
        [sys.executable, "-c", PATIENT, "fetch", NAME, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("state", ["streaming", "stalled", "waiting for an answer", "waiting to try again"])
def test_a_signal_stops_at_once(
    state: str, number: signal.Signals, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    if state == "streaming":  # by drops: what is on its way when the signal comes is little, however late it comes
        fetch_hub.fail(Throttle(1000, 256, after=200_000), path="model-*", times=None)
    elif state == "stalled":
        fetch_hub.fail(Stall(after=100_000), path="model-*", times=None)
    elif state == "waiting for an answer":
        fetch_hub.fail(Delay(3600), path="model-*", times=None)
    else:
        fetch_hub.fail(Status(503, {"Retry-After": "800"}), path="model-*", times=None)
    target = tmp_path / "target"
    process = command(fetch_hub, str(target), "--hub", "huggingface")
    if state in ("streaming", "stalled"):
        least = len(WEIGHTS) * (200_000 if state == "streaming" else 100_000)
        wait_for("nothing is fetched", lambda: kept_bytes(target, fetch_source, Grain().segment_bytes) >= least)
    else:
        # one that is told to wait has the others wait as well, which may not have asked yet
        least = 1 if state == "waiting to try again" else len(WEIGHTS)
        wait_for("not all is asked for", lambda: len(fetch_hub.requests(path="model-*", route="body")) >= least)
    if state == "waiting to try again":
        fetch_hub.settle()
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)  # what it waits for takes longer
    assert process.returncode == 130
    assert "Run the same command again to continue." in errors
    assert "Traceback" not in errors
    sent = fetch_hub.sent_bytes()
    fetch_hub.clear()
    get(target)
    require_whole(target, fetch_source)
    if state == "streaming":
        assert fetch_hub.sent_bytes() <= total(fetch_source) + 4 * 16_384 * 2
        assert sent > 0


def test_one_writer_a_target(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    with only_writer(tmp_path / "target"), pytest.raises(TargetError, match="another process is writing there"):
        get(tmp_path / "target")


def test_two_at_once_into_one_target(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """The others are told; the first is not disturbed. It is slow until they are."""
    fetch_hub.fail(Throttle(10_000), path="model-*", times=None)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            get(tmp_path / "target")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 40  # a segment takes 52 s
    while len(failures) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    fetch_hub.clear()
    for thread in threads:
        thread.join()
    assert [type(error) for error in failures] == [TargetError] * 2
    require_whole(tmp_path / "target", fetch_source)


def test_a_finished_fetch_is_not_read_again(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """No byte hashed, no body asked for; one question about the branch."""
    target = tmp_path / "target"
    get(target)
    asked = len(fetch_hub.log)
    for path in target.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(0, path.stat().st_mtime_ns))  # so that a read shows, where reads are recorded at all
    get(target)  # that changed ctime: hashed once more
    before = {path: path.stat().st_atime_ns for path in target.glob("*.safetensors")}
    done = get(target)
    assert done.fetched_bytes == {}
    assert {path: path.stat().st_atime_ns for path in before} == before
    assert [exchange.route for exchange in fetch_hub.log[asked:]] == ["info", "info"]
    require_whole(target, fetch_source)


def test_a_touched_file_is_hashed_and_not_fetched(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    get(target)
    os.utime(target / FIRST)
    done = get(target)
    assert sum(done.fetched_bytes.values()) == 0
    require_whole(target, fetch_source)
    assert get(target).fetched_bytes == {}


def test_lost_record_costs_hashing_alone(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    get(target)
    for text in (
        None,
        "{",
        '{"version": 1, "listings": 3, "stamps": []}',
        '{"version": 1, "listings": [{}], "stamps": {}}',
    ):
        if text is None:
            (target / ".weightkit.fetch.json").unlink()
        else:
            (target / ".weightkit.fetch.json").write_text(text)
        done = get(target)
        assert sum(done.fetched_bytes.values()) == 0
        require_whole(target, fetch_source)


def test_killed_at_its_very_end(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """The lock is written, the traces of the work are not gone: the next run takes them away, offline too."""
    target = tmp_path / "target"
    get(target)
    (target / ".weightkit/parts").mkdir(parents=True)
    (target / ".weightkit/stamps.jsonl").write_text('{"path": "x", "stamp": {}}\n{"path": "conf')
    fetch_hub.stop()
    assert sum(get(target).fetched_bytes.values()) == 0
    require_whole(target, fetch_source)


def test_finished_target_needs_no_network(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    target = tmp_path / "target"
    get(target, hub="auto")
    fetch_hub.stop()
    done = get(target, hub="auto")
    assert done.fetched_bytes == {}
    assert "does not answer" in done.notes[0]


def test_damaged_lock_is_written_again(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    get(target)
    (target / "weightkit.lock.json").write_text("{")
    assert sum(get(target).fetched_bytes.values()) == 0
    require_whole(target, fetch_source)
    (target / "weightkit.lock.json").write_text("{")
    (target / ".weightkit.fetch.json").unlink()
    with pytest.raises(FormatError, match=r"Remove weightkit\.lock\.json"):
        get(target)


def test_files_of_another_tool_are_adopted(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """A folder that another downloader filled in part: what is right is kept."""
    target = tmp_path / "target"
    target.mkdir()
    (target / FIRST).write_bytes((fetch_source / FIRST).read_bytes())
    done = get(target)
    assert done.fetched_bytes["huggingface"] == total(fetch_source) - SIZE
    require_whole(target, fetch_source)


@pytest.mark.parametrize("size", ["same size", "another size"])
def test_a_file_of_somebody_else_is_in_the_way(size: str, fetch_hub: FaultyHub, tmp_path: Path) -> None:
    """It is neither overwritten nor removed."""
    target = tmp_path / "target"
    target.mkdir()
    mine = random.Random(9).randbytes(SIZE if size == "same size" else 1000)
    (target / FIRST).write_bytes(mine)
    with pytest.raises((TargetError, FetchError), match="in the way"):
        get(target)
    assert (target / FIRST).read_bytes() == mine


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "link of a partial", "file for a folder", "linked folder"])
def test_what_is_no_file_is_in_the_way(kind: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    if kind == "folder":
        (target / FIRST).mkdir()
    elif kind == "link":
        (target / FIRST).symlink_to(outside / "file")
    elif kind == "pipe":
        os.mkfifo(target / FIRST)
    elif kind == "link of a partial":
        (target / f"{FIRST}.partial").symlink_to(outside / "file")
    elif kind == "file for a folder":
        (target / "inference").write_text("mine")
    else:
        (target / "inference").symlink_to(outside)
    with pytest.raises(TargetError, match="in the way"):
        get(target)
    assert content(outside) == {"file": b"precious"}
    assert not fetch_hub.sent_bytes()


def test_a_target_that_may_not_be_written(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("a file")
    with pytest.raises(TargetError, match="not a folder"):
        get(target)
    if os.geteuid():
        closed = tmp_path / "closed"
        closed.mkdir(0o500)
        with pytest.raises(TargetError):
            get(closed)
        with pytest.raises(TargetError):
            get(closed / "below")
