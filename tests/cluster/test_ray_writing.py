"""Files written by tasks of a real Ray cluster: several raylets on loopback, workers and nodes that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import ray
from clusters import environment, lines, second, wait_for
from folders import tree
from slow_work import DURABLE_BYTES, HELD_AT_BYTES, SlowRay, gate_of, log_of
from tiny import MOONLIGHT, write_safetensors, write_tiny

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.cluster import RayExecutor, RayReaders, connection, crew
from weightkit.cluster.connection import Node, connect, find, require_answer
from weightkit.cluster.crew import Crew, Needs, require_room
from weightkit.errors import ClusterError, DeviceError, HeaderError, SpaceError
from weightkit.layouts import FileSet
from weightkit.manifests import load

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "v3"
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def stripped(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that this process makes of it, by name."""
    target = tmp_path_factory.mktemp("local") / "out"
    wk.write(wk.strip_mtp(wk.open_checkpoint(source)), target, progress=False)
    return tree(target)


def run(*arguments: object, cwd: Path, script: str = "-mweightkit") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


# --- the same bytes ---------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Checkpoint], Checkpoint | FileSet]] = {
    "strip": wk.strip_mtp,
    "cast": lambda checkpoint: wk.cast(checkpoint, "bf16"),
    "shard": lambda checkpoint: wk.shard(checkpoint, mp=4),
    "shard and cast": lambda checkpoint: wk.shard(wk.cast(wk.strip_mtp(checkpoint), "bf16"), ep=3),
}


@pytest.mark.parametrize("model", ["tiny", "pico"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_as_here(kind: str, model: str, source: Path, address: str, tmp_path: Path) -> None:
    shipped = load("pico").path
    assert shipped is not None
    what = KINDS[kind](wk.open_checkpoint(source if model == "tiny" else shipped))
    here = wk.write(what, tmp_path / "here", device="cpu", progress=False)
    there = wk.write(what, tmp_path / "there", executor=RayExecutor(address), progress=False)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert (there.files, there.size_bytes) == (here.files, here.size_bytes)
    assert (there.written_bytes, there.read_bytes) == (here.written_bytes, here.read_bytes)


def test_merge_from_a_relative_path(
    source: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks run in another folder than this process."""
    monkeypatch.chdir(tmp_path)
    wk.write(wk.shard(wk.open_checkpoint(source), mp=2), "mp2", progress=False)
    merged = wk.merge(wk.open_checkpoint("mp2"))
    wk.write(merged, "here", progress=False)
    wk.write(merged, "there", executor=RayExecutor(address), progress=False)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_the_command(source: Path, address: str, stripped: dict[str, bytes], tmp_path: Path) -> None:
    options = ["--executor", "ray", "--address", address, "--json"]
    done = run("strip", source, "out", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written_bytes"] == sum(
        len(content) for name, content in stripped.items() if name.endswith(".safetensors")
    )
    assert done.stderr == ""
    assert tree(tmp_path / "out") == stripped
    again = run("strip", source, "out", *options, cwd=tmp_path)
    assert json.loads(again.stdout)["written_bytes"] == 0


# --- deaths -----------------------------------------------------------------------------------------------------------


class Writing(threading.Thread):
    """A slow write on the cluster, in the background. Its files stay in part until it may ``go_on``."""

    def __init__(self, source: Path, target: Path, **options: object) -> None:
        super().__init__()
        self.plan, self.target, self.options = wk.strip_mtp(wk.open_checkpoint(source)), target, options
        self.failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            wk.write(self.plan, self.target, executor=SlowRay(**self.options), progress=False)  # type: ignore[arg-type]
        except BaseException as exc:
            self.failure = exc

    def reads(self) -> list[list[str]]:
        return lines(log_of(self.target))

    def go_on(self) -> None:
        gate_of(self.target).touch()
        self.join(180)
        assert not self.is_alive()

    def end(self) -> None:
        self.go_on()
        assert self.failure is None, self.failure


def durable(target: Path, files: int = 1) -> bool:
    """Whether a journal in ``target`` vouches for all that so many files can have while they are held."""
    parts = [json.loads("".join(line)) for line in lines(target / ".weightkit/journal.jsonl")[1:]]
    return len({part["file"] for part in parts if part["bytes"] >= HELD_AT_BYTES - 2 * DURABLE_BYTES}) >= files


def reads_by_file(log: list[list[str]]) -> dict[str, Counter[tuple[str, str, int]]]:
    """How often each place of a source, and so many bytes there, were read, by the file that they were read for."""
    found: dict[str, Counter[tuple[str, str, int]]] = {}
    for name, _, path, offset, size_bytes in log:
        found.setdefault(name, Counter())[path, offset, int(size_bytes)] += 1
    return found


def test_a_worker_that_dies_costs_its_file_alone(
    source: Path, address: str, stripped: dict[str, bytes], tmp_path: Path
) -> None:
    writing = Writing(source, tmp_path / "out", jobs=2)
    wait_for("progress", lambda: durable(writing.target, 2))
    name, pid = writing.reads()[-1][:2]
    os.kill(int(pid), signal.SIGKILL)
    writing.end()
    assert tree(writing.target) == stripped
    processes: dict[str, set[str]] = {}
    for file, process, *_ in writing.reads():
        processes.setdefault(file, set()).add(process)
    assert [file for file, found in processes.items() if len(found) > 1] == [name]
    repeated = {
        file: sum((count - 1) * size_bytes for (*_, size_bytes), count in places.items())
        for file, places in reads_by_file(writing.reads()).items()
    }
    assert {file for file, count in repeated.items() if count} == {name}
    assert repeated[name] <= 4 * DURABLE_BYTES  # it went on where it was known to be durable


def test_a_node_that_dies_is_survived(source: Path, address: str, stripped: dict[str, bytes], tmp_path: Path) -> None:
    with second(address, cpus=2) as node:
        writing = Writing(source, tmp_path / "out", jobs=2)
        members: set[str] = set()

        def both_nodes_write() -> bool:
            nonlocal members
            members = {str(pid) for pid in node.members()}
            writers = {pid for _, pid, *_ in writing.reads()}
            return bool(writers & members and writers - members) and durable(writing.target)

        wait_for("a file in work on each node", both_nodes_write)
        node.kill()
        writing.end()
    assert tree(writing.target) == stripped
    lost = {file for file, pid, *_ in writing.reads() if pid in members}
    assert lost
    again = {file for file, pid, *_ in writing.reads() if pid not in members}
    kept = reads_by_file([line for line in writing.reads() if line[0] not in lost])
    assert lost <= again
    assert all(count == 1 for places in kept.values() for count in places.values())


def test_workers_that_outlive_their_raylet_do_no_harm(
    source: Path, address: str, stripped: dict[str, bytes], tmp_path: Path
) -> None:
    """They go on for a while, and may write the same file as those that were sent in their place."""
    with second(address, cpus=2) as node:
        writing = Writing(source, tmp_path / "out", jobs=2)
        wait_for(
            "a file in work there",
            lambda: {pid for _, pid, *_ in writing.reads()} & {str(pid) for pid in node.members()},
        )
        node.kill_raylet()
        writing.end()
        time.sleep(0.5)
    assert tree(writing.target) == stripped


def stopped_driver(number: signal.Signals, source: Path, target: Path, address: str) -> None:
    """Strip slowly, in a process that gets a signal when two files are in part on the disk."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "driver.py"), str(source), str(target), address],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for("progress", lambda: durable(target, 2))
    process.send_signal(number)
    output, errors = process.communicate(timeout=180)
    if number == signal.SIGKILL:
        return
    assert process.returncode == 130, errors
    assert output == ""
    assert "Run the same command again" in errors
    assert "Traceback" not in errors


def test_a_driver_that_was_stopped_is_continued(
    source: Path, address: str, stripped: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    stopped_driver(signal.SIGTERM, source, target, address)
    kept = {line[0]: line for line in lines(target / ".weightkit/journal.jsonl")[1:]}
    assert len(kept) >= 2
    written = wk.write(wk.strip_mtp(wk.open_checkpoint(source)), target, executor=RayExecutor(address), progress=False)
    assert tree(target) == stripped
    assert 0 < written.written_bytes <= written.size_bytes - 2 * DURABLE_BYTES


def test_a_driver_that_was_killed_is_continued_here(
    source: Path, address: str, stripped: dict[str, bytes], tmp_path: Path
) -> None:
    """At once, while its workers may still be at it."""
    target = tmp_path / "out"
    stopped_driver(signal.SIGKILL, source, target, address)
    written = wk.write(wk.strip_mtp(wk.open_checkpoint(source)), target, progress=False)
    assert 0 < written.written_bytes <= written.size_bytes - 2 * DURABLE_BYTES
    time.sleep(1.0)  # a worker that was not yet ended would have written by now
    assert tree(target) == stripped


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_in_one_file_is_told_as_ours(address: str, tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "moonlight", MOONLIGHT, shards=1, pattern="model.safetensors")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    dtype, shape, data = contents[name]
    words = np.frombuffer(data, np.uint16).copy()
    words[7] = 0x4780  # 65536
    write_safetensors(tmp_path / "moonlight/model.safetensors", contents | {name: (dtype, shape, words.tobytes())})
    (tmp_path / "moonlight/model.safetensors.index.json").unlink()
    done = run("cast", "moonlight", "out", "--to", "f16", "--executor", "ray", "--address", address, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {name} (on ")
    assert "values do not fit F16: expected at most 65504, found 1 that became Inf" in done.stderr
    assert "Use --to bf16" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("values do not fit") == 1  # not tried again


def test_the_first_failure_stops_the_others(
    source: Path, address: str, stripped: dict[str, bytes], tmp_path: Path
) -> None:
    """And what they have done until then is kept."""
    writing = Writing(source, tmp_path / "out", jobs=2)
    wait_for("progress", lambda: durable(writing.target, 2))
    partial = writing.target / f"{writing.reads()[-1][0]}.partial"
    partial.unlink()
    partial.mkdir()
    writing.go_on()
    assert isinstance(writing.failure, HeaderError)
    assert f"{partial} (on " in str(writing.failure)
    partial.rmdir()
    assert not (writing.target / "weightkit.lock.json").exists()
    written = wk.write(wk.strip_mtp(wk.open_checkpoint(source)), writing.target, progress=False)
    assert tree(writing.target) == stripped
    assert written.written_bytes < written.size_bytes


def test_what_the_nodes_cannot_do(source: Path, address: str, tmp_path: Path) -> None:
    cast = wk.cast(wk.open_checkpoint(source), "bf16")
    with pytest.raises(DeviceError, match="no node of the cluster has a GPU"):
        wk.write(cast, tmp_path / "out", executor=RayExecutor(address, device="cuda"), progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SpaceError, match="has the memory for one task"):
        require_room([Node("1", "small", "127.0.0.1", 4.0, 0.0, 1e8)], Needs(1 << 30), None)


def test_a_task_that_waits_for_others_is_told_of(
    source: Path,
    address: str,
    stripped: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(crew, "BEGIN_S", 0.3)
    told, tell = tmp_path / "told", Crew._tell_of_waiting

    def wait_until_told() -> None:
        until = time.monotonic() + 180
        while not told.exists() and time.monotonic() < until:
            time.sleep(0.02)

    def tell_and_make_way(working: Crew, task: crew._Task) -> None:
        tell(working, task)
        told.touch()

    monkeypatch.setattr(Crew, "_tell_of_waiting", tell_and_make_way)
    busy = ray.remote(wait_until_told).options(num_cpus=2).remote()
    wait_for("the CPUs are not taken", lambda: not ray.available_resources().get("CPU"))
    wk.write(wk.strip_mtp(wk.open_checkpoint(source)), tmp_path / "out", executor=RayExecutor(address))
    ray.get(busy)
    assert tree(tmp_path / "out") == stripped
    assert capfd.readouterr().err.count("waits to begin there. Others may use the CPUs") == 1


class Unknown:
    """An argument that another weightkit has no class for."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("from weightkit.checkpoint.stamp import Stump",)


def test_another_weightkit_that_cannot_read_what_it_is_sent(address: str) -> None:
    class Errand:
        name, size_bytes = "file", 1

    asked = Crew(connect(address), lambda order: iter(()), Needs(1), look=(lambda _: None, (Unknown(),)))
    with pytest.raises(ClusterError, match=r"another weightkit \(.*cannot import name 'Stump'") as caught:
        asked.carry_out([Errand()])  # type: ignore[list-item]
    assert "Install the same weightkit on every node" in str(caught.value)


def test_a_node_that_does_not_see_the_files(source: Path, address: str, tmp_path: Path) -> None:
    """A raylet with another view of the filesystem, as on a machine where it is not mounted."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    mounted = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh")
    if subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    with second(address, cpus=1, prefix=mounted):
        with pytest.raises(ClusterError, match="does not see the target") as caught:
            wk.write(wk.open_checkpoint(source), hidden / "out", executor=RayExecutor(address), progress=False)
        assert "(on " in str(caught.value)
        assert "filesystem that all nodes share" in str(caught.value)
        write_tiny(hidden / "v3")
        with pytest.raises(ClusterError, match="does not see the source") as caught:
            wk.write(wk.open_checkpoint(hidden / "v3"), tmp_path / "out", executor=RayExecutor(address), progress=False)
        assert "found no such file" in str(caught.value)


def test_no_cluster_there(source: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    done = run("strip", source, "out", "--executor", "ray", "--address", "127.0.0.1:1", cwd=tmp_path)
    assert time.monotonic() - started < 120  # ray.init itself would try for minutes
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert ":1: no Ray cluster can be reached (Connection refused)" in done.stderr
    assert "ray start --head" in done.stderr
    assert not (tmp_path / "out").exists()


def test_addresses_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"client protocol is not enough: .* expected HOST:PORT"):
        find(ray, "ray://127.0.0.1:10001")
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(ClusterError, match="client protocol"):
        find(ray, None)
    with pytest.raises(ClusterError, match="--address: not an address: expected HOST:PORT, found nonsense"):
        require_answer(find(ray, "nonsense"))


def test_something_else_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_S", 120.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        with pytest.raises(ClusterError, match=f"{address}: what answers there is not the head of a Ray cluster"):
            require_answer(address)
        server.shutdown()


def test_without_ray(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from weightkit.cli import main\n"
        f"main(['strip', {str(source)!r}, 'out', '--executor', 'ray'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Error: --executor ray: Ray is not installed.\nInstall it: pip install 'weightkit[ray]'\n"


def test_an_address_without_ray_is_a_wrong_call(source: Path, tmp_path: Path) -> None:
    for arguments in (["strip", source, "out"], ["verify", source]):
        done = run(*arguments, "--address", "127.0.0.1:6379", cwd=tmp_path)
        assert done.returncode == 2
        assert "--address needs --executor ray." in done.stderr


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_finds_the_same(source: Path, address: str, tmp_path: Path) -> None:
    wk.write(wk.shard(wk.open_checkpoint(source), mp=4), tmp_path / "mp4", progress=False)

    def both() -> tuple[list[str], list[str]]:
        reports = [
            wk.verify(tmp_path / "mp4", values=True, progress=False, readers=readers)
            for readers in (None, RayReaders(address))
        ]
        assert reports[0].hashed_bytes == reports[1].hashed_bytes > 0
        assert [str(check) for check in reports[0].checks] == [str(check) for check in reports[1].checks]
        return tuple([str(problem) for problem in report.problems] for report in reports)  # type: ignore[return-value]

    here, there = both()
    assert here == there == []
    for name in ("model1-mp4.safetensors", "model3-mp4.safetensors"):
        path = tmp_path / "mp4" / name
        content = bytearray(path.read_bytes())
        content[-100_000:] = b"\xff" * 100_000
        path.write_bytes(content)
    here, there = both()
    assert here == there
    assert {"SHA-256", "finite", "ranks hold different"} <= {
        word for word in ("SHA-256", "finite", "ranks hold different") if any(word in problem for problem in here)
    }
