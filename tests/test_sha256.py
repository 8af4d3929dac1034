"""SHA-256 by our own code and threads: hashlib's digests whatever the pieces, and two files at once where they wait."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightkit import sha256 as hashing
from weightkit.kernels import sha256_x86
from weightkit.sha256 import Hashers, Line, Pairable, hash_apart, sha256


@cache
def code() -> sha256_x86.Compiled:
    found = sha256_x86.compiled()
    if found is None:
        pytest.skip("a processor without SHA instructions")
    return found


def content(size: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng([size, seed]).integers(0, 256, size, dtype=np.uint8)


def pairable() -> Pairable:
    return Pairable(code())


def with_cores(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    """Threads of a process on so many cores, until the test ends."""
    threads = Hashers(most=cores, apart=cores)
    monkeypatch.setattr(hashing, "hashers", lambda: threads)


def hash_lines(hashers: Hashers, lines: list[Line], datas: list[list[np.ndarray]]) -> list[list[int]]:
    """Put all pieces, in turn over the lines, and wait. By line, the numbers of its pieces as they were done."""
    left = threading.Semaphore(0)
    done: list[list[int]] = [[] for _ in lines]

    def note(line: int, number: int) -> Callable[[], None]:
        def noted() -> None:
            done[line].append(number)
            left.release()

        return noted

    for number in range(max(map(len, datas))):
        for place, (line, pieces) in enumerate(zip(lines, datas, strict=True)):
            if number < len(pieces):
                hashers.put(line, pieces[number], note(place, number))
    for _ in range(sum(map(len, datas))):
        assert left.acquire(timeout=60)
    return done


@settings(deadline=None)  # the first compiles
@given(st.lists(st.integers(0, 300), max_size=8))
def test_any_pieces_give_the_digest_of_hashlib(sizes: list[int]) -> None:
    ours, theirs = pairable(), hashlib.sha256()
    for number, size in enumerate(sizes):
        piece = content(size, number)
        ours.update(piece.data)
        theirs.update(piece.data)
        assert ours.hexdigest() == theirs.hexdigest()
    assert ours.digest() == theirs.digest()


def test_every_length_up_to_some_blocks() -> None:
    data = content(260)
    for size in range(len(data) + 1):
        ours = pairable()
        ours.update(data[:size].tobytes())
        assert ours.hexdigest() == hashlib.sha256(data[:size].data).hexdigest(), size


def test_the_lengths_of_large_files_are_counted_in_bits() -> None:
    """Beyond 2**32 bits, the bytes of the length that smaller files leave zero."""
    size, data = (1 << 29) + 5, np.zeros(1 << 20, np.uint8)
    ours, theirs = pairable(), hashlib.sha256()
    for start in range(0, size, len(data)):
        piece = data[: size - start]
        ours.update(piece.data)
        theirs.update(piece.data)
    assert ours.hexdigest() == theirs.hexdigest()


def test_a_copy_goes_its_own_way() -> None:
    first = pairable()
    first.update(b"abc" * 50)
    twin = first.copy()
    twin.update(b"d")
    assert first.hexdigest() == hashlib.sha256(b"abc" * 50).hexdigest()
    assert twin.hexdigest() == hashlib.sha256(b"abc" * 50 + b"d").hexdigest()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_two_go_on_together_as_far_as_the_shorter(first_blocks: int, second_blocks: int) -> None:
    datas = content(first_blocks * 64 + 7, 1), content(second_blocks * 64 + 9, 2)
    first, second = pairable(), pairable()
    first.begin(datas[0])
    second.begin(datas[1])
    first.go_on_with(second)
    assert (first.blocks == 0) or (second.blocks == 0)
    assert first_blocks - first.blocks == second_blocks - second.blocks == min(first_blocks, second_blocks)
    first.go_on()
    second.go_on()
    assert first.hexdigest() == hashlib.sha256(datas[0].data).hexdigest()
    assert second.hexdigest() == hashlib.sha256(datas[1].data).hexdigest()


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("apart", [0, 1, 3])
@pytest.mark.parametrize("files", [1, 2, 5])
def test_files_hashed_by_few_threads(most: int, apart: int, files: int) -> None:
    """Pieces of odd sizes, from many lines: each has the digest of hashlib, its pieces done in their order."""
    pieces = [[content(70_001 * (number % 3) + 13 * file, number) for number in range(6)] for file in range(files)]
    lines = [Line(pairable() if file != 3 else hashlib.sha256()) for file in range(files)]
    done = hash_lines(Hashers(most=most, apart=apart), lines, pieces)
    assert done == [list(range(6))] * files
    for line, parts in zip(lines, pieces, strict=True):
        assert line.digest.hexdigest() == hashlib.sha256(np.concatenate(parts).data).hexdigest()


def test_files_that_wait_are_hashed_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, four files that all wait: no byte is hashed alone."""
    alone, together = [], []
    go_on, go_on_with = Pairable.go_on, Pairable.go_on_with

    def counted_alone(self: Pairable, stop: int) -> None:
        before = self.blocks
        go_on(self, stop)
        alone.append(before - self.blocks)

    def counted_together(self: Pairable, other: Pairable) -> None:
        before = self.blocks
        go_on_with(self, other)
        together.append(2 * (before - self.blocks))

    monkeypatch.setattr(Pairable, "go_on", counted_alone)
    monkeypatch.setattr(Pairable, "go_on_with", counted_together)
    hashers = Hashers(most=1, apart=0)
    hold, held = threading.Semaphore(0), threading.Semaphore(0)
    lines = [Line(pairable()) for _ in range(5)]

    def holding() -> None:
        held.release()
        hold.acquire()

    hashers.put(lines[4], content(64), holding)
    assert held.acquire(timeout=60)
    alone.clear()
    finished = threading.Semaphore(0)
    for line in lines[:4]:
        hashers.put(line, content(1 << 20), finished.release)
    hold.release()
    for _ in lines[:4]:
        assert finished.acquire(timeout=60)
    assert sum(together) == 4 * (1 << 20) // 64
    assert sum(alone) == 0
    assert {line.digest.hexdigest() for line in lines[:4]} == {hashlib.sha256(content(1 << 20).data).hexdigest()}


@pytest.mark.parametrize("stop", [1, -1])
def test_who_hashes_alone_stops_after_a_block_when_told(stop: int) -> None:
    data, word = content(50 * 64 + 3), np.array([stop], np.int32)
    ours = pairable()
    ours.begin(data)
    for left in range(49, -1, -1):
        ours.go_on(word.ctypes.data)
        assert ours.blocks == left
    assert ours.hexdigest() == hashlib.sha256(data.data).hexdigest()


def test_who_hashes_alone_takes_a_second_file_midway(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long piece is at work when a short one comes: the thread is stopped for it, once, and then let run."""
    hashers = Hashers(most=1, apart=0)
    go_on, go_on_with = Pairable.go_on, Pairable.go_on_with
    alone, left, begun, put = [], [], threading.Event(), threading.Event()

    def watched_alone(self: Pairable, stop: int) -> None:
        if not alone:
            begun.set()
            assert put.wait(60)
        before = self.blocks
        go_on(self, stop)
        alone.append(before - self.blocks)

    def watched_together(self: Pairable, other: Pairable) -> None:
        left.append((self.blocks, other.blocks))
        go_on_with(self, other)

    monkeypatch.setattr(Pairable, "go_on", watched_alone)
    monkeypatch.setattr(Pairable, "go_on_with", watched_together)
    long, short, done = content(8 << 20), content(1 << 20), threading.Semaphore(0)
    lines = [Line(pairable()), Line(pairable())]
    hashers.put(lines[0], long, done.release)
    assert begun.wait(60)
    hashers.put(lines[1], short, done.release)
    put.set()
    for _ in lines:
        assert done.acquire(timeout=60)
    blocks = len(long) // 64, len(short) // 64
    assert left == [(blocks[0] - 1, blocks[1])]  # stopped after one block
    assert alone == [1, blocks[0] - 1 - blocks[1]]  # and not again
    assert [line.digest.hexdigest() for line in lines] == [hashlib.sha256(d.data).hexdigest() for d in (long, short)]


def test_few_files_on_many_cores_are_hashed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pairable, "go_on_with", lambda *_: pytest.fail("two files on one core"))
    lines = [Line(pairable()) for _ in range(3)]
    hash_lines(Hashers(most=8, apart=4), lines, [[content(1 << 20)] * 4] * 3)
    assert {line.digest.hexdigest() for line in lines} == {
        hashlib.sha256(np.tile(content(1 << 20), 4).data).hexdigest()
    }


def test_a_long_update_waits_for_its_bytes() -> None:
    """The caller may overwrite its buffer at once."""
    ours, buffer = pairable(), content(3 << 20)
    expected = hashlib.sha256(buffer.data)
    ours.update(buffer.data)
    buffer[:] = 0
    ours.update(buffer.data)
    expected.update(buffer.data)
    assert ours.hexdigest() == expected.hexdigest()


def test_what_was_hashed_is_not_kept() -> None:
    """A verify of 163 files has as many digests to its end."""
    ours, buffer = pairable(), content(3 << 20)
    alive = weakref.ref(buffer)
    ours.update(buffer.data)
    del buffer
    until = time.monotonic() + 60
    while alive() is not None and time.monotonic() < until:
        time.sleep(0.001)  # the thread that said it was done lets go next
    assert alive() is None
    assert ours.hexdigest() == hashlib.sha256(content(3 << 20).data).hexdigest()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_hashes_with_threads_of_its_own() -> None:
    ours = pairable()
    ours.update(content(3 << 20).data)
    child = os.fork()
    if child == 0:
        right = False
        try:
            signal.alarm(30)
            theirs = pairable()
            theirs.update(content(3 << 20).data)
            right = theirs.hexdigest() == ours.hexdigest()
        finally:
            os._exit(not right)
    assert os.waitpid(child, 0)[1] == 0


def test_no_thread_to_be_had_is_said_and_nothing_is_left_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hashers, line, done = Hashers(most=2, apart=1), Line(pairable()), threading.Semaphore(0)
    start = threading.Thread.start

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="new thread"):
        hashers.put(line, content(1 << 20), done.release)
    assert not line.waiting
    monkeypatch.setattr(threading.Thread, "start", start)
    hashers.put(line, content(1 << 20), done.release)
    assert done.acquire(timeout=60)
    monkeypatch.setattr(threading.Thread, "start", refused)
    other = Line(pairable())
    for each in (line, other):  # the one thread there is does both
        hashers.put(each, content(1 << 20), done.release)
    for _ in range(2):
        assert done.acquire(timeout=60)
    assert other.digest.hexdigest() == hashlib.sha256(content(1 << 20).data).hexdigest()


def test_many_threads_update_at_once() -> None:
    datas = [content((4 << 20) + 17 * number, number) for number in range(6)]
    found: dict[int, str] = {}

    def work(number: int) -> None:
        ours = pairable()
        for _ in range(3):
            ours.update(datas[number].data)
        found[number] = ours.hexdigest()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(datas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: hashlib.sha256(np.tile(data, 3).data).hexdigest() for number, data in enumerate(datas)}


@pytest.mark.parametrize(
    ("size_bytes", "cores", "kind"),
    [
        (1 << 40, 2, Pairable),
        (1 << 40, 7, Pairable),
        (1 << 40, 8, type(hashlib.sha256())),
        (hashing.SMALL_BYTES - 1, 2, type(hashlib.sha256())),
    ],
)
def test_large_files_on_few_cores_are_hashed_in_pairs(
    monkeypatch: pytest.MonkeyPatch, size_bytes: int, cores: int, kind: type
) -> None:
    code()
    with_cores(monkeypatch, cores)
    assert isinstance(sha256(size_bytes), kind)


def test_a_process_with_one_file_at_a_time_leaves_it_to_hashlib(monkeypatch: pytest.MonkeyPatch) -> None:
    code()
    with_cores(monkeypatch, 2)
    hash_apart()
    assert isinstance(sha256(1 << 40), type(hashlib.sha256()))


def test_other_processors_use_hashlib(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, 2)
    monkeypatch.setattr(hashing, "compiled", lambda: None)
    assert isinstance(sha256(1 << 40), type(hashlib.sha256()))


def test_code_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    code()
    right = sha256_x86._Function._block
    monkeypatch.setattr(sha256_x86._Function, "_block", lambda self, before, datas: right(self, before, datas[::-1]))
    sha256_x86._compiled.cache_clear()
    try:
        assert sha256_x86.compiled() is None
    finally:
        sha256_x86._compiled.cache_clear()
