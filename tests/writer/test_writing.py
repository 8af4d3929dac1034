"""The files of a write: their form, their mode, what goes with them, and that nothing else changes their bytes."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from folders import metadata, read_published, tree
from safetensors import safe_open
from tiny import MOONLIGHT, V3, write_tiny

import weightkit as wk
from weightkit.errors import PlanError, SourceChangedError
from weightkit.writer import files as filling
from weightkit.writer import make_plan, stream
from weightkit.writer import pieces as cutting
from weightkit.writer.executor import execute


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "v3"
    write_tiny(folder)
    (folder / "configuration_deepseek.py").write_text("class DeepseekV3Config: ...\n")
    (folder / "assets").mkdir()
    (folder / "assets/figure.png").write_bytes(bytes(range(256)))
    return folder


def write(source: Path, target: Path, **options: object) -> Path:
    checkpoint = wk.cast(wk.open_checkpoint(source), "bf16")
    wk.write(checkpoint, target, **{"device": "cpu", "progress": False, **options})  # type: ignore[arg-type]
    return target


def test_form_of_the_files(source: Path, tmp_path: Path) -> None:
    for path in write(source, tmp_path / "out").glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        assert (8 + length) % 4096 == 0
        assert metadata(path) == {"format": "pt"}
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - it is no dict
                assert file.get_tensor(name).isfinite().all()


def test_nothing_is_left_behind(source: Path, tmp_path: Path) -> None:
    names = set(tree(write(source, tmp_path / "out")))
    assert names == {
        *(f"model-{number:05}-of-000003.safetensors" for number in (1, 2, 3)),
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "configuration_deepseek.py",
        "assets/figure.png",
        "weightkit.lock.json",
    }
    assert not (tmp_path / "out/.weightkit").exists()


def test_side_files_travel_as_they_are(source: Path, tmp_path: Path) -> None:
    before, after = tree(source), tree(write(source, tmp_path / "out"))
    for name in ("assets/figure.png", "chat_template.jinja", "configuration_deepseek.py", "tokenizer_config.json"):
        assert after[name] == before[name]


def test_the_lock_tells_the_truth(source: Path, tmp_path: Path) -> None:
    target = write(source, tmp_path / "out")
    lock = json.loads((target / "weightkit.lock.json").read_text())
    found = tree(target)
    del found["weightkit.lock.json"]
    assert lock["files"] == {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        for name, content in found.items()
    }
    assert lock["origin"]["source"] == str(source)
    assert len(lock["origin"]["plan"]) == 64


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umasks_mode(umask: int, source: Path, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        target = write(source, tmp_path / "out")
    finally:
        os.umask(before)
    for path in target.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


@pytest.mark.parametrize("jobs", [2, 4, 9])
def test_jobs_do_not_change_the_bytes(jobs: int, source: Path, tmp_path: Path) -> None:
    assert tree(write(source, tmp_path / "many", jobs=jobs)) == tree(write(source, tmp_path / "one", jobs=1))


def test_small_buffers_do_not_change_the_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tree(write(source, tmp_path / "whole"))
    monkeypatch.setattr(stream, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(filling, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(cutting, "STRIP_BYTES", 1)
    monkeypatch.setattr(cutting, "COPY_BYTES", 1000)
    monkeypatch.setattr(filling, "DURABLE_EVERY_BYTES", 50_000)
    assert tree(write(source, tmp_path / "small")) == whole


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a tmpfs")
def test_a_filesystem_of_another_kind(source: Path, tmp_path: Path) -> None:
    """tmpfs: O_DIRECT is refused there by most kernels."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert tree(write(source, Path(folder) / "out")) == tree(write(source, tmp_path / "out"))


def test_direct_writes_that_are_refused_late(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some filesystems take O_DIRECT when opening and refuse it when writing."""
    import errno
    import fcntl

    pwrite = os.pwrite

    def refusing(file: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(file, data, offset)

    whole = tree(write(source, tmp_path / "whole"))
    monkeypatch.setattr(os, "pwrite", refusing)
    assert tree(write(source, tmp_path / "buffered")) == whole


def test_what_a_write_says_it_did(source: Path, tmp_path: Path) -> None:
    checkpoint = wk.open_checkpoint(source)
    written = wk.write(checkpoint, tmp_path / "out", progress=False)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert (written.files, written.size_bytes, written.written_bytes) == (3, size, size)
    assert written.read_bytes == checkpoint.size_bytes
    again = wk.write(checkpoint, tmp_path / "out", progress=False)
    assert (again.written_bytes, again.read_bytes) == (0, 0)


def test_a_rerun_touches_nothing(source: Path, tmp_path: Path) -> None:
    target = write(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in [target, *target.rglob("*")]}
    write(source, target)
    assert {path: path.stat().st_mtime_ns for path in [target, *target.rglob("*")]} == before


def test_a_whole_copy_is_equal_and_reads_each_byte_once(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "moonlight", MOONLIGHT)
    checkpoint = wk.open_checkpoint(tmp_path / "moonlight")
    written = wk.write(checkpoint, tmp_path / "copy", progress=False)
    assert read_published(tmp_path / "copy") == contents
    assert written.read_bytes == checkpoint.size_bytes


def test_a_target_several_folders_deep(source: Path, tmp_path: Path) -> None:
    assert write(source, tmp_path / "a/b/c").is_dir()


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_jobs(jobs: int, source: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--jobs"):
        write(source, tmp_path / "out", jobs=jobs)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_between_plan_and_write(tmp_path: Path) -> None:
    write_tiny(tmp_path / "v3")
    plan = make_plan(wk.merge(wk.open_checkpoint(tmp_path / "v3")), tmp_path / "out")
    path = sorted((tmp_path / "v3").glob("*.safetensors"))[1]
    os.utime(path, ns=(0, 0))
    with pytest.raises(SourceChangedError, match="changed after the plan was made"):
        execute(plan, progress=False)


def test_the_first_failure_stops_the_others(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read error in one file is what the caller sees, not the stops that it caused."""
    from weightkit.checkpoint.reading import Reader
    from weightkit.errors import FormatError

    read = Reader.read_range

    def failing(self: Reader, path: str, offset: int, out: object) -> None:
        if path.endswith("00002-of-000003.safetensors"):
            raise FormatError("cannot be read (Input/output error)", where=path)
        read(self, path, offset, out)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read_range", failing)
        with pytest.raises(FormatError, match="Input/output error"):
            write(source, tmp_path / "out", jobs=3)
    assert tree(write(source, tmp_path / "out")) == tree(write(source, tmp_path / "fresh"))


def test_a_byte_copy_imports_no_torch(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys, weightkit as wk\n"
        f"wk.write(wk.strip_mtp(wk.open_checkpoint({str(source)!r})), {str(tmp_path / 'out')!r}, progress=False)\n"
        "print(sorted({'torch', 'numba', 'triton'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_tensor_is_where_the_source_had_it(source: Path, tmp_path: Path) -> None:
    """Empty tensors too, which share their offset with others."""
    from folders import read_safetensors
    from tiny import write_safetensors

    write_tiny(tmp_path / "v3", V3, shards=1, pattern="model.safetensors")
    tensors = read_safetensors(tmp_path / "v3/model.safetensors")
    tensors = {"empty.first": ("F32", (0, 4), b""), **tensors, "empty.last": ("BF16", (3, 0), b"")}
    write_safetensors(tmp_path / "v3/model.safetensors", tensors)
    (tmp_path / "v3/model.safetensors.index.json").unlink()
    wk.write(wk.open_checkpoint(tmp_path / "v3"), tmp_path / "out", progress=False)
    assert read_published(tmp_path / "out") == tensors
