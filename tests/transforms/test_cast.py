"""Casts: bits equal an independent computation, and the config declares what the tensors are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import plain_reference
import pytest
from folders import Contents, read_config, read_published, read_safetensors
from tiny import KIMI, MOONLIGHT, V2_LITE, V3, V31, Tiny, write_safetensors, write_tiny

import weightkit as wk
from weightkit.errors import PlanError, Problems, ScaleError, UnsupportedError, WeightkitError

TORCH_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def cast(source: Path, target: Path, to: str) -> Path:
    wk.write(wk.cast(wk.open_checkpoint(source), to), target, device="cpu", progress=False)
    return target


def expected(contents: Contents, to: str) -> Contents:
    """By hand: FP8 times its scale, BF16 widened and rounded, F32 as it is."""
    dtype, found = to.upper(), {}
    for name, (stored, shape, data) in contents.items():
        if stored == "F8_E4M3":
            scale_shape, scale = contents[f"{name}_scale_inv"][1:]
            codes = np.frombuffer(data, np.uint8).reshape(shape)
            scales = np.frombuffer(scale, np.float32).reshape(scale_shape)
            found[name] = (dtype, shape, plain_reference.dequantized(codes, scales, dtype))
        elif stored == "BF16":
            found[name] = (dtype, shape, plain_reference.round_to(plain_reference.widen(data, "BF16"), dtype).tobytes())
        elif not name.endswith("_scale_inv"):
            found[name] = (stored, shape, data)
    return found


@pytest.mark.parametrize("to", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("model", [V3, V31, KIMI, V2_LITE], ids=["V3", "V3.1", "Kimi-K2", "V2-Lite"])
def test_bits(model: Tiny, to: str, tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "v3", model)
    result = cast(tmp_path / "v3", tmp_path / "cast", to)
    found = read_published(result)
    for name, tensor in expected(contents, to).items():
        assert found.pop(name) == tensor, name
    assert not found
    config = {key: value for key, value in model.config().items() if key != "quantization_config"}
    assert read_config(result) == config | {"torch_dtype": TORCH_DTYPES[to]}


def write_every_code(tmp_path: Path, to: str) -> tuple[Path, Contents]:
    """A checkpoint whose FP8 weights hold all 256 codes, under scales from subnormal to overflow, or, for F16, which
    refuses what overflows, to its largest number."""
    write_tiny(tmp_path / "codes", replace(V3, hidden=272, moe=200, v=50))
    rng = np.random.default_rng(3)
    special = np.array([0, -0.0, 1, 1e-45, 1e-38, 3e38, -1.5, np.inf, np.nan, 2.0**-9, 2.0**120, 0.7], np.float32)
    if to == "f16":
        special = np.where(np.abs(special) > 65504 / 448, np.float32(65504 / 448), special)
    contents: Contents = {}
    for path in sorted((tmp_path / "codes").glob("*.safetensors")):
        tensors = read_safetensors(path)
        for name, (dtype, shape, data) in tensors.items():
            if dtype == "F8_E4M3":
                codes = np.resize(np.arange(256, dtype=np.uint8), shape)
                tensors[name] = (dtype, shape, rng.permuted(codes, axis=0).tobytes())
            elif name.endswith("_scale_inv"):
                tensors[name] = (dtype, shape, rng.choice(special, len(data) // 4).tobytes())
        write_safetensors(path, tensors)
        contents |= tensors
    return tmp_path / "codes", contents


@pytest.mark.parametrize("to", ["bf16", "f16", "f32"])
def test_every_code_under_every_scale(to: str, tmp_path: Path) -> None:
    folder, contents = write_every_code(tmp_path, to)
    found = read_published(cast(folder, tmp_path / "cast", to))
    for name, tensor in expected(contents, to).items():
        assert found[name] == tensor, name


def test_bf16_values_are_not_touched_by_a_cast_to_bf16(tmp_path: Path) -> None:
    """NaN payloads, subnormals and signed zeros too: such a tensor is copied."""
    contents = write_tiny(tmp_path / "v2", replace(V2_LITE, layers=1), shards=1)
    (path,) = (tmp_path / "v2").glob("*.safetensors")
    tensors = read_safetensors(path)
    name = "model.embed_tokens.weight"
    bits = np.resize(np.arange(65536, dtype=np.uint16), 64 * 144).tobytes()
    tensors[name] = ("BF16", (64, 144), bits)
    write_safetensors(path, tensors)
    assert read_published(cast(tmp_path / "v2", tmp_path / "cast", "bf16")) == contents | {name: tensors[name]}


def test_the_router_bias_stays_f32(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "v3")
    for to in ("bf16", "f16"):
        found = read_published(cast(tmp_path / "v3", tmp_path / to, to))
        biases = [name for name in contents if name.endswith("e_score_correction_bias")]
        assert len(biases) == 3
        assert all(found[name] == contents[name] for name in biases)


@pytest.mark.parametrize("model", [V3, KIMI, MOONLIGHT, V2_LITE], ids=["V3", "Kimi-K2", "Moonlight", "V2-Lite"])
def test_there_and_back(model: Tiny, tmp_path: Path) -> None:
    """F32 holds every product, so that rounding it later is rounding once; what is published in F32 stays F32."""
    write_tiny(tmp_path / "v3", model)
    bf16 = cast(tmp_path / "v3", tmp_path / "bf16", "bf16")
    f32 = cast(tmp_path / "v3", tmp_path / "f32", "f32")
    for source in (bf16, f32):
        again = cast(source, tmp_path / f"{source.name}-again", "bf16")
        assert read_published(again) == read_published(bf16)
        assert read_config(again) == read_config(bf16)
    assert read_published(f32)["lm_head.weight"][0] == "F32"
    biases = [name for name in read_published(bf16) if name.endswith(("e_score_correction_bias", "inv_freq"))]
    assert len(biases) > 0 or not model.sigmoid
    assert all(read_published(bf16)[name][0] == "F32" for name in biases)


def test_both_spellings_of_the_dtype_are_kept(tmp_path: Path) -> None:
    for field in ("torch_dtype", "dtype"):
        config = {key: value for key, value in V3.config().items() if key != "torch_dtype"} | {field: "bfloat16"}
        write_tiny(tmp_path / field)
        (tmp_path / field / "config.json").write_text(json.dumps(config))
        result = read_config(cast(tmp_path / field, tmp_path / f"{field}-f16", "f16"))
        assert result[field] == "float16"
        assert ("dtype" in result) + ("torch_dtype" in result) == 1


def test_stripped_and_cast_in_one_go_is_both_in_turn(tmp_path: Path) -> None:
    write_tiny(tmp_path / "v3")
    once = wk.cast(wk.strip_mtp(wk.open_checkpoint(tmp_path / "v3")), "bf16")
    wk.write(once, tmp_path / "once", device="cpu", progress=False)
    wk.write(wk.strip_mtp(wk.open_checkpoint(tmp_path / "v3")), tmp_path / "stripped", progress=False)
    twice = cast(tmp_path / "stripped", tmp_path / "twice", "bf16")
    assert read_published(tmp_path / "once") == read_published(twice)
    assert read_config(tmp_path / "once") == read_config(twice)


# What is refused


def edited(folder: Path, change: Callable[[Contents], object]) -> None:
    """Change the tensors of each shard, and write the index that follows."""
    weight_map: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_safetensors(path)
        change(tensors)
        write_safetensors(path, tensors)
        weight_map |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(folder: Path, to: str = "bf16") -> WeightkitError:
    checkpoint = wk.open_checkpoint(folder)
    with pytest.raises(WeightkitError) as caught:
        wk.cast(checkpoint, to)
    return caught.value


NAME = "model.layers.1.mlp.experts.1.up_proj.weight"


def test_an_unknown_dtype(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    with pytest.raises(PlanError, match="--to: unknown dtype: expected bf16, f16, f32, found 'fp4'"):
        wk.cast(wk.open_checkpoint(tmp_path), "fp4")


def test_a_weight_without_scale(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    edited(tmp_path, lambda tensors: tensors.pop(f"{NAME}_scale_inv", None))
    error = refusal(tmp_path)
    assert isinstance(error, ScaleError)
    assert str(error).startswith(f"{NAME}: an FP8 weight without its scale")


def test_a_scale_without_weight(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    edited(tmp_path, lambda tensors: tensors.pop(NAME, None))
    error = refusal(tmp_path)
    assert isinstance(error, ScaleError)
    assert str(error).startswith(f"{NAME}_scale_inv: a scale without an FP8 weight")


def test_scales_that_do_not_fit_are_told_all_at_once(tmp_path: Path) -> None:
    write_tiny(tmp_path)

    def change(tensors: Contents) -> None:
        for name, (_, shape, data) in list(tensors.items()):
            if name.endswith("q_a_proj.weight_scale_inv"):
                tensors[name] = ("F32", (shape[0], 1), data[: shape[0] * 4])
            if name.endswith("o_proj.weight_scale_inv"):
                tensors[name] = ("BF16", (shape[0] * 2, shape[1]), data)

    edited(tmp_path, change)
    error = refusal(tmp_path)
    assert isinstance(error, Problems)
    assert len(error.problems) == 8
    assert all(isinstance(problem, ScaleError) for problem in error.problems)


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E8M0", "F8_E5M2", "I32", "F4"])
def test_dtypes_that_no_cast_is_defined_for(dtype: str, tmp_path: Path) -> None:
    write_tiny(tmp_path)

    def change(tensors: Contents) -> None:
        if NAME in tensors:
            count = len(tensors[NAME][2])
            shape = {"I32": (count // 4,), "F4": (count * 2,)}.get(dtype, (count,))
            tensors[NAME] = (dtype, shape, tensors[NAME][2])
        tensors.pop(f"{NAME}_scale_inv", None)

    edited(tmp_path, change)
    error = refusal(tmp_path)
    assert isinstance(error, UnsupportedError)
    assert error.where == NAME
    assert error.found == dtype


@pytest.mark.parametrize("method", ["awq", "compressed-tensors", "mxfp4"])
def test_another_quantization(method: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, replace(V3, fp8=False, extra_config={"quantization_config": {"quant_method": method}}))
    error = refusal(tmp_path)
    assert isinstance(error, UnsupportedError)
    assert error.found == method
