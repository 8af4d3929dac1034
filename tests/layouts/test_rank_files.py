"""Rank files: opened as one checkpoint, whoever wrote them, and refused where they do not fit together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import Contents, read_config, read_safetensors, without
from tiny import MOONLIGHT, V3, write_safetensors, write_tiny

import weightkit as wk
from weightkit.checkpoint import Reader, Stored
from weightkit.errors import (
    CheckpointError,
    MissingFileError,
    MissingTensorError,
    PlanError,
    Problems,
    TensorError,
    WeightkitError,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Contents, Path]:
    """What the published checkpoint holds, and a folder of it as 4 ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    contents = write_tiny(folder / "v3")
    wk.write(wk.shard(wk.open_checkpoint(folder / "v3"), mp=4), folder / "mp4", device="cpu", progress=False)
    return contents, folder


@pytest.fixture
def ranks(written: tuple[Contents, Path], tmp_path: Path) -> Path:
    shutil.copytree(written[1] / "mp4", tmp_path / "mp4")
    return tmp_path / "mp4"


def edit(folder: Path, rank: int, change: Callable[[Contents], object]) -> None:
    path = folder / f"model{rank}-mp4.safetensors"
    tensors = read_safetensors(path)
    change(tensors)
    write_safetensors(path, tensors)


def refusal(folder: Path) -> WeightkitError:
    with pytest.raises(WeightkitError) as caught:
        wk.open_checkpoint(folder)
    return caught.value


def test_opened_under_published_names(written: tuple[Contents, Path]) -> None:
    contents, folder = written
    expected = without(contents, "layers.3.")
    checkpoint = wk.open_checkpoint(folder / "mp4")
    assert checkpoint.layout == "4 mp ranks"
    assert checkpoint.config == V3.config() | {"num_nextn_predict_layers": 0}
    assert set(checkpoint.side_files) == {"chat_template.jinja", "generation_config.json", "tokenizer_config.json"}
    with Reader() as reader:
        found = {
            name: (tensor.dtype, tensor.shape, reader.read(tensor).tobytes())
            for name, tensor in checkpoint.tensors.items()
        }
    assert found == expected


def test_split_tensors_of_the_ranks_are_concats_and_experts_are_not(written: tuple[Contents, Path]) -> None:
    checkpoint = wk.open_checkpoint(written[1] / "mp4")
    expert = checkpoint["model.layers.1.mlp.experts.5.up_proj.weight"]
    assert isinstance(expert, Stored)
    assert Path(expert.path).name == "model2-mp4.safetensors"
    assert checkpoint["model.layers.1.self_attn.o_proj.weight"].shape == (144, 512)


def test_files_of_the_inference_demo_with_the_published_config(ranks: Path) -> None:
    """Its converter writes no config; the published one declares an MTP layer, which rank files leave out."""
    (ranks / "config.json").unlink()
    checkpoint = wk.open_checkpoint(ranks, config=V3.config())
    assert checkpoint.config["num_nextn_predict_layers"] == 0
    wk.write(wk.merge(checkpoint), ranks.parent / "merged", progress=False)
    assert read_config(ranks.parent / "merged")["num_nextn_predict_layers"] == 0


def test_bf16_ranks_with_the_published_fp8_config(tmp_path: Path) -> None:
    write_tiny(tmp_path / "v3")
    wk.write(wk.shard(wk.cast(wk.open_checkpoint(tmp_path / "v3"), "bf16"), mp=8), tmp_path / "mp8", progress=False)
    checkpoint = wk.open_checkpoint(tmp_path / "mp8", config=V3.config())
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.dtypes == {"BF16", "F32"}


def test_a_stored_inv_freq_stays_behind(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "moonlight", MOONLIGHT)
    wk.write(wk.shard(wk.open_checkpoint(tmp_path / "moonlight"), mp=2), tmp_path / "mp2", progress=False)
    assert set(wk.open_checkpoint(tmp_path / "mp2").tensors) == set(without(contents, "inv_freq"))


def test_a_missing_rank(ranks: Path) -> None:
    (ranks / "model2-mp4.safetensors").unlink()
    error = refusal(ranks)
    assert isinstance(error, MissingFileError)
    assert str(error.where).endswith("model2-mp4.safetensors")


def test_two_missing_ranks_and_a_damaged_one(ranks: Path) -> None:
    (ranks / "model2-mp4.safetensors").unlink()
    (ranks / "model3-mp4.safetensors").unlink()
    os.truncate(ranks / "model0-mp4.safetensors", 5)
    error = refusal(ranks)
    assert isinstance(error, Problems)
    assert len(error.problems) == 3


def test_several_degrees_in_one_folder(ranks: Path) -> None:
    shutil.copy(ranks / "model0-mp4.safetensors", ranks / "model0-mp2.safetensors")
    error = refusal(ranks)
    assert type(error) is CheckpointError
    assert "found model0-mp2.safetensors, model0-mp4.safetensors" in str(error)


@pytest.mark.parametrize("name", ["model-mp4.safetensors", "model01-mp4.safetensors", "model0-mp4.safetensors.partial"])
def test_names_that_are_no_rank_file(name: str, ranks: Path) -> None:
    shutil.copy(ranks / "model0-mp4.safetensors", ranks / name)
    assert wk.open_checkpoint(ranks).layout == "4 mp ranks"


def test_a_tensor_that_one_rank_lacks(ranks: Path) -> None:
    edit(ranks, 1, lambda tensors: tensors.pop("layers.1.attn.wo.weight"))
    error = refusal(ranks)
    assert isinstance(error, MissingTensorError)
    assert "model.layers.1.self_attn.o_proj.weight: not on every rank: expected on 4 ranks, found not on [1]" in str(
        error
    )


def test_an_expert_that_no_rank_has(ranks: Path) -> None:
    edit(ranks, 2, lambda tensors: tensors.pop("layers.1.ffn.experts.5.w3.weight"))
    error = refusal(ranks)
    assert isinstance(error, MissingTensorError)
    assert error.where == "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.1.ffn.experts.5.w3.weight", (127, 144)),  # an expert
        ("layers.1.attn.wo.weight", (144, 127)),  # split by columns
        ("layers.1.attn.wo.weight", (143, 128)),
        ("layers.1.attn.wo.weight", (144,)),
        ("layers.1.attn.wo.weight", ()),
        ("embed.weight", (17, 144)),  # split by rows
        ("embed.weight", ()),
        ("norm.weight", (143,)),  # whole on each
    ],
)
def test_a_wrong_shape_on_one_rank(name: str, shape: tuple[int, ...], ranks: Path) -> None:
    def change(tensors: Contents) -> None:
        dtype, _, data = tensors[name]
        size = 1 if dtype == "F8_E4M3" else 2
        count = size
        for length in shape:
            count *= length
        tensors[name] = (dtype, shape, bytes(count) if count > len(data) else data[:count])

    edit(ranks, 2, change)
    assert isinstance(refusal(ranks), TensorError)


def test_another_dtype_on_one_rank(ranks: Path) -> None:
    edit(ranks, 2, lambda tensors: tensors.update({"embed.weight": ("F16", *tensors["embed.weight"][1:])}))
    error = refusal(ranks)
    assert isinstance(error, TensorError)
    assert "do not join" in str(error)


@pytest.mark.parametrize("name", ["model.norm.weight", "layers.1.attn.nothing.weight", "layers.7.attn_norm.weight", ""])
def test_a_tensor_that_the_config_does_not_call_for(name: str, ranks: Path) -> None:
    edit(ranks, 2, lambda tensors: tensors.update({name: ("U8", (1,), b"x")}))
    assert isinstance(refusal(ranks), CheckpointError)


@pytest.mark.parametrize("mp", [0, -1, 3, 5, 8, 16, 10**9])
def test_an_illegal_degree_lists_the_legal_ones(mp: int, written: tuple[Contents, Path]) -> None:
    with pytest.raises(PlanError, match="Legal --mp for this FP8 checkpoint: 1, 2, 4"):
        wk.shard(wk.open_checkpoint(written[1] / "v3"), mp=mp)


@pytest.mark.parametrize("ep", [0, -1, 9])
def test_an_illegal_number_of_expert_ranks(ep: int, written: tuple[Contents, Path]) -> None:
    with pytest.raises(PlanError, match="from 1 to 8"):
        wk.shard(wk.open_checkpoint(written[1] / "v3"), ep=ep)


@pytest.mark.parametrize("degrees", [{}, {"mp": 2, "ep": 2}])
def test_one_kind_of_ranks(degrees: dict[str, int], written: tuple[Contents, Path]) -> None:
    with pytest.raises(PlanError, match="one of mp and ep"):
        wk.shard(wk.open_checkpoint(written[1] / "v3"), **degrees)


@pytest.mark.parametrize("degrees", [{"mp": 2}, {"ep": 3}], ids=str)
def test_a_checkpoint_that_is_not_what_its_config_says_is_not_cut(
    degrees: dict[str, int], written: tuple[Contents, Path], tmp_path: Path
) -> None:
    """A row too many would be dropped in silence, an absent tensor be missed an hour into loading."""
    shutil.copytree(written[1] / "v3", tmp_path / "v3")
    for path in (tmp_path / "v3").glob("*.safetensors"):
        tensors = read_safetensors(path)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"] = ("BF16", (65, 144), bytes(65 * 144 * 2))
        tensors.pop("model.layers.2.mlp.experts.3.down_proj.weight_scale_inv", None)
        write_safetensors(path, tensors)
    write_index(tmp_path / "v3")
    with pytest.raises(Problems) as caught:
        wk.shard(wk.open_checkpoint(tmp_path / "v3"), **degrees)
    assert {(type(problem), problem.where) for problem in caught.value.problems} == {
        (TensorError, "model.embed_tokens.weight"),
        (MissingTensorError, "model.layers.2.mlp.experts.3.down_proj.weight_scale_inv"),
    }


def write_index(folder: Path) -> None:
    import json

    weight_map = {name: path.name for path in folder.glob("*.safetensors") for name in read_safetensors(path)}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
