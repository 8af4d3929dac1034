"""One append stream: what it wrote, what it says of it, and how it goes on where an earlier one stopped."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightkit.errors import SpaceError
from weightkit.writer import stream as streaming
from weightkit.writer.stream import AppendStream

BUFFER = 8192


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER_BYTES", BUFFER)


def content(size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes=st.lists(st.integers(0, 3 * BUFFER), max_size=8), resumed=st.integers(0, 6), by_fill=st.booleans())
def test_any_appends(tmp_path: Path, sizes: list[int], resumed: int, by_fill: bool) -> None:
    data = content(sum(sizes))
    resume_at = min(resumed, len(data) // BUFFER) * BUFFER
    path = tmp_path / "out"
    path.write_bytes(data[:resume_at].tobytes())
    stream = AppendStream(path, len(data), resume_at=resume_at, digest=hashlib.sha256(data[:resume_at]))
    position = new = 0
    for size in sizes:
        piece = data[position : position + size]
        if by_fill:
            new += stream.fill(size, lambda start, out, piece=piece: np.copyto(out, piece[start : start + len(out)]))  # type: ignore[misc]
        else:
            new += stream.append(piece)
        position += size
        assert stream.position == position
    assert stream.finish() == sha256(data.tobytes())
    assert path.read_bytes() == data.tobytes()
    assert new == len(data) - resume_at


def test_a_filesystem_that_takes_no_direct_writes_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All writes in work find it out at once, and go on through the page cache."""
    together = threading.Barrier(streaming.WRITES)
    met = threading.local()
    refused = []

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        if not getattr(met, "others", False):
            met.others = True
            direct = streaming.is_direct(file)
            together.wait(60)
            if direct:
                refused.append(offset)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(file, data, offset)

    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    data = content(8 * BUFFER + 100)
    stream = AppendStream(tmp_path / "out", len(data))
    if not streaming.is_direct(stream._file):
        stream.close()
        pytest.skip("no direct writes here")
    stream.append(data)
    assert stream.finish() == sha256(data.tobytes())
    assert (tmp_path / "out").read_bytes() == data.tobytes()
    assert sorted(refused) == [number * BUFFER for number in range(streaming.WRITES)]


def test_what_is_durable(tmp_path: Path) -> None:
    data = content(5 * BUFFER + 100)
    stream = AppendStream(tmp_path / "out", len(data))
    assert stream.make_durable() == (0, sha256(b""))
    stream.append(data[: 2 * BUFFER + 7])
    assert stream.make_durable() == (2 * BUFFER, sha256(data[: 2 * BUFFER].tobytes()))
    assert (tmp_path / "out").read_bytes()[: 2 * BUFFER] == data[: 2 * BUFFER].tobytes()
    stream.append(data[2 * BUFFER + 7 :])
    assert stream.make_durable() == (5 * BUFFER, sha256(data[: 5 * BUFFER].tobytes()))
    stream.close()
    stream.close()  # twice is once


def test_nothing_new_is_durable_while_old_bytes_are_passed(tmp_path: Path) -> None:
    data = content(4 * BUFFER)
    (tmp_path / "out").write_bytes(data.tobytes())
    start = 2 * BUFFER
    stream = AppendStream(tmp_path / "out", len(data), resume_at=start, digest=hashlib.sha256(data[:start]))
    stream.append(data[:100])
    assert stream.make_durable() == (start, sha256(data[:start].tobytes()))
    assert stream.skip(start - 100)
    assert not stream.skip(1)
    stream.append(data[start:])
    assert stream.finish() == sha256(data.tobytes())


def test_a_longer_file_is_cut(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(bytes(100_000))
    stream = AppendStream(tmp_path / "out", 10)
    stream.append(content(10))
    stream.finish()
    assert (tmp_path / "out").read_bytes() == content(10).tobytes()


def test_space_is_reserved_at_once(tmp_path: Path) -> None:
    stream = AppendStream(tmp_path / "out", 5_000_000)
    size = (tmp_path / "out").stat()
    stream.close()
    if size.st_size == 0:
        pytest.skip("the filesystem has no fallocate")
    assert size.st_size == 5_000_000
    assert size.st_blocks * 512 >= 5_000_000


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where space could not be reserved: what was synced before counts, and the error says what to do."""
    written = 0
    pwrite = os.pwrite

    def filling(file: int, data: memoryview, offset: int) -> int:
        nonlocal written
        if written >= 3 * BUFFER:
            raise OSError(errno.ENOSPC, "No space left on device")
        written += len(data)
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", filling)
    stream = AppendStream(tmp_path / "out", 100 * BUFFER)
    stream.append(content(2 * BUFFER))
    assert stream.make_durable()[0] == 2 * BUFFER
    with pytest.raises(SpaceError, match=r"out: the disk is full\.\nFree some space and run the same command again"):
        stream.append(content(97 * BUFFER))
    stream.close()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[: max(1, len(data) // 3)], offset))
    stream = AppendStream(tmp_path / "out", 3 * BUFFER)
    stream.append(content(3 * BUFFER - 5))
    assert stream.finish() == sha256((tmp_path / "out").read_bytes())
    assert (tmp_path / "out").read_bytes() == content(3 * BUFFER - 5).tobytes()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        AppendStream(tmp_path / "out", 10)
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_a_second_writer_of_the_same_bytes_changes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a worker that was taken for dead: the file may be whole and in its place when it goes on."""
    data = content(3 * BUFFER + 100)
    late = AppendStream(tmp_path / "partial", len(data))
    late.append(data[: BUFFER + 50])
    first = AppendStream(tmp_path / "partial", len(data))
    first.append(data)
    first.finish()
    (tmp_path / "partial").rename(tmp_path / "whole")
    monkeypatch.setattr(os, "ftruncate", lambda file, size: None)  # as it is just before the end of finish
    late.append(data[BUFFER + 50 :])
    late.finish()
    assert (tmp_path / "whole").read_bytes() == data.tobytes()
