"""Each defect is put into a tiny checkpoint by hand, and exactly that defect must be reported."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import MOONLIGHT, V2_LITE, V3, Tiny, write_safetensors, write_tiny

import weightkit as wk
from weightkit import manifests
from weightkit.checkpoint import once
from weightkit.checkpoint.lock import Lock, LockedFile
from weightkit.errors import (
    ChecksumError,
    FormatError,
    NotACheckpointError,
    TensorError,
    UnsupportedError,
    WeightkitError,
)
from weightkit.examine import Report, stream, survey
from weightkit.examine.checksums import known_files
from weightkit.manifests import Manifest

Contents = dict[str, tuple[str, tuple[int, ...], bytes]]
INDEX = "model.safetensors.index.json"
ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
WEIGHT = "model.layers.0.self_attn.o_proj.weight"
SCALE = WEIGHT + "_scale_inv"
NORM = "model.norm.weight"


def check(folder: Path, **options: Any) -> Report:
    return wk.verify(folder, progress=False, **options)


def whats(report: Report) -> list[str]:
    """The sentences of the problems, without the names in them."""
    return sorted({problem.what for problem in report.problems})


def only(report: Report) -> WeightkitError:
    assert len(report.problems) == 1, report.render()
    return report.problems[0]


def read(path: Path) -> Contents:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = raw[8 + length :]
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit(path: Path, change: Callable[[Contents], object]) -> None:
    contents = read(path)
    change(contents)
    write_safetensors(path, contents)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def set_tensor(folder: Path, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    """Put other contents under a name, the index's total following."""
    path = file_of(folder, name)
    before = len(read(path)[name][2])
    edit(path, lambda contents: contents.update({name: (dtype, shape, data)}))
    edit_json(folder / INDEX, lambda index: grow(index, len(data) - before))


def add(folder: Path, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    edit(file, lambda contents: contents.update({name: (dtype, shape, data)}))
    edit_json(folder / INDEX, lambda index: (index["weight_map"].update({name: file.name}), grow(index, len(data))))


def remove(folder: Path, *names: str) -> None:
    """Take tensors out of files, index and total, as a careless writer would."""
    for name in names:
        path = file_of(folder, name)
        size = len(read(path)[name][2])
        edit(path, lambda contents, name=name: contents.pop(name))
        edit_json(folder / INDEX, lambda index, name=name: index["weight_map"].pop(name))
        edit_json(folder / INDEX, lambda index, size=size: grow(index, -size))


def grow(index: dict[str, Any], count: int) -> None:
    index["metadata"]["total_size"] += count


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "fp8")
    return tmp_path / "fp8"


@pytest.fixture
def mp4(tmp_path: Path, fp8: Path) -> Path:
    wk.write(wk.shard(wk.open_checkpoint(fp8), mp=4), tmp_path / "mp4", progress=False)
    return tmp_path / "mp4"


# Clean checkpoints


@pytest.mark.parametrize("model", [V3, V2_LITE, MOONLIGHT, replace(V3, mtp_layers=0), replace(V3, fp8=False)])
def test_clean_published(model: Tiny, tmp_path: Path) -> None:
    contents = write_tiny(tmp_path, model)
    report = check(tmp_path, values=True)
    assert report.ok, report.render()
    assert (report.layout, report.files, report.tensors) == ("published", 3, len(contents))
    assert report.size_bytes == sum(len(data) for _, _, data in contents.values())
    assert report.hashed_bytes == 0
    assert "none are known" in report.render()


def test_pain_07_weight_and_scale_in_different_shards_is_no_problem(fp8: Path) -> None:
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    assert file_of(fp8, name) != file_of(fp8, name + "_scale_inv")
    assert check(fp8).ok


def test_clean_single_file(tmp_path: Path) -> None:
    write_tiny(tmp_path, shards=1)
    (tmp_path / "model-00001-of-000001.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / INDEX).unlink()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        report = check(path, values=True)
        assert report.ok, report.render()
        assert report.layout == "single file"


@pytest.mark.parametrize(
    "convert",
    [
        lambda c: wk.cast(c, "bf16"),
        lambda c: wk.cast(c, "f16"),
        lambda c: wk.cast(c, "f32"),
        lambda c: wk.strip_mtp(c),
        lambda c: wk.keep_experts(c, 4),
        lambda c: wk.shard(c, mp=1),
        lambda c: wk.shard(c, mp=4),
        lambda c: wk.shard(wk.cast(c, "bf16"), mp=8),
        lambda c: wk.shard(c, ep=3),
    ],
    ids=["bf16", "f16", "f32", "strip", "experts4", "mp1", "mp4", "bf16-mp8", "ep3"],
)
def test_what_weightkit_writes_is_clean(convert: Callable[[Any], Any], fp8: Path, tmp_path: Path) -> None:
    wk.write(convert(wk.open_checkpoint(fp8)), tmp_path / "out", progress=False)
    report = check(tmp_path / "out", values=True)
    assert report.ok, report.render()
    lock = json.loads((tmp_path / "out/weightkit.lock.json").read_text())
    assert report.hashed_bytes == sum(file["size_bytes"] for file in lock["files"].values()) > 0


def test_one_shard_or_one_rank_by_its_path(fp8: Path, mp4: Path) -> None:
    assert check(sorted(fp8.glob("*.safetensors"))[1]).ok
    assert check(mp4 / "model2-mp4.safetensors").ok
    set_tensor(fp8, NORM, "F16", (144,), bytes(288))
    assert only(check(file_of(fp8, NORM))).what == "wrong dtype"


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "notes.txt"):
        with pytest.raises(NotACheckpointError):
            check(path)


# Files, headers, index


def test_pain_03_missing_shard(fp8: Path) -> None:
    sorted(fp8.glob("*.safetensors"))[1].unlink()
    problem = only(check(fp8))  # not the tensors in it, one by one
    assert "00002-of-000003" in str(problem)
    assert problem.fix


def test_pain_03_truncated_shard(fp8: Path) -> None:
    path = sorted(fp8.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    assert type(only(check(fp8))).__name__ == "TruncatedError"


def test_trailing_bytes(fp8: Path) -> None:
    path = sorted(fp8.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes() + b"x")
    assert type(only(check(fp8))).__name__ == "TrailingBytesError"


def test_index_names_another_file(fp8: Path) -> None:
    edit_json(fp8 / INDEX, lambda index: index["weight_map"].update({NORM: "model-00001-of-000003.safetensors"}))
    assert "not in the file that the index names" in only(check(fp8)).what


def test_index_names_a_tensor_that_is_nowhere(fp8: Path) -> None:
    path = file_of(fp8, NORM)
    edit(path, lambda contents: contents.pop(NORM))
    edit_json(fp8 / INDEX, lambda index: grow(index, -288))
    assert "not in the file that the index names" in only(check(fp8)).what


def test_tensor_is_not_in_the_index(fp8: Path) -> None:
    edit_json(fp8 / INDEX, lambda index: index["weight_map"].pop(NORM))
    assert "but not in the index" in only(check(fp8)).what


@pytest.mark.parametrize("total", [1, None])
def test_pain_10_total_size(total: int | None, fp8: Path) -> None:
    edit_json(fp8 / INDEX, lambda index: index.update(metadata={} if total is None else {"total_size": total}))
    assert "total_size" in only(check(fp8)).what


def test_pain_10_metadata_without_format_pt(fp8: Path) -> None:
    path = sorted(fp8.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes().replace(b'"format": "pt"', b'"format": "tf"'))
    assert "loaders refuse" in only(check(fp8)).what


def test_unlisted_file(fp8: Path) -> None:
    write_safetensors(fp8 / "model-extra.safetensors", {"x": ("F32", (1,), bytes(4))})
    problem = only(check(fp8))
    assert problem.what == "a safetensors file that the index does not name"
    assert problem.where is not None
    assert problem.where.endswith("model-extra.safetensors")


def test_no_index(fp8: Path) -> None:
    (fp8 / INDEX).unlink()
    assert only(check(fp8)).what == "no index"


def test_unfinished_write(fp8: Path) -> None:
    (fp8 / ".weightkit").mkdir()
    assert "not finished" in only(check(fp8)).what


# Tensors


def test_missing_tensors(fp8: Path) -> None:
    remove(fp8, NORM, WEIGHT, SCALE)
    report = check(fp8)
    assert whats(report) == ["no file holds this tensor"]
    assert {problem.where for problem in report.problems} == {NORM, WEIGHT, SCALE}


def test_missing_layer_is_one_problem(fp8: Path) -> None:
    remove(fp8, *[name for name in V3.tensors() if name.startswith("model.layers.1.")])
    problem = only(check(fp8))
    assert problem.where == "model.layers.1"
    assert problem.what == "no file holds any tensor of this layer"


def test_unexpected_tensor(fp8: Path) -> None:
    add(fp8, "model.layers.0.self_attn.q_norm.weight", "BF16", (4,), bytes(8))
    problem = only(check(fp8))
    assert isinstance(problem, TensorError)
    assert problem.what == "the config calls for no such tensor"


def test_wrong_shape(fp8: Path) -> None:
    set_tensor(fp8, NORM, "BF16", (145,), bytes(290))
    problem = only(check(fp8))
    assert (problem.what, problem.expected, problem.found) == ("wrong shape", "[144]", "[145]")


def test_pain_18_router_bias_downcast(fp8: Path) -> None:
    set_tensor(fp8, ROUTER_BIAS, "BF16", (8,), bytes(16))
    problem = only(check(fp8))
    assert (problem.what, problem.expected, problem.found) == ("wrong dtype", "F32", "BF16")


@pytest.mark.parametrize("dtype", ["I8", "F8_E5M2"])
def test_pain_09_one_byte_is_not_fp8(dtype: str, fp8: Path) -> None:
    _, shape, data = read(file_of(fp8, WEIGHT))[WEIGHT]
    set_tensor(fp8, WEIGHT, dtype, shape, data)
    problem = only(check(fp8))
    assert (problem.what, problem.expected, problem.found) == ("wrong dtype", "F8_E4M3", dtype)


@pytest.mark.parametrize("with_config", [True, False])
def test_pain_08_fp8_weight_without_scale(with_config: bool, fp8: Path) -> None:
    remove(fp8, SCALE)
    if not with_config:
        (fp8 / "config.json").unlink()
    report = check(fp8)
    found = [problem for problem in report.problems if type(problem).__name__ == "ScaleError"]
    assert [problem.what for problem in found] == ["an FP8 weight without its scale"]
    assert WEIGHT in str(found[0])
    assert len(report.problems) == (1 if with_config else 2)


@pytest.mark.parametrize("with_config", [True, False])
def test_scale_does_not_fit(with_config: bool, fp8: Path) -> None:
    set_tensor(fp8, SCALE, "F32", (1, 1), np.ones(1, np.float32).tobytes())
    if not with_config:
        (fp8 / "config.json").unlink()
    assert "the scale does not fit its weight" in whats(check(fp8))


def test_scale_without_fp8_weight(tmp_path: Path) -> None:
    write_tiny(tmp_path, replace(V3, fp8=False))
    add(tmp_path, SCALE, "F32", (2, 4), np.ones(8, np.float32).tobytes())
    assert only(check(tmp_path)).what == "a scale without an FP8 weight"


# Config against contents


def test_pain_04_mtp_declared_and_not_there(tmp_path: Path) -> None:
    write_tiny(tmp_path, replace(V3, mtp_layers=0, extra_config={"num_nextn_predict_layers": 1}))
    problem = only(check(tmp_path))
    assert (problem.what, problem.expected, problem.found) == (
        "num_nextn_predict_layers is not the number of MTP layers",
        "0",
        "1",
    )


def test_pain_04_mtp_there_and_not_declared(tmp_path: Path) -> None:
    write_tiny(tmp_path, replace(V3, extra_config={"num_nextn_predict_layers": 0}))
    problem = only(check(tmp_path))
    assert (problem.expected, problem.found) == ("1", "0")


def test_pain_04_mtp_half_there(fp8: Path) -> None:
    remove(fp8, "model.layers.3.eh_proj.weight", "model.layers.3.enorm.weight")
    report = check(fp8)
    assert whats(report) == ["no file holds this tensor"]
    assert len(report.problems) == 2
    assert "strip" in report.render()


def test_pain_17_number_of_layers_is_stale(tmp_path: Path) -> None:
    write_tiny(tmp_path, replace(V3, extra_config={"num_hidden_layers": 2}))
    problem = only(check(tmp_path))
    assert (problem.what, problem.expected, problem.found) == (
        "num_hidden_layers is not the number of layers",
        "3",
        "2",
    )


def test_pain_06_bf16_declared_fp8(tmp_path: Path) -> None:
    write_tiny(
        tmp_path, replace(V3, fp8=False, extra_config={"quantization_config": V3.config()["quantization_config"]})
    )
    assert only(check(tmp_path)).what == "quantization_config declares FP8 weights, and none is"


def test_pain_06_fp8_declared_unquantized(fp8: Path) -> None:
    edit_json(fp8 / "config.json", lambda config: config.pop("quantization_config"))
    assert only(check(fp8)).what == "no quantization_config, and weights are FP8"


@pytest.mark.parametrize("model", [V3, V2_LITE, MOONLIGHT])
def test_pain_06_torch_dtype(model: Tiny, tmp_path: Path) -> None:
    write_tiny(tmp_path, replace(model, extra_config={**model.extra_config, "torch_dtype": "float16"}))
    problem = only(check(tmp_path))
    assert (problem.what, problem.expected, problem.found) == (
        "torch_dtype is not the dtype of the tensors",
        "bfloat16",
        "float16",
    )


def test_pain_11_auto_map(fp8: Path) -> None:
    auto_map = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.Y", "AutoOther": "other/repo--module.Z"}
    edit_json(fp8 / "config.json", lambda config: config.update(auto_map=auto_map))
    (fp8 / "modeling_x.py").write_text("from .helper_x import thing\nclass Y: ...\n")
    report = check(fp8)
    assert {Path(str(problem.where)).name for problem in report.problems} == {"configuration_x.py", "helper_x.py"}
    (fp8 / "configuration_x.py").write_text("class X: ...")
    (fp8 / "helper_x.py").touch()
    assert check(fp8).ok


def test_generation_config_does_not_parse(fp8: Path) -> None:
    (fp8 / "generation_config.json").write_text("{")
    assert "not JSON" in only(check(fp8)).what


def test_no_tokenizer_is_a_note(fp8: Path) -> None:
    assert "no tokenizer" in check(fp8).notes[0]
    (fp8 / "tokenizer.model").write_text("")
    assert check(fp8).notes == ()


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_pain_12_distilled_model(model_type: str, fp8: Path) -> None:
    edit_json(fp8 / "config.json", lambda config: config.update(model_type=model_type))
    problem = only(check(fp8))
    assert isinstance(problem, UnsupportedError)
    assert "distilled" in problem.what
    assert "deepseek_v3" in str(problem.expected)


def test_pain_12_distilled_weights_under_another_config(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    names = [f"model.layers.{layer}.self_attn.{p}_proj.weight" for layer in range(9) for p in "qkv"]
    write_safetensors(tmp_path / "a.safetensors", {name: ("BF16", (2, 2), bytes(8)) for name in names})
    index = {"metadata": {"total_size": 8 * len(names)}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(index))
    report = check(tmp_path)
    found = [problem for problem in report.problems if isinstance(problem, TensorError)]
    assert len(found) == 1
    assert "not those of the model" in found[0].what
    assert len(report.problems) <= 4, report.render()


def test_config_of_another_place(fp8: Path, tmp_path: Path) -> None:
    (fp8 / "config.json").rename(tmp_path / "elsewhere.json")
    assert only(check(fp8)).what == "no config.json"
    assert check(fp8, config=tmp_path / "elsewhere.json").ok
    assert check(fp8, config=V3.config()).ok


# Everything at once


def test_all_problems_in_one_run(fp8: Path) -> None:
    remove(fp8, SCALE)
    add(fp8, "model.extra.weight", "BF16", (2,), bytes(4))
    set_tensor(fp8, ROUTER_BIAS, "BF16", (8,), bytes(16))
    set_tensor(fp8, "lm_head.weight", "BF16", (63, 144), bytes(63 * 144 * 2))
    edit_json(fp8 / INDEX, lambda index: grow(index, 1))
    edit_json(fp8 / "config.json", lambda config: config.update(auto_map={"AutoConfig": "configuration_x.X"}))
    write_safetensors(fp8 / "z.safetensors", {"x": ("F32", (1,), bytes(4))})
    (fp8 / "generation_config.json").write_text("[]")
    (fp8 / "weightkit.lock.json").write_text("{}")
    weight = read(file_of(fp8, NORM))[NORM][2]
    set_tensor(fp8, NORM, "BF16", (144,), b"\x80\x7f" + weight[2:])
    report = check(fp8, values=True)
    assert whats(report) == sorted(
        [
            "an FP8 weight without its scale",
            "the config calls for no such tensor",
            "wrong dtype",
            "wrong shape",
            "metadata.total_size is not the bytes of tensor data",
            "a code file that is named is not there",
            "a safetensors file that the index does not name",
            "not a JSON object",
            "a lock of another version",
            "values that are not finite",
        ]
    )
    assert len(report.problems) == 10
    text = report.render()
    assert all(problem.what in text for problem in report.problems)
    assert "10 problems of 10 kinds" in text
    assert json.loads(json.dumps(report.to_json()))["ok"] is False


def test_a_flood_is_grouped(fp8: Path) -> None:
    edit_json(fp8 / "config.json", lambda config: config.update(n_routed_experts=4, n_group=2))
    report = check(fp8)
    text = report.render()
    assert len(report.problems) > 70
    assert len(text.splitlines()) < 30
    assert "more of this kind" in text


# Ranks


def test_pain_03_missing_rank(mp4: Path) -> None:
    (mp4 / "weightkit.lock.json").unlink()
    (mp4 / "model2-mp4.safetensors").unlink()
    problem = only(check(mp4))
    assert "model2-mp4" in str(problem.where)
    (mp4 / "model0-mp4.safetensors").unlink()
    assert len(check(mp4).problems) == 2


def test_ranks_of_several_degrees(mp4: Path) -> None:
    (mp4 / "model0-mp2.safetensors").write_bytes((mp4 / "model0-mp4.safetensors").read_bytes())
    assert "several degrees" in only(check(mp4)).what


def test_rank_with_another_ranks_expert(mp4: Path) -> None:
    (mp4 / "weightkit.lock.json").unlink()
    name = "layers.1.ffn.experts.0.w1.weight"
    content = read(mp4 / "model0-mp4.safetensors")[name]
    edit(mp4 / "model0-mp4.safetensors", lambda contents: contents.pop(name))
    edit(mp4 / "model1-mp4.safetensors", lambda contents: contents.update({name: content}))
    report = check(mp4)
    assert whats(report) == ["no file holds this tensor", "the config calls for no such tensor"]
    assert len(report.problems) == 2
    assert "model0-mp4.safetensors: model.layers.1.mlp.experts.0.gate_proj.weight" in report.render()


def test_rank_with_a_wrong_share_or_a_published_name(mp4: Path) -> None:
    (mp4 / "weightkit.lock.json").unlink()

    def change(contents: Contents) -> None:
        contents["norm.weight"] = ("BF16", (36,), bytes(72))
        contents["model.norm.weight"] = ("BF16", (144,), bytes(288))

    edit(mp4 / "model3-mp4.safetensors", change)
    report = check(mp4)
    assert whats(report) == ["the config calls for no such tensor", "wrong shape"]
    assert len(report.problems) == 2


def test_replicas_with_other_bytes(mp4: Path) -> None:
    path = mp4 / "model3-mp4.safetensors"
    dtype, shape, data = read(path)["layers.1.ffn.gate.weight"]
    (mp4 / "weightkit.lock.json").unlink()
    edit(path, lambda contents: contents.update({"layers.1.ffn.gate.weight": (dtype, shape, data[:-1] + b"\x01")}))
    problem = only(check(mp4))
    assert problem.where == "layers.1.ffn.gate.weight"
    assert "model3-mp4" in str(problem.found)
    assert check(mp4, quick=True).ok


def test_pain_04_ranks_beside_the_published_config(mp4: Path) -> None:
    (mp4 / "weightkit.lock.json").unlink()
    edit_json(mp4 / "config.json", lambda config: config.update(num_nextn_predict_layers=1))
    assert "num_nextn_predict_layers" in only(check(mp4)).what
    (mp4 / "config.json").unlink()
    assert check(mp4, config=V3.config()).ok


def test_pain_05_ranks_that_the_config_cannot_have(mp4: Path) -> None:
    (mp4 / "weightkit.lock.json").unlink()
    edit_json(mp4 / "config.json", lambda config: config.update(num_attention_heads=6))
    assert "6 attention heads cannot be split over 4 ranks" in whats(check(mp4))


# Checksums


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.usefixtures("cache")
def test_pain_03_flipped_bit(mp4: Path) -> None:
    flip(mp4 / "model1-mp4.safetensors")
    problem = only(check(mp4))
    assert isinstance(problem, ChecksumError)
    assert "model1-mp4" in str(problem.where)
    quick = check(mp4, quick=True)
    assert quick.ok
    assert quick.hashed_bytes == 0


def test_side_files_are_locked_too(mp4: Path) -> None:
    template = mp4 / "chat_template.jinja"
    flip(template, template.read_bytes().index(b"content"))  # it still parses
    assert isinstance(only(check(mp4)), ChecksumError)


def test_locked_file_is_missing_or_of_another_size(mp4: Path) -> None:
    (mp4 / "chat_template.jinja").unlink()
    (mp4 / "tokenizer_config.json").write_text("{}")
    for report in (check(mp4), check(mp4, quick=True)):
        assert whats(report) == ["no such file", "not the size in weightkit.lock.json"]
        assert len(report.problems) == 2


def test_checksums_of_a_manifest(fp8: Path) -> None:
    found = survey.survey(fp8)
    entry = {"size_bytes": 19, "sha256": "0" * 64}
    known, problems = known_files(found, Manifest("pico", "pico", {}, files={"generation_config.json": entry}))
    assert not problems
    assert known.files == {"generation_config.json": LockedFile(19, "0" * 64)}
    assert "pico" in known.source


def test_shipped_checkpoint_is_held_to_its_manifest() -> None:
    folder = manifests.load("pico").path
    assert folder is not None
    report = check(folder, values=True)
    assert report.ok, report.render()
    assert report.hashed_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert {check.name for check in report.checks if check.done} >= {"totals", "checksums", "values"}


def test_totals_of_a_manifest(fp8: Path) -> None:
    report = check(fp8, manifest="deepseek-v3")
    assert "the number of tensors is not that of DeepSeek-V3" in whats(report)
    assert "the number of files is not that of DeepSeek-V3" in whats(report)


# Values

BAD_VALUES = [
    (WEIGHT, np.uint8, 0x7F, "1 NaN"),
    (WEIGHT, np.uint8, 0xFF, "1 NaN"),
    (NORM, np.uint16, 0x7F80, "1 Inf"),
    (NORM, np.uint16, 0xFF80, "1 Inf"),
    (NORM, np.uint16, 0xFFC0, "1 NaN"),
    (ROUTER_BIAS, np.uint32, 0x7FC0_0000, "1 NaN"),
    (ROUTER_BIAS, np.uint32, 0xFF80_0000, "1 Inf"),
    (SCALE, np.uint32, 0x0000_0000, "1 zero or negative"),
    (SCALE, np.uint32, 0x8000_0000, "1 zero or negative"),
    (SCALE, np.uint32, 0xBF80_0000, "1 zero or negative"),
    (SCALE, np.uint32, 0x7F80_0000, "1 Inf"),
    (SCALE, np.uint32, 0xFFC0_0000, "1 NaN"),
]
GOOD_VALUES = [
    (WEIGHT, np.uint8, 0x7E),
    (WEIGHT, np.uint8, 0xFE),
    (NORM, np.uint16, 0xFF7F),
    (ROUTER_BIAS, np.uint32, 0xFF7F_FFFF),
    (ROUTER_BIAS, np.uint32, 0x8000_0000),
    (SCALE, np.uint32, 0x7F7F_FFFF),
    (SCALE, np.uint32, 0x0000_0001),
]


def put(folder: Path, name: str, bits: type[np.unsignedinteger[Any]], at: int, value: int) -> tuple[int, ...]:
    dtype, shape, data = read(file_of(folder, name))[name]
    values = np.frombuffer(data, bits).copy()
    values[at] = value
    set_tensor(folder, name, dtype, shape, values.tobytes())
    return tuple(int(index) for index in np.unravel_index(at % len(values), shape))


@pytest.mark.parametrize(("name", "bits", "value", "found"), BAD_VALUES)
def test_values(name: str, bits: type[np.unsignedinteger[Any]], value: int, found: str, fp8: Path) -> None:
    coordinate = put(fp8, name, bits, -2, value)
    assert check(fp8).ok
    problem = only(check(fp8, values=True))
    assert type(problem).__name__ == "ValuesError"
    assert name in str(problem.where)
    assert str(problem.found).startswith(found + " of ")
    assert str(problem.found).endswith(f"the first at {list(coordinate)}")


@pytest.mark.parametrize(("name", "bits", "value"), GOOD_VALUES)
def test_extreme_values_are_finite(name: str, bits: type[np.unsignedinteger[Any]], value: int, fp8: Path) -> None:
    put(fp8, name, bits, 1, value)
    assert check(fp8, values=True).ok


@pytest.fixture(params=["from the cache", "past it"])
def cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    opened: list[int] = []

    def open_direct(file: int) -> int:
        opened.append(file)
        return os.dup(file)

    monkeypatch.setattr(once, "PIECE_BYTES", 8192)
    monkeypatch.setattr(once, "cached_share", lambda _: float(request.param == "from the cache"))
    monkeypatch.setattr(once, "_is_on_a_disk", lambda _: True)
    monkeypatch.setattr(once, "open_direct", open_direct)
    yield request.param
    assert bool(opened) == (request.param == "past it")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("chunk", [64, 1001, 4096])
def test_values_and_checksums_in_chunks_of_any_size(chunk: int, mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
    assert check(mp4, values=True).ok
    path = mp4 / "model1-mp4.safetensors"
    dtype, shape, data = read(path)["head.weight"]
    values = np.frombuffer(data, np.uint16).copy()
    values[[700, 701, 2000]] = 0x7F80, 0x7FFF, 0xFF80
    edit(path, lambda contents: contents.update({"head.weight": (dtype, shape, values.tobytes())}))
    report = check(mp4, values=True)
    found = [str(problem.found) for problem in report.problems if type(problem).__name__ == "ValuesError"]
    assert found == [f"1 NaN, 2 Inf of BF16 [16, 144], the first at {list(divmod(700, 144))}"]


# Damage and malice


def test_pain_23_index_leaves_the_folder(fp8: Path) -> None:
    edit_json(fp8 / INDEX, lambda index: index["weight_map"].update({NORM: "../secret.safetensors"}))
    assert "not a file name" in only(check(fp8)).what


def test_pain_23_links_and_pipes(fp8: Path, tmp_path: Path) -> None:
    first, second, _ = sorted(fp8.glob("*.safetensors"))
    first.rename(tmp_path / "outside.safetensors")
    first.symlink_to(tmp_path / "outside.safetensors")
    second.unlink()
    os.mkfifo(second)
    assert whats(check(fp8)) == ["a link that leads out of the checkpoint's folder", "not a regular file"]


@pytest.mark.parametrize("value", ["1e999", "NaN", "-1", "[]", "1.5"])
def test_pain_23_total_size(value: str, fp8: Path) -> None:
    index = json.loads((fp8 / INDEX).read_text())
    text = json.dumps(index).replace(str(index["metadata"]["total_size"]), value)
    (fp8 / INDEX).write_text(text)
    assert len(check(fp8).problems) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**15},
        {"n_routed_experts": 10**15},
        {"num_nextn_predict_layers": 10**15},
        {"num_hidden_layers": 9_999, "n_routed_experts": 99_999},
        {"num_hidden_layers": "3"},
        {"rope_theta": 10**400},
        {"model_type": ["deepseek_v3"]},
        {"model_type": "deepseek_v32", "indexer_types": [[]], "index_n_heads": 1, "index_head_dim": 1, "index_topk": 1},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_pain_23_absurd_config(fields: dict[str, object], fp8: Path) -> None:
    edit_json(fp8 / "config.json", lambda config: config.update(fields))
    started = time.process_time()
    only(check(fp8))
    assert time.process_time() - started < 30


@pytest.mark.parametrize("name", ["model.\x1b[2J.weight", "model.\x1b[2J\ud800.weight"])
def test_pain_23_names_do_not_drive_the_terminal(name: str, fp8: Path) -> None:
    add(fp8, name, "BF16", (2,), bytes(4))
    text = check(fp8).render()
    assert "\x1b" not in text
    assert "\\x1b[2J" in text
    text.encode()


def test_pain_23_absurd_rank_count(fp8: Path) -> None:
    (fp8 / INDEX).unlink()
    for path in fp8.glob("*.safetensors"):
        path.unlink()
    write_safetensors(fp8 / "model0-mp999999999999.safetensors", {"x": ("F32", (1,), bytes(4))})
    assert not check(fp8).ok


@pytest.mark.parametrize("lock", ["{", "[]", '{"version": 1, "files": {"../x": {"size_bytes": 1, "sha256": "0"}}}'])
def test_damaged_lock(lock: str, fp8: Path) -> None:
    (fp8 / "weightkit.lock.json").write_text(lock)
    assert isinstance(only(check(fp8)), FormatError)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(["config.json", INDEX, "model-00002-of-000003.safetensors", "tokenizer_config.json"]),
    at=st.floats(0, 1),
    new=st.binary(min_size=1, max_size=6),
)
def test_damaged_bytes_are_problems_and_no_crash(
    file: str, at: float, new: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    write_tiny(folder, replace(V3, layers=1, mtp_layers=0, experts=4))
    path = folder / file
    raw = path.read_bytes()
    place = int(at * min(len(raw), 5000))
    path.write_bytes(raw[:place] + new + raw[place + len(new) :])
    report = check(folder, values=True)
    report.render()
    json.dumps(report.to_json())


# Size and interruption


def wait_for_reads(pid: int, least_bytes: int) -> None:
    """Until the process has read so much, which is more than its imports are."""

    def read_bytes() -> int:
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])

    least_bytes, until = read_bytes() + least_bytes, time.monotonic() + 60
    while read_bytes() < least_bytes:
        assert time.monotonic() < until, "nothing is read"
        time.sleep(0.02)


def test_interrupt_stops_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = 1 << 40  # all of it would take many minutes
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    )
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + size)
    total = path.stat().st_size
    (tmp_path / "weightkit.lock.json").write_bytes(Lock({path.name: LockedFile(total, "0" * 64)}).to_bytes())
    code = "import sys, weightkit as wk\nprint('go', flush=True)\nwk.verify(sys.argv[1], progress=False)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"go\n"
        wait_for_reads(run.pid, 64 << 20)
        assert run.poll() is None
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
        assert run.returncode in (-signal.SIGINT, 130)
