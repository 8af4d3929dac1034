"""Files that are read once: past the page cache, a piece ahead."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightkit.checkpoint import once
from weightkit.checkpoint.once import OnceReader, cached_share
from weightkit.checkpoint.stamp import stamp_file
from weightkit.errors import FormatError, SourceChangedError

PIECE = 3 * 4096
SIZES = (0, 1, 4096, 5 * PIECE, 9 * PIECE + 17)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    folder = tmp_path_factory.mktemp("once")
    made = []
    for number, size in enumerate(SIZES):
        content = np.random.default_rng(number).integers(0, 256, size, np.uint8).tobytes()
        path = folder / f"{number}.bin"
        path.write_bytes(content)
        made.append((str(path), content))
    return made


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All is read past the cache, also where the filesystem has no such reads."""
    monkeypatch.setattr(once, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(once, "GAP_BYTES", 4096)
    monkeypatch.setattr(once, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(once, "cached_share", lambda _: 0.0)
    monkeypatch.setattr(once, "_is_on_a_disk", lambda _: True)
    monkeypatch.setattr(once, "open_direct", os.dup)
    before = threading.active_count()
    yield
    assert threading.active_count() == before


Steps = list[tuple[int, bool, int, int]]
"""Reads: of which file, whether from where the last of it ended, with a gap or none, or from where, and how much."""

steps_of_reads: st.SearchStrategy[Steps] = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2, 3, 3, 3, 4, 4, 4]),
        st.booleans(),
        st.integers(0, 10 * PIECE),
        st.integers(0, 3 * PIECE),
    ),
    max_size=12,
)


def follow(files: list[tuple[str, bytes]], steps: Steps) -> None:
    total, ended = 0, [0] * len(files)
    with OnceReader() as reader:
        for which, goes_on, place, count in steps:
            path, content = files[which]
            start = min(ended[which] + place % 3 * 1000 if goes_on else place, len(content))
            out = np.empty(min(count, len(content) - start), np.uint8)
            reader.read_range(path, start, out)
            assert out.tobytes() == content[start : start + len(out)]
            ended[which] = start + len(out)
            total += len(out)
        assert reader.bytes_read == total


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=steps_of_reads)
def test_whatever_follows_what(files: list[tuple[str, bytes]], steps: Steps) -> None:
    follow(files, steps)


def test_each_byte_is_read_once_and_ahead(files: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, str]] = []
    preadv = os.preadv

    def noted(file: int, buffers: list[memoryview], offset: int) -> int:
        asked.append((offset, len(buffers[0]), threading.current_thread().name))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", noted)
    path, content = files[-1]
    with OnceReader() as reader:
        for start in range(0, len(content), 5000):
            out = np.empty(min(5000, len(content) - start), np.uint8)
            reader.read_range(path, start, out)
            assert out.tobytes() == content[start : start + 5000]
    first, *following = asked
    assert first[:2] == (0, 8192)  # what was asked for
    assert [offset for offset, *_ in following] == [8192 + number * PIECE for number in range(len(following))]
    assert all(count == PIECE for _, count, _ in following)
    assert all(name.startswith("weightkit-ahead") for *_, name in following[1:])


def test_threads_do_not_share_what_they_read_ahead(files: list[tuple[str, bytes]]) -> None:
    failed: list[BaseException] = []

    def work(seed: int, reader: OnceReader) -> None:
        draw = np.random.default_rng(seed)
        try:
            for _ in range(60):
                path, content = files[draw.integers(3, 5)]
                start = int(draw.integers(0, len(content)))
                out = np.empty(min(int(draw.integers(0, 2 * PIECE)), len(content) - start), np.uint8)
                reader.read_range(path, start, out)
                assert out.tobytes() == content[start : start + len(out)]
        except BaseException as exc:
            failed.append(exc)

    with OnceReader() as reader:
        threads = [threading.Thread(target=work, args=(seed, reader)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(broken=st.integers(0, 12), steps=steps_of_reads)
def test_a_read_that_is_refused_is_done_through_the_cache(
    files: list[tuple[str, bytes]], broken: int, steps: Steps
) -> None:
    """Whichever it is, and what it left in a buffer is never taken for the file's."""
    direct: set[int] = set()
    calls = iter(range(10_000))
    preadv = os.preadv

    def opened(file: int) -> int:
        direct.add(other := os.dup(file))
        return other

    def refused(file: int, buffers: list[memoryview], offset: int) -> int:
        if file in direct and next(calls) == broken:
            buffers[0][:] = b"\xee" * len(buffers[0])
            raise OSError(22, "Invalid argument")
        return preadv(file, buffers, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(once, "open_direct", opened)
        patch.setattr(os, "preadv", refused)
        follow(files, steps)


def test_a_file_that_ends_early_or_changed(files: list[tuple[str, bytes]]) -> None:
    path, content = files[-1]
    with OnceReader() as reader, pytest.raises(FormatError, match="the file ends early"):
        reader.read_range(path, len(content) - 10, np.empty(11, np.uint8))
    with OnceReader({path: stamp_file(Path(files[0][0]))}) as reader, pytest.raises(SourceChangedError):
        reader.read_range(path, 0, np.empty(11, np.uint8))


def test_what_is_cached_is_read_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    file = os.open(path, os.O_RDWR)
    os.fsync(file)
    assert cached_share(file) == 1.0
    monkeypatch.setattr(once, "cached_share", cached_share)
    monkeypatch.setattr(once, "open_direct", lambda file: pytest.fail("it is cached"))
    with OnceReader() as reader:
        reader.read_range(str(path), 0, np.empty(1 << 20, np.uint8))
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    gone = cached_share(file)
    os.close(file)
    if gone == 1.0:
        pytest.skip("this filesystem lies in memory")
    assert gone == 0.0


def test_what_lies_on_no_disk_is_left_to_the_kernel(
    files: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once, "_is_on_a_disk", lambda _: False)
    monkeypatch.setattr(once, "open_direct", lambda file: pytest.fail("it lies on no disk"))
    path, content = files[-1]
    out = np.empty(len(content), np.uint8)
    with OnceReader() as reader:
        reader.read_range(path, 0, out)
    assert out.tobytes() == content


def test_a_file_that_is_replaced_after_it_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was looked at is read on, short reads and long ones."""
    monkeypatch.undo()
    monkeypatch.setattr(once, "cached_share", lambda _: 0.0)
    monkeypatch.setattr(once, "_is_on_a_disk", lambda _: True)
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"a" * (1 << 20))
    other.write_bytes(b"b" * (1 << 20))
    short, long = np.empty(8, np.uint8), np.empty(1 << 19, np.uint8)
    with OnceReader({str(path): stamp_file(path)}) as reader:
        reader.read_range(str(path), 0, short)
        other.replace(path)
        reader.read_range(str(path), 4096, long)
    assert short.tobytes() + long.tobytes() == b"a" * (len(short) + len(long))


def test_a_reader_that_is_used_again(files: list[tuple[str, bytes]]) -> None:
    """Descriptors come back with other files behind them."""
    reader = OnceReader()
    for path, content in (files[3], files[4]):
        out = np.empty(5 * PIECE, np.uint8)
        reader.read_range(path, 0, out[: 2 * PIECE])
        reader.read_range(path, 2 * PIECE, out[2 * PIECE :])
        assert out.tobytes() == content[: 5 * PIECE]
        reader.close()


def test_without_another_thread_nothing_is_read_ahead(
    files: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is to be had, or Python is at its end."""
    asked = []

    def submit(*_: object) -> None:
        asked.append(1)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(once.ThreadPoolExecutor, "submit", submit)
    path, content = files[-1]
    out = np.empty(len(content), np.uint8)
    with OnceReader() as reader:
        for start in range(0, len(out), 5000):
            reader.read_range(path, start, out[start : start + 5000])
    assert out.tobytes() == content
    assert asked == [1]
