"""Headers, indexes and whole folders as an attacker would write them: only our own errors may come out, in bounded time
and memory, and what our reader accepts the safetensors library accepts too."""

from __future__ import annotations

import json
import random
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightkit.checkpoint.header import build_header, parse_header, read_header
from weightkit.checkpoint.index import INDEX_NAME, Index, read_index
from weightkit.checkpoint.lock import read_lock
from weightkit.errors import WeightkitError

#: Python objects take so many times the bytes of the JSON that spells them.
MOST_BYTES_A_BYTE = 40

fuzz = settings(max_examples=150, deadline=20_000, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def accepted(raw: bytes, data_bytes: int) -> bool:
    """Whether our reader takes it; anything but our own error fails the test."""
    try:
        parse_header(raw, 8 + len(raw) + data_bytes, "x")
    except WeightkitError as error:
        str(error).encode()  # it can be printed
        return False
    return True


def library_accepts(raw: bytes, data_bytes: int) -> bool:
    try:
        safetensors.deserialize(struct.pack("<Q", len(raw)) + raw + b"\0" * data_bytes)
    except safetensors.SafetensorError:
        return False
    return True


DTYPES = ["U8", "F8_E4M3", "BF16", "F32", "I64", "F4", "BOOL", "C64"]
sizes = st.one_of(st.integers(0, 4), st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64, True, 1.0, None, "2"]))
shapes = st.lists(sizes, max_size=4)
offsets = st.lists(st.one_of(st.integers(0, 40), sizes), max_size=3)
entries = st.one_of(
    st.fixed_dictionaries({"dtype": st.sampled_from(DTYPES), "shape": shapes, "data_offsets": offsets}),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), shapes),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=12,
)


@fuzz
@given(st.dictionaries(st.text(max_size=3), entries, max_size=4), st.integers(0, 64))
def test_almost_valid_headers(fields: dict[str, object], data_bytes: int) -> None:
    raw = json.dumps(fields).encode()
    if accepted(raw, data_bytes):
        assert library_accepts(raw, data_bytes)


@fuzz
@given(st.dictionaries(st.text(max_size=4), json_values, max_size=4), st.integers(0, 64))
def test_any_json(fields: dict[str, object], data_bytes: int) -> None:
    raw = json.dumps(fields).encode()
    if accepted(raw, data_bytes):
        assert library_accepts(raw, data_bytes)


@fuzz
@given(st.binary(max_size=200), st.integers(0, 64))
def test_any_bytes(raw: bytes, data_bytes: int) -> None:
    accepted(b"{" + raw, data_bytes)
    accepted(raw, data_bytes)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[dict[str, object], int]:
    """A valid header in any order, and how many bytes of data it describes."""
    parts = draw(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=6))
    fields: dict[str, object] = {}
    position = 0
    bits = {"U8": 8, "F8_E4M3": 8, "BOOL": 8, "BF16": 16, "F32": 32, "I64": 64, "F4": 4, "C64": 64}
    for number, (dtype, shape) in enumerate(parts):
        count = 1
        for size in shape:
            count *= size
        if count * bits[dtype] % 8:
            continue
        end = position + count * bits[dtype] // 8
        fields[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    names = draw(st.permutations(list(fields)))
    return {name: fields[name] for name in names}, position


@fuzz
@given(tilings())
def test_valid_headers_are_accepted(made: tuple[dict[str, object], int]) -> None:
    fields, data_bytes = made
    raw = json.dumps(fields).encode()
    header = parse_header(raw, 8 + len(raw) + data_bytes, "x")
    assert {entry.name for entry in header.entries} == set(fields)
    assert library_accepts(raw, data_bytes)


@fuzz
@given(tilings(), st.data())
def test_mutated_headers(made: tuple[dict[str, object], int], data: st.DataObject) -> None:
    fields, data_bytes = made
    raw = bytearray(json.dumps(fields).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                raw[at] ^= 1 << data.draw(st.integers(0, 7))
            case 1:
                del raw[at : at + data.draw(st.integers(1, 8))]
            case 2:
                raw[at:at] = raw[at : at + data.draw(st.integers(1, 30))]
            case 3:
                raw.insert(at, data.draw(st.sampled_from(b'[{"\\9-0,\0\xff')))
        if not raw:
            return
    if accepted(bytes(raw), data_bytes):
        assert library_accepts(bytes(raw), data_bytes)


@fuzz
@given(st.binary(max_size=64), st.integers(0, 2**64 - 1))
def test_any_file(folder: Path, content: bytes, length: int) -> None:
    path = folder / "any.safetensors"
    for whole in (content, struct.pack("<Q", length) + content, struct.pack("<Q", len(content)) + content):
        path.write_bytes(whole)
        with pytest.raises(WeightkitError):
            read_header(path)


def test_a_real_header_with_random_damage(folder: Path) -> None:
    """Thousands of quick mutations of a header with many entries, from a fixed seed."""
    rng = random.Random(0)
    tensors = [(f"model.layers.{n}.mlp.up_proj.weight", "F8_E4M3", (3, n)) for n in range(40)]
    raw = build_header(tensors, {"format": "pt"})[8:].rstrip(b" ")
    data_bytes = sum(3 * n for n in range(40))
    assert accepted(raw, data_bytes)
    for _ in range(1500):
        damaged = bytearray(raw)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'[]{}",:0123456789-e. \\\xff')
        if accepted(bytes(damaged), data_bytes):
            assert library_accepts(bytes(damaged), data_bytes)


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(folder: Path) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.uint8),
        "empty": np.zeros((0, 3), np.int64),
        "scalar": np.asarray(2, np.float16),
    }
    theirs = folder / "theirs.safetensors"
    safetensors.numpy.save_file(arrays, theirs, {"format": "pt"})
    read = read_header(theirs)
    assert {entry.name: entry.shape for entry in read.entries} == {name: array.shape for name, array in arrays.items()}
    assert read.metadata == {"format": "pt"}

    ours = folder / "ours.safetensors"
    dtypes = {"b": "F32", "a": "U8", "empty": "I64", "scalar": "F16"}
    head = build_header(((name, dtypes[name], array.shape) for name, array in arrays.items()), {"format": "pt"})
    ours.write_bytes(head + b"".join(array.tobytes() for array in arrays.values()))
    back = safetensors.numpy.load_file(ours)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
    with safetensors.safe_open(ours, "np") as file:
        assert file.metadata() == {"format": "pt"}


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"shape":[' + b"0," * MEGABYTE + b"0]}}",
        b'{"a":{"shape":[' + b"1257," * (MEGABYTE // 4) + b"0]}}",
        b'{"a":{"shape":[' + b'"a",' * (MEGABYTE // 4) + b"0]}}",
        b'{"a":[' + b"{}," * (MEGABYTE // 3) + b"{}]}",
        b'{"a":[' + b"[]," * (MEGABYTE // 3) + b"[]]}",
        b'{"a":{' + b'"":0,' * (MEGABYTE // 4) + b'"":0}}',
        b"{" + b",".join(b'"%x":0' % n for n in range(MEGABYTE // 10)) + b"}",
        b"{" + b"[" * MEGABYTE,
        b'{"' + b'\\"' * (MEGABYTE // 2),
        b'{"a":' + b"9" * MEGABYTE + b"}",
        b'{"' + "\U0001f600".encode() * (MEGABYTE // 4) + b'":1}',
    ],
    ids=["zeros", "integers", "strings", "objects", "lists", "one key", "keys", "depth", "escapes", "digits", "wide"],
)
def test_hostile_headers_take_bounded_memory_and_time(text: bytes, folder: Path) -> None:
    path = folder / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(WeightkitError):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST_BYTES_A_BYTE * len(text)
    assert time.perf_counter() - started < 60


def test_a_length_of_a_whole_file_allocates_no_more_than_the_limit(folder: Path) -> None:
    path = folder / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**40 - 8))
        file.truncate(2**40)
    tracemalloc.start()
    try:
        with pytest.raises(WeightkitError):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < MEGABYTE
    finally:
        tracemalloc.stop()


index_values = st.one_of(
    json_values,
    st.fixed_dictionaries(
        {
            "metadata": st.one_of(json_values, st.fixed_dictionaries({"total_size": json_values})),
            "weight_map": st.dictionaries(
                st.text(min_size=1, max_size=4),
                st.one_of(st.text(max_size=4), st.sampled_from(["a.safetensors", "../a", "a/b", ".", ""])),
            ),
        }
    ),
)


@fuzz
@given(st.one_of(index_values.map(lambda value: json.dumps(value).encode()), st.binary()))
def test_any_index(folder: Path, content: bytes) -> None:
    path = folder / INDEX_NAME
    path.write_bytes(content)
    try:
        index = read_index(path)
    except WeightkitError as error:
        str(error).encode()
        return
    assert isinstance(index, Index)
    for file in index.weight_map.values():
        assert (folder / file).parent == folder
        assert (folder / file).resolve().parent == folder.resolve()


@fuzz
@given(st.one_of(index_values.map(lambda value: json.dumps(value).encode()), st.binary()))
def test_any_lock(folder: Path, content: bytes) -> None:
    (folder / "weightkit.lock.json").write_bytes(content)
    with pytest.raises(WeightkitError):
        read_lock(folder)
