"""The index, the lock, and which files of a folder travel: what is refused, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weightkit.checkpoint.folder import require_inside, side_files
from weightkit.checkpoint.index import INDEX_NAME, Index, index_bytes, read_index
from weightkit.checkpoint.lock import Lock, LockedFile, read_lock
from weightkit.errors import FormatError, IndexFileError, MissingFileError

SHA256 = "0" * 64


def index_file(folder: Path, text: str | bytes) -> Path:
    path = folder / INDEX_NAME
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_valid_index(tmp_path: Path) -> None:
    path = index_file(tmp_path, '{"metadata":{"total_size":6},"weight_map":{"a":"x.safetensors"}}')
    assert read_index(path) == Index({"a": "x.safetensors"}, 6)


@pytest.mark.parametrize("metadata", ["{}", "null", '{"format":"pt"}', '{"total_size":null}'])
def test_an_index_without_total_size(metadata: str, tmp_path: Path) -> None:
    assert read_index(index_file(tmp_path, f'{{"metadata":{metadata},"weight_map":{{"a":"x"}}}}')).total_size is None


def test_total_size_as_a_whole_float(tmp_path: Path) -> None:
    assert read_index(index_file(tmp_path, '{"metadata":{"total_size":6.0},"weight_map":{"a":"x"}}')).total_size == 6


@pytest.mark.parametrize("total", ["true", '"6"', "6.5", "1e999", "NaN", "-Infinity", "[6]"])
def test_total_size_that_is_no_number_of_bytes(total: str, tmp_path: Path) -> None:
    with pytest.raises(IndexFileError, match="total_size"):
        read_index(index_file(tmp_path, f'{{"metadata":{{"total_size":{total}}},"weight_map":{{"a":"x"}}}}'))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map":{}}', "no weight_map"),
        ('{"weight_map":["a"]}', "no weight_map"),
        ('{"weight_map":{"a":"x","a":"y"}}', "'a' stands twice"),
        ("[" * 200_000, "nested too deeply"),
        (b'{"weight_map":{"\xff":"x"}}', "not UTF-8"),
        ('{"weight_map":{"a":' + "9" * 10_000 + "}}", "not JSON"),
    ],
)
def test_a_damaged_index(text: str | bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(IndexFileError, match=complaint):
        read_index(index_file(tmp_path, text))


@pytest.mark.parametrize(
    "file", ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0b", "a\nb", "\ud800", 1, None, ["x"]]
)
def test_a_file_name_that_leaves_the_folder(file: object, tmp_path: Path) -> None:
    with pytest.raises(IndexFileError, match=r"'model\.x': not a file name beside the index"):
        read_index(index_file(tmp_path, json.dumps({"weight_map": {"model.x": file}})))


def test_an_index_is_written_sorted(tmp_path: Path) -> None:
    path = index_file(tmp_path, index_bytes({"b": "x", "a": "y"}, 3))
    assert path.read_text() == (
        '{\n  "metadata": {\n    "total_size": 3\n  },\n  "weight_map": {\n    "a": "y",\n    "b": "x"\n  }\n}\n'
    )


@pytest.mark.parametrize("weight_map", [{}, {"a": "x"}, {'é"\\\n': ": {}", "a.b": "\u2028", ": {}": "x"}])
def test_an_index_is_json_indented_by_two(weight_map: dict[str, str]) -> None:
    whole = {"metadata": {"total_size": 12}, "weight_map": dict(sorted(weight_map.items()))}
    assert index_bytes(weight_map, 12) == (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()


def test_lock_round_trip(tmp_path: Path) -> None:
    assert read_lock(tmp_path) is None
    lock = Lock({"a/b.json": LockedFile(3, SHA256), "模.txt": LockedFile(0, SHA256)}, {"plan": "x"})
    (tmp_path / "weightkit.lock.json").write_bytes(lock.to_bytes())
    assert read_lock(tmp_path) == lock


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\x", "", ".", "a//b", "a\0", "\ud800"])
def test_a_lock_names_files_of_its_folder_alone(name: str, tmp_path: Path) -> None:
    text = json.dumps({"version": 1, "files": {name: {"size_bytes": 1, "sha256": SHA256}}})
    (tmp_path / "weightkit.lock.json").write_text(text)
    with pytest.raises(FormatError, match="damaged entry"):
        read_lock(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"version":2,"files":{}}',
        '{"version":1}',
        '{"version":1,"files":[]}',
        '{"version":1,"files":{},"origin":1}',
        '{"version":1,"files":{"a":{"size_bytes":true,"sha256":"' + SHA256 + '"}}}',
        '{"version":1,"files":{"a":{"size_bytes":-1,"sha256":"' + SHA256 + '"}}}',
        '{"version":1,"files":{"a":{"size_bytes":1,"sha256":"' + SHA256[1:] + 'G"}}}',
        '{"version":1,"files":{"a":{"size_bytes":1}}}',
    ],
)
def test_a_damaged_lock(text: str, tmp_path: Path) -> None:
    (tmp_path / "weightkit.lock.json").write_text(text)
    with pytest.raises(FormatError):
        read_lock(tmp_path)


def test_what_travels(tmp_path: Path) -> None:
    kept = ["chat_template.jinja", "configuration_deepseek.py", "sub/merges.txt", "tokenizer.model", "README.md"]
    left = ["config.json", INDEX_NAME, "weightkit.lock.json", "model.safetensors", "a.bin", "x.partial", ".hidden"]
    for name in [*kept, *left, ".cache/x", "sub/.git"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    found = side_files(tmp_path)
    assert sorted(found) == sorted(kept)
    assert list(found) == sorted(found)
    assert found["sub/merges.txt"].read() == b"sub/merges.txt"


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="leads out of the checkpoint's folder"):
        side_files(folder)


def test_links_of_the_hub_clients_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x/snapshots/abc", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("x")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    require_inside(snapshot, snapshot / "tokenizer.json")
    (snapshot / "stolen").symlink_to("../../../secret")
    with pytest.raises(FormatError, match="leads out"):
        require_inside(snapshot, snapshot / "stolen")


def test_a_missing_index(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        read_index(tmp_path / INDEX_NAME)
