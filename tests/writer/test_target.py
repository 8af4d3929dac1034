"""The target: what may be there, what is continued, what is replaced, and what is never touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import tree
from tiny import write_tiny

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.durable import only_writer
from weightkit.errors import Interrupted, SpaceError, TargetError, WriteError
from weightkit.layouts import FileSet, lay_out_published
from weightkit.writer import executor as executing
from weightkit.writer import files as filling
from weightkit.writer import make_plan, stream, summarize, target
from weightkit.writer import pieces as cutting
from weightkit.writer.executor import Written, execute

STATE = ".weightkit"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "v3")
    return tmp_path / "v3"


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is durable every 64 KB, so that little checkpoints have some."""
    for module in (stream, filling):
        monkeypatch.setattr(module, "BUFFER_BYTES", 16384)
    monkeypatch.setattr(cutting, "COPY_BYTES", 16384)
    monkeypatch.setattr(filling, "DURABLE_EVERY_BYTES", 65536)


def write(what: Checkpoint | FileSet, folder: Path, *, force: bool = False, jobs: int = 1) -> Written:
    return wk.write(what, folder, device="cpu", progress=False, force=force, jobs=jobs)


def stripped(source: Path) -> Checkpoint:
    return wk.strip_mtp(wk.open_checkpoint(source))


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, what: Checkpoint | FileSet, folder: Path) -> None:
    """A run that a Ctrl-C ends after so many reads."""
    from weightkit.checkpoint.reading import Reader

    read, left = Reader.read_range, [count]

    def counting(self: Reader, *arguments: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        read(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read_range", counting)
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            write(what, folder)


def test_a_stopped_run_is_continued_and_not_begun_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(120, monkeypatch, stripped(source), tmp_path / "out")
    assert (tmp_path / "out" / STATE / "journal.jsonl").exists()
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    written = write(stripped(source), tmp_path / "out")
    assert 0 < written.written_bytes < written.size_bytes - 10 * 65536
    assert written.read_bytes < written.size_bytes - 9 * 65536
    write(stripped(source), tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("count", [0, 1, 15, 40, 70, 100])
def test_stopped_anywhere(count: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("strip", "cast"):
        what = stripped(source) if kind == "strip" else wk.cast(stripped(source), "bf16")
        stop_after(count, monkeypatch, what, tmp_path / kind)
        stop_after(count // 2, monkeypatch, what, tmp_path / kind)
        write(what, tmp_path / kind)
        write(what, tmp_path / f"{kind}-whole")
        assert tree(tmp_path / kind) == tree(tmp_path / f"{kind}-whole")


def journal(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / STATE / "journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("at", [0, 5000, 70_000])
def test_a_damaged_prefix_is_written_anew(
    at: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_after(40, monkeypatch, stripped(source), out)
    partial = out / f"{journal(out)[-1]['file']}.partial"
    with partial.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    write(stripped(source), out)
    write(stripped(source), tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: os.truncate(path, 100)])
def test_a_partial_file_that_is_gone_or_short(
    change: Callable[[Path], None], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_after(40, monkeypatch, stripped(source), out)
    change(next(out.glob("*.partial")))
    write(stripped(source), out)
    write(stripped(source), tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_a_finished_file_that_is_gone_is_written_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_after(150, monkeypatch, stripped(source), out)
    next(out.glob("*.safetensors")).unlink()
    write(stripped(source), out)
    write(stripped(source), tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 30, 200, 10_000])
def test_a_torn_journal(cut: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut within its last line, or within its first: then nothing was written yet, or nobody knows."""
    out = tmp_path / "out"
    stop_after(60, monkeypatch, stripped(source), out)
    path = out / STATE / "journal.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - cut)])
    if cut == 10_000:
        for file in out.glob("model*"):
            file.unlink()
    stop_after(10, monkeypatch, stripped(source), out)
    assert journal(out)[0]["plan"] == make_plan(wk.merge(stripped(source)), out).hash
    write(stripped(source), out)
    write(stripped(source), tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"file":"../../x","bytes":1,"sha256":"a"}',
        b'{"file":"model-00001-of-000003.safetensors","bytes":"1","sha256":"a"}',
        b'{"file":"model-00001-of-000003.safetensors","bytes":1,"sha256":2}',
        b'{"file":["x"],"bytes":1,"sha256":"a"}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_of_the_journal(
    line: bytes, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_after(60, monkeypatch, stripped(source), out)
    with (out / STATE / "journal.jsonl").open("ab") as file:
        file.write(line + b"\n")
    stop_after(10, monkeypatch, stripped(source), out)
    assert len(journal(out)) > 1
    write(stripped(source), out)
    write(stripped(source), tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


# Another plan in the target


def test_another_plan_is_refused_and_replaced_by_force(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_after(60, monkeypatch, stripped(source), out)
    before = tree(out)
    with pytest.raises(TargetError, match=r"unfinished write with other options\.\nUse --force to start anew"):
        write(wk.shard(wk.open_checkpoint(source), mp=2), out)
    assert tree(out) == before
    write(wk.shard(wk.open_checkpoint(source), mp=2), out, force=True)
    write(wk.shard(wk.open_checkpoint(source), mp=2), tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_a_finished_result_is_refused_and_replaced_by_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(wk.shard(wk.open_checkpoint(source), mp=4), out)
    with pytest.raises(TargetError, match="holds the result of another run"):
        write(wk.shard(wk.open_checkpoint(source), mp=2), out)
    write(wk.shard(wk.open_checkpoint(source), mp=2), out, force=True)
    write(wk.shard(wk.open_checkpoint(source), mp=2), tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_force_writes_a_finished_result_anew(source: Path, tmp_path: Path) -> None:
    write(stripped(source), tmp_path / "out")
    written = write(stripped(source), tmp_path / "out", force=True)
    assert written.written_bytes == written.size_bytes


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_source_is_noticed_and_said(
    finished: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if finished:
        write(stripped(source), out)
    else:
        stop_after(60, monkeypatch, stripped(source), out)
    path = sorted(source.glob("*.safetensors"))[1]
    os.utime(path, ns=(0, 0))
    with pytest.raises(TargetError) as caught:
        write(stripped(source), out)
    assert ("changed source" if finished else f"its source changed since: {path.name}") in str(caught.value)
    assert "--force" in str(caught.value)
    write(stripped(source), out, force=True)
    assert "weightkit.lock.json" in tree(out)


def test_a_result_with_a_file_gone_is_not_complete(source: Path, tmp_path: Path) -> None:
    write(stripped(source), tmp_path / "out")
    (tmp_path / "out/config.json").unlink()
    with pytest.raises(TargetError, match="files of it are gone"):
        write(stripped(source), tmp_path / "out")


# What somebody else put there


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "other.safetensors",
        "sub/other.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-000003.safetensors",
        "model-00001-of-000003.safetensors.partial",
        "tokenizer_config.json.partial",
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_foreign_files_are_never_overwritten(name: str, force: bool, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(TargetError, match="holds files that this would mix with or overwrite") as caught:
        write(stripped(source), tmp_path / "out", force=force)
    assert name in str(caught.value)
    assert tree(tmp_path / "out") == {name: b"mine"}


def test_foreign_files_beside_an_earlier_write_survive_force(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(wk.shard(wk.open_checkpoint(source), mp=2), out)
    (out / "notes.txt").write_text("mine")
    (out / "film.mp4.partial").write_text("mine")
    write(stripped(source), out, force=True)
    stop_after(20, monkeypatch, stripped(source), tmp_path / "half")
    (tmp_path / "half/film.mp4.partial").write_text("mine")
    write(wk.shard(wk.open_checkpoint(source), mp=2), tmp_path / "half", force=True)
    for folder in (out, tmp_path / "half"):
        assert (folder / "film.mp4.partial").read_text() == "mine"
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(out.glob("model*-mp2*"))
    assert not list((tmp_path / "half").glob("model-*"))


@pytest.mark.parametrize("force", [False, True])
def test_what_was_fetched_is_not_replaced(force: bool, source: Path, tmp_path: Path) -> None:
    """Hundreds of gigabytes may have been: the lock that a fetch leaves does not make them ours to remove."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"mine")
    entry = {"size_bytes": 4, "sha256": "0" * 64}
    lock = {"version": 1, "origin": {"fetch": {"repo": "x/y"}}, "files": {"model.safetensors": entry}}
    (out / "weightkit.lock.json").write_text(json.dumps(lock))
    before = tree(out)
    with pytest.raises(TargetError, match=r"found model\.safetensors, weightkit\.lock\.json"):
        write(stripped(source), out, force=force)
    assert tree(out) == before


def test_a_foreign_file_beside_an_unfinished_write(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(20, monkeypatch, stripped(source), tmp_path / "out")
    (tmp_path / "out/other.safetensors").write_text("mine")
    with pytest.raises(TargetError, match="other"):
        write(stripped(source), tmp_path / "out")
    assert (tmp_path / "out/other.safetensors").read_text() == "mine"


def test_other_files_do_not_matter(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out/.git").mkdir(parents=True)
    (tmp_path / "out/.git/config").write_text("mine")
    (tmp_path / "out/notes.txt").write_text("mine")
    write(stripped(source), tmp_path / "out")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["file", "file/below/it", "link", "link/below"])
def test_the_target_is_no_place_for_a_folder(source: Path, tmp_path: Path, name: str) -> None:
    """Said before a run, and by a dry run."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    what = "file: not a folder" if "file" in name else "link: a link that leads nowhere"
    with pytest.raises(TargetError, match=what):
        summarize(make_plan(lay_out_published(stripped(source)), tmp_path / name))
    with pytest.raises(TargetError, match=what):
        write(stripped(source), tmp_path / name)
    assert not (tmp_path / "nowhere").exists()


def test_a_target_without_permission(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir()
    allowed = os.access
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path / "theirs" and allowed(place, mode))
    for name in ("theirs", "theirs/new"):
        with pytest.raises(TargetError, match="theirs: no permission to write there"):
            write(stripped(source), tmp_path / name)


def test_a_folder_with_the_name_of_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out/config.json").mkdir(parents=True)
    with pytest.raises(TargetError, match=r"found config\.json"):
        write(stripped(source), tmp_path / "out")


def test_links_lead_nobody_out_of_the_target(source: Path, tmp_path: Path) -> None:
    (source / "assets").mkdir()
    (source / "assets/a.png").write_text("new")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/assets").symlink_to(elsewhere)
    with pytest.raises(TargetError, match="found assets"):
        write(stripped(source), tmp_path / "out")
    (tmp_path / "out/assets").unlink()
    (tmp_path / "out/config.json").symlink_to(elsewhere / "nothing")
    with pytest.raises(TargetError, match=r"found config\.json"):
        write(stripped(source), tmp_path / "out", force=True)
    assert list(elsewhere.iterdir()) == []


def test_force_removes_nothing_outside_the_target(source: Path, tmp_path: Path) -> None:
    """A lock or journal that a folder came with is no licence."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a").write_text("mine")
    out = tmp_path / "out"
    (out / STATE).mkdir(parents=True)
    (out / "link").symlink_to(tmp_path / "elsewhere")
    entry = {"size_bytes": 4, "sha256": "0" * 64}
    head = {"plan": "x", "sources": {}, "files": ["../precious"]}
    (out / STATE / "journal.jsonl").write_text(json.dumps(head) + "\n")
    (out / "weightkit.lock.json").write_text(
        json.dumps({"version": 1, "origin": {"plan": "x"}, "files": {"link/a": entry}})
    )
    write(stripped(source), out, force=True)
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "elsewhere/a").read_text() == "mine"


# One writer


#: Its first read lasts until the write is told to stop.
HOLD = """
import sys
from pathlib import Path
import weightkit as wk
from weightkit.checkpoint.reading import Reader
read = Reader.read_range
def slow(self, *arguments):
    print("reading", flush=True)
    self.stop.wait()
    read(self, *arguments)
Reader.read_range = slow
source, target, force = sys.argv[1:]
wk.write(wk.strip_mtp(wk.open_checkpoint(source)), target, progress=False, jobs=1, force=force == "force")
"""


@pytest.mark.parametrize("force", ["", "force"])
def test_two_writers_on_one_target(force: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if force:
        write(wk.shard(wk.open_checkpoint(source), mp=2), out)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(source), str(out), force], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"reading\n"
        for second_force in (False, True):
            with pytest.raises(TargetError, match="another process is writing there"):
                write(stripped(source), out, force=second_force)
    finally:
        first.kill()
        first.communicate()
    write(stripped(source), out)  # the first one's lock died with it
    write(stripped(source), tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_the_lock_of_a_file_that_was_taken_away_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that ends removes the lock's file just after another has opened it: that one must hold a new file."""
    import fcntl

    flock, calls = fcntl.flock, []

    def ending(handle: int, operation: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / STATE / "writer").unlink()
            (tmp_path / STATE).rmdir()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", ending)
    with only_writer(tmp_path):
        assert len(calls) == 2
        with pytest.raises(TargetError, match="another process is writing"), only_writer(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_waited_sees_what_was_written_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look at the target and the lock, somebody else may have written all of it."""
    out, other = tmp_path / "out", wk.shard(wk.open_checkpoint(source), mp=2)
    inspect, looks = executing.inspect_target, []

    def looking(*arguments: object, **options: object) -> object:
        found = inspect(*arguments, **options)  # type: ignore[arg-type]
        looks.append(found)
        if len(looks) == 1:
            write(other, out)
        return found

    monkeypatch.setattr(executing, "inspect_target", looking)
    with pytest.raises(TargetError, match="holds the result of another run"):
        write(stripped(source), out)
    monkeypatch.undo()
    assert "model0-mp2.safetensors" in tree(out)
    assert not list(out.glob("model-*"))


def test_ctrl_c_stops_soon(source: Path, tmp_path: Path) -> None:
    """SIGINT to a process in the middle of a read: it begins no other."""
    import signal

    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(source), str(tmp_path / "out"), ""],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        more, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert more == ""
    assert "weightkit.errors.Interrupted" in errors
    assert "it continues where it stopped" in errors
    write(stripped(source), tmp_path / "out")
    write(stripped(source), tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# Space and permission


def test_space_is_checked_before_anything_is_made(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(wk.merge(stripped(source)), tmp_path / "out")
    monkeypatch.setattr(target, "free_disk_bytes", lambda place: plan.bytes_written)
    with pytest.raises(SpaceError, match=f"not enough free space: expected .* found .*{plan.bytes_written:,} bytes"):
        execute(plan, progress=False)
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_needs_no_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    stop_after(100, monkeypatch, stripped(source), out)
    held = sum(path.stat().st_blocks * 512 for path in out.glob("model*"))
    free = make_plan(wk.merge(stripped(source)), out).bytes_written + (17 << 20) - held
    monkeypatch.setattr(target, "free_disk_bytes", lambda place: free)
    write(stripped(source), out)
    monkeypatch.setattr(target, "free_disk_bytes", lambda place: 16 << 20)
    with pytest.raises(SpaceError):
        write(wk.cast(stripped(source), "f32"), out, force=True)
    monkeypatch.setattr(target, "free_disk_bytes", lambda place: 17 << 20)
    write(stripped(source), out, force=True)  # replaces as much as it needs


def test_memory_is_checked_before_anything_is_made(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(SpaceError, match="not enough memory for the buffers"):
        write(stripped(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_that_may_not_be_written(source: Path) -> None:
    with pytest.raises(WriteError):
        write(stripped(source), Path("/proc/nowhere/out"))


# A disk that fills up


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A tmpfs of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place  # type: ignore[misc]
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("reserving", [True, False])
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_full_disk_leaves_what_can_be_continued(
    reserving: bool, jobs: int, source: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = wk.cast(stripped(source), "f32")
    out = small_disk / "out"
    monkeypatch.setattr(target, "free_disk_bytes", lambda place: 1 << 40)
    if not reserving:
        monkeypatch.setattr(stream, "_reserve", lambda *_: None)
    size = make_plan(wk.merge(what), out).bytes_written
    (small_disk / "ballast").write_bytes(bytes((24 << 20) - size * 2 // 3))
    with pytest.raises(SpaceError, match=r"the disk is full\.\nFree some space and run the same command again"):
        write(what, out, jobs=jobs)
    assert not (out / "weightkit.lock.json").exists()
    with pytest.raises(SpaceError):
        write(what, out, jobs=jobs)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    written = write(what, out, jobs=jobs)
    if jobs == 1:  # several fail before much of any is durable
        assert written.written_bytes < written.size_bytes
    write(what, tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_very_end(source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights fit, and the small files do not."""
    monkeypatch.setattr(target, "free_disk_bytes", lambda place: 1 << 40)
    (source / "large.txt").write_bytes(bytes(23 << 20))
    out = small_disk / "out"
    with pytest.raises(SpaceError, match="Free some space"):
        write(stripped(source), out)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    written = write(stripped(source), out)
    assert written.written_bytes == 0
    assert (out / "large.txt").stat().st_size == 23 << 20
    assert not list(out.rglob("*.partial"))
    shutil.rmtree(out)
