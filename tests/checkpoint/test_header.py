"""The safetensors header as literal bytes: a test a defect, each with an error of its own; and valid oddities."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from weightkit.checkpoint import header as h
from weightkit.checkpoint.header import Entry, build_header, read_header
from weightkit.errors import HeaderError, MissingFileError

#: A valid file: one U8 [2] tensor named `a`, then one F32 [1] named `b`.
VALID = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}'


def write(folder: Path, text: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refuse(folder: Path, error: type[HeaderError], text: bytes, data: bytes = b"", length: int | None = None) -> str:
    """The message of the refusal, which must be of exactly this class and name the file."""
    path = write(folder, text, data, length)
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    assert type(caught.value) is error, caught.value
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def entry(text: str, data: bytes = b"") -> tuple[bytes, bytes]:
    return b'{"model.x.weight":' + text.encode() + b"}", data


def test_valid(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, VALID, b"\x01\x02" + struct.pack("<f", 1.5)))
    assert header.entries == (Entry("a", "U8", (2,), 0, 2), Entry("b", "F32", (1,), 2, 6))
    assert header.metadata == {}
    assert header.data_offset == 8 + len(VALID)
    assert header.file_size == header.data_offset + 6


# The length field


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x02", b"\x02\0\0\0\0\0\0"])
def test_truncated_length(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(h.HeaderLengthError, match=f"too short .* found {len(content)}"):
        read_header(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001])
def test_length_over_the_limit(length: int, tmp_path: Path) -> None:
    assert f"found {length:,}" in refuse(tmp_path, h.HeaderLengthError, VALID, b"\0" * 6, length)


def test_length_over_the_limit_in_a_file_that_is_as_long(tmp_path: Path) -> None:
    path = write(tmp_path, b"{", length=100_000_001)
    os.truncate(path, 100_000_009)
    with pytest.raises(h.HeaderLengthError, match="over the format's limit"):
        read_header(path)


@pytest.mark.parametrize("beyond", [1, 99_000_000])
def test_length_beyond_the_file(beyond: int, tmp_path: Path) -> None:
    assert "Fetch the file again." in refuse(tmp_path, h.HeaderLengthError, VALID, length=len(VALID) + beyond)


def test_length_zero(tmp_path: Path) -> None:
    refuse(tmp_path, h.HeaderTextError, b"", b"{}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(HeaderError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="not a regular file"):
        read_header(tmp_path)


# The text


@pytest.mark.parametrize("text", [b"[]", b" {}", b'"a"', b"null", b"\xef\xbb\xbf{}", b"\0\0"])
def test_not_an_object(text: bytes, tmp_path: Path) -> None:
    assert "not a JSON object" in refuse(tmp_path, h.HeaderTextError, text)


@pytest.mark.parametrize("text", [b"{", b"{]", b"{}}", b"{} x", b"{'a':1}", b'{"a":', b"{,}", b'{"a"}', b'{"a\0b":1}'])
def test_not_json(text: bytes, tmp_path: Path) -> None:
    assert "not JSON" in refuse(tmp_path, h.HeaderTextError, text)


@pytest.mark.parametrize("text", [b'{"\xff":1}', b'{"a\xc3":1}', b'{"\xed\xa0\x80":1}'])
def test_not_utf8(text: bytes, tmp_path: Path) -> None:
    assert "not UTF-8 at byte " in refuse(tmp_path, h.HeaderTextError, text)


def test_half_of_a_surrogate_pair(tmp_path: Path) -> None:
    text = b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    assert "surrogate" in refuse(tmp_path, h.HeaderTextError, text)


@pytest.mark.parametrize("text", [b"{" + b"[" * 500_000, b'{"a":' * 100_000, b'{"a":{"b":[[1]]}}', b"{" + b"[{" * 9])
def test_depth(text: bytes, tmp_path: Path) -> None:
    assert "at most 3 levels" in refuse(tmp_path, h.HeaderDepthError, text)


def test_brackets_in_names_are_no_depth(tmp_path: Path) -> None:
    text = b'{"[[[[{{{{\\"[[[[":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    assert read_header(write(tmp_path, text)).entries[0].name == '[[[[{{{{"[[[['


@pytest.mark.parametrize(
    "text", [b'{"' + b'\\"' * 500_000, b'{"' + b"\\\\" * 500_000 + b"\\", b'{"' + b'a""' * 500_000]
)
def test_unfinished_strings_take_no_quadratic_time(text: bytes, tmp_path: Path) -> None:
    refuse(tmp_path, h.HeaderTextError, text)


def test_duplicate_tensor(tmp_path: Path) -> None:
    one = b'"model.x.weight":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    assert "'model.x.weight' stands twice" in refuse(tmp_path, h.DuplicateNameError, b"{" + one + b"," + one + b"}")


def test_duplicate_tensor_spelled_with_an_escape(tmp_path: Path) -> None:
    value = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    refuse(tmp_path, h.DuplicateNameError, b'{"a":' + value + b',"\\u0061":' + value + b"}")


def test_duplicate_field(tmp_path: Path) -> None:
    text, data = entry('{"dtype":"U8","shape":[2],"shape":[2],"data_offsets":[0,2]}', b"ab")
    assert "'model.x.weight': 'shape' stands twice" in refuse(tmp_path, h.DuplicateNameError, text, data)


def test_duplicate_metadata(tmp_path: Path) -> None:
    text = b'{"__metadata__":{"format":"pt","format":"tf"}}'
    assert "__metadata__: 'format' stands twice" in refuse(tmp_path, h.DuplicateNameError, text)


@pytest.mark.parametrize("value", [b'{"format":1}', b'{"format":null}', b'{"format":["pt"]}', b"[]", b'"pt"', b"null"])
def test_metadata_must_be_strings(value: bytes, tmp_path: Path) -> None:
    assert "__metadata__" in refuse(tmp_path, h.MetadataError, b'{"__metadata__":' + value + b"}")


# An entry


@pytest.mark.parametrize(
    "value",
    [
        "1",
        "null",
        "[]",
        "{}",
        '{"dtype":"U8","shape":[2]}',
        '{"dtype":"U8","data_offsets":[0,2]}',
        '{"shape":[2],"data_offsets":[0,2]}',
        '{"dtype":"U8","shape":[2],"data_offsets":[0,2],"more":1}',
    ],
)
def test_malformed_entry(value: str, tmp_path: Path) -> None:
    text, data = entry(value, b"ab")
    assert "'model.x.weight': a malformed entry: expected dtype, shape, data_offsets" in refuse(
        tmp_path, h.EntryError, text, data
    )


@pytest.mark.parametrize("dtype", ['"F8"', '"BFLOAT16"', '"bf16"', '""', "8", "null", '["U8"]', '"INT4"'])
def test_unknown_dtype(dtype: str, tmp_path: Path) -> None:
    text, data = entry(f'{{"dtype":{dtype},"shape":[2],"data_offsets":[0,2]}}', b"ab")
    message = refuse(tmp_path, h.DtypeError, text, data)
    assert "'model.x.weight': unknown dtype" in message
    assert "F8_E4M3" in message


@pytest.mark.parametrize(
    "shape",
    [
        "2",
        "null",
        '"2"',
        "{}",
        "[-2]",
        "[-1,-2]",
        "[true,2]",
        "[2.0]",
        "[null]",
        '["2"]',
        "[9223372036854775808]",
        "[4294967296,4294967296]",  # the product is 2**64: zero in 64 bits
        "[4611686018427387904,4,0]",
        "[" + ",".join("1" * 65) + "]",
        "[NaN]",
        "[1e3]",
        "[Infinity]",
    ],
)
def test_not_a_shape(shape: str, tmp_path: Path) -> None:
    text, data = entry(f'{{"dtype":"U8","shape":{shape},"data_offsets":[0,2]}}', b"ab")
    assert "'model.x.weight': not a shape" in refuse(tmp_path, h.ShapeError, text, data)


def test_a_shape_of_a_million_large_sizes_takes_no_quadratic_time(tmp_path: Path) -> None:
    shape = ",".join(["4611686018427387904"] * 1_000_000)
    text, data = entry(f'{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,2]}}', b"ab")
    assert len(refuse(tmp_path, h.ShapeError, text, data)) < 1000


@pytest.mark.parametrize(
    "offsets",
    ["[2,0]", "[0]", "[]", "[0,1,2]", "[-1,1]", "[0,2.0]", "[false,2]", '["0","2"]', "null", "2", "[0,9e99]"],
)
def test_not_a_range(offsets: str, tmp_path: Path) -> None:
    text, data = entry(f'{{"dtype":"U8","shape":[2],"data_offsets":{offsets}}}', b"ab")
    assert "'model.x.weight': not a range of bytes" in refuse(tmp_path, h.OffsetsError, text, data)


def test_offsets_beyond_any_file(tmp_path: Path) -> None:
    text, data = entry(f'{{"dtype":"U8","shape":[2],"data_offsets":[{2**63},{2**63 + 2}]}}', b"ab")
    assert "'model.x.weight'" in refuse(tmp_path, h.OffsetsError, text, data)


@pytest.mark.parametrize(("dtype", "shape", "end"), [("U8", "[3]", 2), ("F32", "[1]", 2), ("BF16", "[]", 1)])
def test_range_that_does_not_hold_the_shape(dtype: str, shape: str, end: int, tmp_path: Path) -> None:
    text, data = entry(f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}', b"\0" * end)
    assert f"'model.x.weight': data_offsets do not hold {dtype}" in refuse(tmp_path, h.SizeError, text, data)


def test_elements_narrower_than_a_byte_must_fill_whole_bytes(tmp_path: Path) -> None:
    text, data = entry('{"dtype":"F4","shape":[3],"data_offsets":[0,1]}', b"a")
    refuse(tmp_path, h.SizeError, text, data)
    text, data = entry('{"dtype":"F4","shape":[4],"data_offsets":[0,2]}', b"ab")
    assert read_header(write(tmp_path, text, data)).entries[0].shape == (4,)


# How the tensors tile the data


def two(first: tuple[int, int], second: tuple[int, int]) -> bytes:
    shapes = [(end - begin) for begin, end in (first, second)]
    return (
        f'{{"a":{{"dtype":"U8","shape":[{shapes[0]}],"data_offsets":[{first[0]},{first[1]}]}},'
        f'"b":{{"dtype":"U8","shape":[{shapes[1]}],"data_offsets":[{second[0]},{second[1]}]}}}}'
    ).encode()


@pytest.mark.parametrize(("first", "second"), [((0, 4), (2, 6)), ((0, 4), (0, 6)), ((0, 6), (2, 4)), ((0, 6), (0, 6))])
def test_overlap(first: tuple[int, int], second: tuple[int, int], tmp_path: Path) -> None:
    message = refuse(tmp_path, h.OverlapError, two(first, second), b"\0" * 6)
    assert "'a'" in message
    assert "'b'" in message


def test_an_empty_tensor_within_another(tmp_path: Path) -> None:
    """Shares no byte, but the library refuses the file."""
    assert "'b' begins within 'a'" in refuse(tmp_path, h.OverlapError, two((0, 4), (2, 2)), b"\0" * 4)


def test_gap_between(tmp_path: Path) -> None:
    assert "a hole before 'b': expected begin at 2, found 4" in refuse(
        tmp_path, h.GapError, two((0, 2), (4, 6)), b"\0" * 6
    )


def test_gap_before_the_first(tmp_path: Path) -> None:
    assert "a hole before 'a'" in refuse(tmp_path, h.GapError, two((2, 4), (4, 6)), b"\0" * 6)


def test_offsets_out_of_the_file(tmp_path: Path) -> None:
    assert "'b' and what precedes it need more data" in refuse(
        tmp_path, h.TruncatedError, two((0, 2), (2, 2_000_000)), b"\0" * 6
    )


def test_truncated_data(tmp_path: Path) -> None:
    message = refuse(tmp_path, h.TruncatedError, VALID, b"\0" * 5)
    assert "'b' and what precedes it need more data than the file has: expected 6 bytes of data, found 5" in message
    assert "Fetch the file again." in message


def test_trailing_bytes(tmp_path: Path) -> None:
    assert "expected 6 bytes of data, found 7" in refuse(tmp_path, h.TrailingBytesError, VALID, b"\0" * 7)


def test_trailing_bytes_after_nothing(tmp_path: Path) -> None:
    refuse(tmp_path, h.TrailingBytesError, b"{}", b"\0")


# Valid oddities


def test_any_order_in_the_json(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, two((4, 6), (0, 4)), b"\0" * 6))
    assert [(item.name, item.begin) for item in header.entries] == [("b", 0), ("a", 4)]


def test_fields_in_any_order(tmp_path: Path) -> None:
    text, data = entry('{"data_offsets":[0,2],"shape":[2],"dtype":"U8"}', b"ab")
    assert read_header(write(tmp_path, text, data)).entries == (Entry("model.x.weight", "U8", (2,), 0, 2),)


def test_trailing_spaces(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, VALID + b" " * 4000, b"\0" * 6))
    assert header.data_offset == 8 + len(VALID) + 4000


def test_spaces_within(tmp_path: Path) -> None:
    assert len(read_header(write(tmp_path, VALID.replace(b",", b" ,\n\t"), b"\0" * 6)).entries) == 2


def test_no_tensors(tmp_path: Path) -> None:
    assert read_header(write(tmp_path, b"{}")).entries == ()


def test_metadata_alone(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, b'{"__metadata__":{"format":"pt","\xc3\xa9":""}}'))
    assert header.metadata == {"format": "pt", "é": ""}


@pytest.mark.parametrize("places", [((0, 0), (0, 4)), ((0, 4), (4, 4)), ((0, 0), (0, 0))])
def test_empty_tensors(places: tuple[tuple[int, int], tuple[int, int]], tmp_path: Path) -> None:
    end = max(place[1] for place in places)
    assert len(read_header(write(tmp_path, two(*places), b"\0" * end)).entries) == 2


def test_empty_tensor_of_two_dimensions(tmp_path: Path) -> None:
    text, data = entry('{"dtype":"F32","shape":[0,7168],"data_offsets":[0,0]}')
    assert read_header(write(tmp_path, text, data)).entries[0].shape == (0, 7168)


def test_no_dimensions(tmp_path: Path) -> None:
    text, data = entry('{"dtype":"I64","shape":[],"data_offsets":[0,8]}', b"\0" * 8)
    assert read_header(write(tmp_path, text, data)).entries[0].shape == ()


def test_names_of_any_kind(tmp_path: Path) -> None:
    text = '{"": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "../模\\n\\ud83d\\ude00":'
    text += '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    names = {item.name for item in read_header(write(tmp_path, text.encode())).entries}
    assert names == {"", "../模\n😀"}


# Writing


def test_build_header_is_padded_and_reads_back(tmp_path: Path) -> None:
    tensors = [("b", "BF16", (3, 5)), ("a", "F8_E4M3", (7,)), ("空", "F32", ()), ("c", "I32", (0, 4))]
    raw = build_header(tensors, {"format": "pt"})
    assert len(raw) % 4096 == 0
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw + b"\0" * 41)
    header = read_header(path)
    assert [(item.name, item.dtype, item.shape) for item in header.entries if item.begin < item.end] == tensors[:3]
    assert header.entries[-1].name == "c"
    assert header.metadata == {"format": "pt"}
    assert header.data_offset == len(raw)


def test_a_header_over_the_limit_is_not_built() -> None:
    with pytest.raises(h.HeaderLengthError, match="to be written"):
        build_header([("x" * 100_000_000, "U8", ())], {})
