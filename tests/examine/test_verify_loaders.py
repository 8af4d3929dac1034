"""Defects that no tensor tells and that loaders trip over: each in a whole checkpoint, and each the one problem."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import KIMI, V2_LITE, V3, V3_INT4, Tiny, write_safetensors, write_tiny

import weightkit as wk
from weightkit import manifests
from weightkit.errors import WeightkitError
from weightkit.examine.loaders import CLASSES, config_problems
from weightkit.examine.rope import rope_notes
from weightkit.family import Architecture

Change = Callable[[dict[str, Any]], object]


def edit(path: Path, change: Change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def only(folder: Path) -> WeightkitError:
    report = wk.verify(folder, progress=False)
    assert len(report.problems) == 1, report.render()
    return report.problems[0]


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "fp8")
    return tmp_path / "fp8"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_tiny(folder / "fp8")
    wk.write(wk.shard(wk.open_checkpoint(folder / "fp8"), mp=2), folder / "mp2", device="cpu", progress=False)
    (folder / "mp2" / "weightkit.lock.json").unlink()
    return folder / "mp2"


@pytest.mark.parametrize("model", [V3, V2_LITE, KIMI, V3_INT4])
def test_published_classes_are_right(model: Tiny, tmp_path: Path) -> None:
    write_tiny(tmp_path / "it", model)
    assert wk.verify(tmp_path / "it", progress=False).ok


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c.pop("architectures"), "architectures does not name the class"),
        (lambda c: c.update(architectures=[]), "architectures does not name the class"),
        (lambda c: c.update(architectures="DeepseekV3ForCausalLM"), "architectures does not name the class"),
        (lambda c: c.update(architectures=["LlamaForCausalLM"]), "architectures does not name the class"),
        (lambda c: c.update(model_type="deepseek_v2"), "of model_type deepseek_v2, and engines go by it"),
        (lambda c: c.update(num_key_value_heads=4), "num_key_value_heads is not num_attention_heads"),
        (lambda c: c.update(dtype="float32"), "torch_dtype and dtype differ"),
        (lambda c: c["quantization_config"].update(activation_scheme="static"), "activation_scheme is not dynamic"),
        (lambda c: c["quantization_config"].pop("activation_scheme"), "activation_scheme is not dynamic"),
        (lambda c: c.update(num_experts_per_tok=6), "hold fewer experts than it gets"),
        (lambda c: c.update(n_group=8, topk_group=4), "groups of one expert"),
        (lambda c: c.update(eos_token_id=64), "eos_token_id is no token"),
        (lambda c: c.update(eos_token_id=[1, -1]), "eos_token_id is no token"),
        (lambda c: c.update(bos_token_id="0"), "bos_token_id is no token"),
        (lambda c: c.update(pad_token_id=64), "pad_token_id is no token"),
        (lambda c: c.update(hidden_act="gelu"), "another activation function"),
        (lambda c: c.update(rope_scaling={"type": "yarn"}), "YaRN needs it"),
        (lambda c: c.update(rope_scaling={"type": "yarn", "factor": "40"}), "factor: expected a number"),
        (lambda c: c.update(rope_scaling={"type": "yarn", "factor": 0}), "factor: expected a positive"),
    ],
)
def test_config(change: Change, what: str, fp8: Path) -> None:
    edit(fp8 / "config.json", change)
    assert what in only(fp8).what


O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize("field", ["modules_to_not_convert", "ignored_layers"])
def test_fp8_although_it_is_excepted(field: str, fp8: Path) -> None:
    edit(fp8 / "config.json", lambda c: c["quantization_config"].update({field: [O_PROJ]}))
    problem = only(fp8)  # its scale is no second one
    assert str(problem.where).endswith(f"{O_PROJ}.weight")
    assert (problem.expected, problem.found) == ("BF16", "F8_E4M3")
    assert "modules_to_not_convert" in str(problem.fix)


def test_not_fp8_and_not_excepted(fp8: Path, tmp_path: Path) -> None:
    """A linear weight in BF16 without a scale is right where the config excepts it, and only there."""
    contents = write_tiny(tmp_path / "it", shards=1)
    dtype, shape, data = contents[f"{O_PROJ}.weight"]
    del contents[f"{O_PROJ}.weight_scale_inv"]
    contents[f"{O_PROJ}.weight"] = ("BF16", shape, data * 2)
    folder = tmp_path / "single"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", contents)
    (folder / "config.json").write_text(json.dumps(V3.config()))
    problem = only(folder)
    assert (problem.expected, problem.found) == (dtype, "BF16")
    assert "modules_to_not_convert" in str(problem.fix)
    edit(folder / "config.json", lambda c: c["quantization_config"].update(ignored_layers=[O_PROJ]))
    assert wk.verify(folder, progress=False).ok


@pytest.mark.parametrize("name", ["o_proj", "self_attn.o_proj", "", "model.layers.*.self_attn", "re:.*o_proj"])
def test_exceptions_that_engines_read_differently(name: str, fp8: Path) -> None:
    edit(fp8 / "config.json", lambda c: c["quantization_config"].update(modules_to_not_convert=["lm_head", name]))
    problem = only(fp8)
    assert "by patterns or by ends of names" in problem.what
    assert problem.found == repr(name)


@pytest.mark.parametrize("value", [O_PROJ, [3], {"a": 1}])
def test_exceptions_that_are_no_names(value: object, fp8: Path) -> None:
    edit(fp8 / "config.json", lambda c: c["quantization_config"].update(ignored_layers=value))
    assert "ignored_layers: expected a list of names" in only(fp8).what


def test_exceptions_as_glm_publishes_them(fp8: Path) -> None:
    """All that is never quantized, and a name that no module has (``indexers_proj``)."""
    layers = ["input_layernorm", "mlp.gate", "mlp.gate.e_score_correction_bias", "self_attn.indexers_proj", "eh_proj"]
    names = ["lm_head", "model.embed_tokens", *(f"model.layers.{n}.{name}" for n in range(4) for name in layers)]
    edit(fp8 / "config.json", lambda c: c["quantization_config"].update(modules_to_not_convert=names))
    report = wk.verify(fp8, progress=False)
    assert report.ok, report.render()


@pytest.mark.parametrize("name", manifests.names())
def test_no_alarm_about_what_is_published(name: str) -> None:
    """As tests/family asks of the configs that are written out there."""
    config = manifests.load(name).config
    arch = Architecture.from_config(config)
    named = {**config, "architectures": list(CLASSES[arch.model_type])}
    assert list(config_problems(named, arch, Path("config.json"))) == []
    assert list(rope_notes(named)) == []


def test_a_class_of_the_folders_own_code(fp8: Path) -> None:
    own = {"AutoModelForCausalLM": "modeling_ours.OursForCausalLM"}
    edit(fp8 / "config.json", lambda c: c.update(architectures=["OursForCausalLM"], auto_map=own))
    (fp8 / "modeling_ours.py").write_text("class OursForCausalLM: ...")
    assert wk.verify(fp8, progress=False).ok


def test_a_config_from_elsewhere_is_not_blamed(fp8: Path) -> None:
    """One that is given for weights without one need say no more than what the weights are."""
    config = V3.config()
    del config["architectures"]
    (fp8 / "config.json").unlink()
    assert wk.verify(fp8, config=config, progress=False).ok


def test_generation_config(fp8: Path) -> None:
    (fp8 / "generation_config.json").write_text('{"eos_token_id": [1, 64]}')
    problem = only(fp8)
    assert (problem.where, problem.found) == (str(fp8 / "generation_config.json"), "64")


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json"])
def test_a_tokenizers_files_must_parse(name: str, fp8: Path) -> None:
    (fp8 / name).write_text("{")
    assert only(fp8).where == str(fp8 / name)


def test_a_file_beside_the_single_one(tmp_path: Path) -> None:
    """Without an index, loaders read every safetensors file of the folder."""
    contents = write_tiny(tmp_path / "fp8")
    folder = tmp_path / "single"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", contents)
    (folder / "config.json").write_text(json.dumps(V3.config()))
    assert wk.verify(folder, progress=False).ok
    write_safetensors(folder / "other.safetensors", {"lm_head.weight": contents["lm_head.weight"]})
    assert only(folder).where == str(folder / "other.safetensors")


@pytest.mark.parametrize(("key", "value"), [("n_layers", 2), ("n_routed_experts", 16), ("dtype", "bf16")])
def test_the_demos_arguments(key: str, value: object, ranks: Path) -> None:
    path = ranks / "demo_config.json"
    before = path.read_text()
    try:
        edit(path, lambda c: c.update({key: value, "max_seq_len": 77}))  # the last is free
        problem = only(ranks)
        assert (problem.where, problem.found) == (str(path), f"{key} {value}")
    finally:
        path.write_text(before)
    assert wk.verify(ranks, progress=False).ok
