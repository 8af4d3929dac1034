"""Rates of a machine: measured without a trace on the disk, kept, found again, and turned into seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import write_tiny

from weightkit.errors import FormatError, MissingFileError, SpaceError
from weightkit.measure import FILE_NAME, Ceilings, GpuCeilings, Work, disk, estimate, find, load, measure, save

#: Round figures: 100 B/s of everything but what a test is about.
EVEN = Ceilings(
    folder="/x",
    measured_at="2026-11-24T00:00:00+00:00",
    cpu="any",
    cores=len(os.sched_getaffinity(0)),
    load=0.0,
    direct=True,
    scratch_bytes=1,
    **dict.fromkeys(("read", "write", "both_read", "both_write", "copy_one", "copy_all"), 100.0),
    **dict.fromkeys(("sha256_one", "sha256_all", "dequant_one", "dequant_all"), 100.0),
)
SMALL = {"seconds": 0.05, "most_bytes": 128 << 20}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weightkit", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("rates", "work", "seconds", "stage"),
    [
        ({"read": 10.0}, Work("", 1000, 0, 0), 100, "reading"),
        ({"write": 10.0}, Work("", 0, 1000, 0), 100, "writing"),
        ({"both_read": 10.0, "both_write": 30.0}, Work("", 1000, 1000, 0), 50, "reading and writing"),
        ({"sha256_all": 800.0}, Work("", 0, 0, 1600), 8, "hashing"),  # two files hash on two cores only
        ({"dequant_all": 800.0}, Work("", 0, 0, 0, 1600), 8, "dequantizing"),
        ({"read": 1000.0}, Work("", 1000, 0, 500, 200), 17, "cores"),  # 10 s of copies, 5 of hashing, 2 of FP8
    ],
)
def test_the_slowest_stage(rates: dict[str, float], work: Work, seconds: float, stage: str) -> None:
    found = estimate(work, replace(EVEN, **rates), jobs=2)
    assert (found.seconds, found.bound_by) == (seconds, stage)
    assert found.bytes_per_s == (work.reads_bytes + work.writes_bytes) / seconds


def test_kept_and_found_again(tmp_path: Path) -> None:
    gpu = replace(EVEN, gpu=GpuCeilings("H100", 1.0, 2.0, 3.0, 4.0))
    path = save(gpu, tmp_path)
    assert load(path) == gpu
    (tmp_path / "a/b").mkdir(parents=True)
    assert find(tmp_path / "a/b/not-there-yet/c") == path
    nearer = save(EVEN, tmp_path / "a")
    assert find(tmp_path / "a/b") == nearer
    assert find(tmp_path) == path


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '"x"', json.dumps(EVEN.to_json() | {"read": 0.0})])
def test_anything_else_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(content)
    with pytest.raises(FormatError, match="not a measurement"):
        load(path)


def test_measured_without_a_name_on_the_disk(tmp_path: Path) -> None:
    seen: set[Path] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.update(tmp_path.iterdir())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = measure(tmp_path, **SMALL)
    finally:
        stop.set()
        watcher.join()
    assert not seen
    assert found.scratch_bytes <= SMALL["most_bytes"]
    # in bytes a second, however busy the machine is; of none is it so slow that megabytes would be so many
    assert min(found.read, found.write, found.both_read, found.both_write) > 1e5
    assert min(found.copy_one, found.sha256_one, found.dequant_one) > 1e5
    assert load(save(found, tmp_path)) == found


def test_an_unlinked_file_where_the_system_makes_none_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    found = disk.measure_disk(tmp_path, jobs=2, **SMALL)
    assert min(found.read, found.write) > 0
    assert not list(tmp_path.iterdir())


def test_a_machine_too_busy_to_begin_in_time_is_measured_all_the_same(tmp_path: Path) -> None:
    found = disk.measure_disk(tmp_path, jobs=2, seconds=0, most_bytes=128 << 20)
    assert min(found.read, found.write, found.both_read, found.both_write) > 0


def test_killed_it_leaves_nothing(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from weightkit.measure.disk import measure_disk as m\n"
    code += "print(1, flush=True); m(Path(sys.argv[1]), jobs=2, seconds=60, most_bytes=64 << 20)"
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    assert child.wait(120) == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_disk_bytes", lambda _: 100 << 20)
    with pytest.raises(SpaceError, match="too little is free to measure the disk"):
        disk.measure_disk(tmp_path, jobs=2, seconds=1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such folder"):
        measure(tmp_path / "nowhere", **SMALL)


def test_the_command(tmp_path: Path) -> None:
    done = run("bench", "--seconds", "0.05", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["saved"] == f"weights/{FILE_NAME}"
    assert load(tmp_path / "weights" / FILE_NAME).read == found["read"]
    estimates = {item["command"]: item for item in found["estimates"]}
    assert {"verify", "strip", "cast --to bf16 --no-mtp", "shard --mp 8", "fetch, network aside"} <= set(estimates)
    assert estimates["verify"]["seconds"] >= 688_574_839_360 / max(found["read"], found["sha256_all"])
    shown = run("bench", str(tmp_path), "--seconds", "0.05", "--no-save", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "deepseek-v3, estimated" in shown.stdout
    assert not (tmp_path / FILE_NAME).exists()


def test_a_dry_run_estimates_where_something_was_measured(tmp_path: Path) -> None:
    write_tiny(tmp_path / "weights/deepseek-v3/fp8")

    def summary(*arguments: str) -> dict[str, object]:
        done = run(*arguments, "--dry-run", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert summary("strip")["estimated_s"] is None
    path = save(replace(EVEN, write=10.0), tmp_path / "weights")
    plan = summary("strip")
    assert plan["estimated_s"] == pytest.approx(plan["write_bytes"] / 10)
    assert plan["estimated_from"] == f"{path} of 2026-11-24"
    shown = run("strip", "--dry-run", cwd=tmp_path)
    assert f"estimated from {path} of 2026-11-24" in shown.stdout
    save(replace(EVEN, dequant_one=0.1, dequant_all=0.1), tmp_path / "weights")
    slow, quick = summary("cast", "--to", "bf16")["estimated_s"], summary("strip")["estimated_s"]
    assert isinstance(slow, float)
    assert isinstance(quick, float)
    assert slow > 100 * quick
    save(replace(EVEN, cores=10_000), tmp_path / "weights")
    assert summary("strip")["estimated_s"] is None
    path.write_text("{}")
    assert summary("strip")["estimated_s"] is None
