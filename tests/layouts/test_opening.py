"""Opening: what is at a path, and everything that can be wrong with it, told together."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from folders import INDEX, read_safetensors
from tiny import KIMI, V2_LITE, V3, V31, Tiny, write_safetensors, write_tiny

import weightkit as wk
from weightkit.checkpoint import Reader, Stored
from weightkit.errors import (
    ConfigError,
    FormatError,
    IndexFileError,
    MissingFileError,
    MissingTensorError,
    NotACheckpointError,
    Problems,
    WeightkitError,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "v3")
    return tmp_path / "v3"


def shard(folder: Path, number: int = 2) -> Path:
    return sorted(folder.glob("*.safetensors"))[number - 1]


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | changes))


def weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


@pytest.mark.parametrize("model", [V3, V31, V2_LITE, KIMI], ids=["V3", "V3.1", "V2-Lite", "Kimi-K2"])
def test_published(model: Tiny, tmp_path: Path) -> None:
    contents = write_tiny(tmp_path, model, pattern="model-{number}-of-{count}.safetensors")
    checkpoint = wk.open_checkpoint(tmp_path)
    assert checkpoint.layout == "published"
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()} == {
        name: (dtype, shape) for name, (dtype, shape, _) in contents.items()
    }
    assert checkpoint.config == model.config()
    assert checkpoint.placement == weight_map(tmp_path)
    assert set(checkpoint.side_files) == {"chat_template.jinja", "generation_config.json", "tokenizer_config.json"}
    assert checkpoint.size_bytes == sum(len(data) for _, _, data in contents.values())
    with Reader(checkpoint.stamps) as reader:
        for name, tensor in checkpoint.tensors.items():
            assert reader.read(tensor).tobytes() == contents[name][2]
    assert reader.bytes_read == checkpoint.size_bytes


def test_tensors_come_in_the_order_of_their_bytes(folder: Path) -> None:
    tensors = list(wk.open_checkpoint(folder).tensors.values())
    places = [(tensor.path, tensor.offset) for tensor in tensors if isinstance(tensor, Stored)]
    assert len(places) == len(tensors)
    assert places == sorted(places)


def test_no_such_tensor(folder: Path) -> None:
    with pytest.raises(MissingTensorError, match=r"model\.nothing: no such tensor"):
        wk.open_checkpoint(folder)["model.nothing"]


def test_opening_reads_no_data(folder: Path) -> None:
    """Data that cannot be read keeps nobody from opening: holes stand in for it."""
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        tensors = read_safetensors(path)
        data = sum(len(content) for _, _, content in tensors.values())
        os.truncate(path, size - data)
        os.truncate(path, size)
    wk.open_checkpoint(folder)


def test_single_file(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path, shards=1, pattern="model.safetensors")
    (tmp_path / INDEX).unlink()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = wk.open_checkpoint(path)
        assert checkpoint.layout == "single file"
        assert set(checkpoint.tensors) == set(contents)
        assert "tokenizer_config.json" in checkpoint.side_files


def test_a_config_from_elsewhere(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    shutil.move(folder / "config.json", folder.parent / "other.json")
    with pytest.raises(ConfigError, match=r"no config\.json\.\nCopy the model's config\.json there"):
        wk.open_checkpoint(folder)
    assert wk.open_checkpoint(folder, config=folder.parent / "other.json").config == config
    assert wk.open_checkpoint(folder, config=config).config == config
    with pytest.raises(ConfigError, match="nowhere: no such file\\.\nName the model's"):
        wk.open_checkpoint(folder, config="nowhere")
    with pytest.raises(ConfigError, match="not a file"):
        wk.open_checkpoint(folder, config=folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":1,"a":2}', "\udcff"])
def test_a_broken_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError):
        wk.open_checkpoint(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="no such file or folder"):
        wk.open_checkpoint(tmp_path / "nowhere")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="found an empty folder"):
        wk.open_checkpoint(tmp_path)


def test_an_unfinished_write(tmp_path: Path) -> None:
    (tmp_path / ".weightkit").mkdir()
    (tmp_path / "model0-mp1.safetensors.partial").touch()
    for examine in (wk.open_checkpoint, wk.verify):
        with pytest.raises(NotACheckpointError, match=r"not finished\.\nRun the command that fills this folder again"):
            examine(tmp_path)


def test_a_folder_of_other_things(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("")
    with pytest.raises(NotACheckpointError, match=r"found 0\.txt, .* and 3 more"):
        wk.open_checkpoint(tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_text("")
    with pytest.raises(NotACheckpointError, match="not a safetensors file"):
        wk.open_checkpoint(tmp_path / "x.bin")


def test_a_wrong_total_size_keeps_nobody_from_reading(folder: Path) -> None:
    edit_index(folder, metadata={"total_size": 1})
    wk.open_checkpoint(folder)
    edit_index(folder, metadata={})
    wk.open_checkpoint(folder)


def test_a_missing_shard(folder: Path) -> None:
    path = shard(folder)
    path.unlink()
    with pytest.raises(MissingFileError) as caught:
        wk.open_checkpoint(folder)
    assert caught.value.where == str(path)


def test_a_truncated_shard(folder: Path) -> None:
    path = shard(folder)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FormatError, match="than the file has"):
        wk.open_checkpoint(folder)


def test_a_tensor_that_its_file_lacks(folder: Path) -> None:
    edit_index(folder, weight_map=weight_map(folder) | {"model.layers.9.x": shard(folder).name})
    with pytest.raises(MissingTensorError, match=r"model\.layers\.9\.x"):
        wk.open_checkpoint(folder)


def test_a_tensor_in_another_file_than_the_index_says(folder: Path) -> None:
    edit_index(folder, weight_map=weight_map(folder) | {"model.norm.weight": shard(folder, 1).name})
    with pytest.raises(MissingTensorError, match=r"model\.norm\.weight: not in the file that the index names"):
        wk.open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.total_size.weight"])
def test_a_tensor_that_the_index_does_not_know(name: str, folder: Path) -> None:
    if name not in weight_map(folder):
        path = shard(folder)
        write_safetensors(path, {**read_safetensors(path), name: ("U8", (1,), b"x")})
    edit_index(folder, weight_map={key: file for key, file in weight_map(folder).items() if key != name})
    with pytest.raises(IndexFileError, match=f"{name}.*not in the index"):
        wk.open_checkpoint(folder)


def test_a_tensor_in_two_files(folder: Path) -> None:
    first = read_safetensors(shard(folder, 1))
    write_safetensors(shard(folder, 1), {**first, "model.norm.weight": ("BF16", (144,), bytes(288))})
    with pytest.raises(IndexFileError, match=r"'model\.norm\.weight' is in two files"):
        wk.open_checkpoint(folder)


def test_all_problems_at_once(folder: Path) -> None:
    first, second, third = (shard(folder, number) for number in (1, 2, 3))
    first.unlink()
    second.write_bytes(b"")
    strangers = {f"model.layers.{number}.x": third.name for number in range(50, 60)}
    edit_index(folder, weight_map=weight_map(folder) | strangers)
    with pytest.raises(Problems) as caught:
        wk.open_checkpoint(folder)
    kinds = [type(problem).__name__ for problem in caught.value.problems]
    assert kinds.count("MissingFileError") == 1
    assert kinds.count("HeaderLengthError") == 1
    assert kinds.count("MissingTensorError") == 10
    assert "... and 5 more" in str(caught.value)


def test_a_shard_that_links_out_of_the_folder(folder: Path) -> None:
    path = shard(folder)
    shutil.move(path, folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")
    with pytest.raises(FormatError, match="leads out of the checkpoint's folder"):
        wk.open_checkpoint(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_for_a_shard(folder: Path) -> None:
    path = shard(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FormatError, match="not a regular file"):
        wk.open_checkpoint(folder)


def test_thousands_of_random_damages_are_refused_or_harmless(folder: Path) -> None:
    """Bytes of index, config and headers replaced at random: only our own errors come out."""
    rng = np.random.default_rng(0)
    originals = {path: path.read_bytes() for path in [folder / INDEX, folder / "config.json", shard(folder)]}
    lengths = {path: min(len(content), 40_000) for path, content in originals.items()}
    for _ in range(400):
        path = list(originals)[rng.integers(len(originals))]
        damaged = bytearray(originals[path])
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(lengths[path])] = rng.choice(np.frombuffer(b'[]{}",:019-e.\\\xff', np.uint8))
        path.write_bytes(damaged)
        try:
            checkpoint = wk.strip_mtp(wk.open_checkpoint(folder))
            wk.shard(wk.cast(checkpoint, "bf16"), mp=2)
        except WeightkitError as error:
            str(error).encode()
        path.write_bytes(originals[path])
