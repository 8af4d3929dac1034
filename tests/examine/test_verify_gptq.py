"""``verify`` and ``inspect`` of GPTQ checkpoints: each defect is put in by hand, and exactly that one is reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import INDEX, Contents, read_safetensors
from tiny import V3, V3_INT4, Gptq, Tiny, write_safetensors, write_tiny

import weightkit as wk
from weightkit.errors import ConfigError, MissingTensorError, ScaleError, TensorError, ValuesError, WeightkitError
from weightkit.examine import Report, stream

EXPERT = "model.layers.1.mlp.experts.1.up_proj"
DOWN = "model.layers.2.mlp.shared_experts.down_proj"
SIDE = "quantize_config.json"
VARIANTS = {
    "int4": V3_INT4,
    "a short last group": replace(V3_INT4, gptq=Gptq(group_size=32)),
    "one group": replace(V3_INT4, gptq=Gptq(group_size=-1)),
    "v2": replace(V3_INT4, gptq=Gptq(checkpoint_format="gptq_v2")),
    "asymmetric": replace(V3_INT4, gptq=Gptq(sym=False)),
    "activation order": replace(V3_INT4, gptq=Gptq(act_order=True)),
    "int8": replace(V3_INT4, gptq=Gptq(bits=8, checkpoint_format="gptq_v2")),
    "all layers": replace(V3_INT4, gptq=Gptq(everything=True), mtp_layers=0),
}


def check(folder: Path, **options: Any) -> Report:
    return wk.verify(folder, progress=False, **options)


def only(report: Report) -> WeightkitError:
    assert len(report.problems) == 1, report.render()
    return report.problems[0]


@pytest.fixture
def int4(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "int4", V3_INT4)
    return tmp_path / "int4"


def edit(folder: Path, change: Callable[[Contents], object]) -> Path:
    """Change each file's tensors, with the index that follows."""
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_safetensors(path)
        change(tensors)
        write_safetensors(path, tensors)
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(len(data) for _, _, data in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


def swap(folder: Path, name: str, change: Callable[[np.ndarray], object], dtype: str = "<i4") -> Path:
    """Change some elements of a tensor."""

    def changed(tensors: Contents) -> None:
        if name in tensors:
            stored, shape, data = tensors[name]
            values = np.frombuffer(data, dtype).reshape(shape).copy()
            change(values)
            tensors[name] = (stored, shape, values.tobytes())

    return edit(folder, changed)


def remove(folder: Path, *names: str) -> Path:
    return edit(folder, lambda tensors: [tensors.pop(name, None) for name in names])


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def declare(folder: Path, **fields: object) -> None:
    """Change the dictionary in both places."""
    quantization = {**json.loads((folder / SIDE).read_text()), **fields}
    (folder / SIDE).write_text(json.dumps(quantization))
    edit_json(folder / "config.json", quantization_config=quantization)


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole(variant: str, tmp_path: Path) -> None:
    contents = write_tiny(tmp_path, VARIANTS[variant])
    report = check(tmp_path, values=True)
    assert report.ok, report.render()
    assert report.tensors == len(contents)
    text = report.render()
    assert "group numbers and zero points" in text
    assert not [note for note in report.notes if SIDE in note]


# Names, dtypes, shapes


@pytest.mark.parametrize("leaf", ["qzeros", "scales", "g_idx"])
def test_a_part_is_missing(leaf: str, int4: Path) -> None:
    problem = only(check(remove(int4, f"{EXPERT}.{leaf}")))
    assert isinstance(problem, ScaleError)
    assert problem.what == f"a GPTQ weight without its {leaf}"
    assert (problem.where or "").endswith(f": {EXPERT}.qweight") or problem.where == f"{EXPERT}.qweight"
    assert problem.expected == f"{EXPERT}.{leaf}"


def test_codes_are_missing(int4: Path) -> None:
    problem = only(check(remove(int4, f"{EXPERT}.qweight")))
    assert isinstance(problem, MissingTensorError)
    assert problem.where == f"{EXPERT}.qweight"
    assert problem.expected == "I32 [18, 128]"


@pytest.mark.parametrize(
    ("leaf", "dtype", "shape", "what"),
    [
        ("qweight", "F32", (18, 128), "wrong dtype"),
        ("qweight", "I32", (9, 256), "wrong shape"),
        ("qzeros", "I32", (16, 9), "the shape of qzeros does not fit its qweight"),
        ("scales", "BF16", (9, 128), "wrong dtype"),
        ("scales", "F16", (128, 9), "the shape of scales does not fit its qweight"),
        ("g_idx", "I32", (144, 1), "the shape of g_idx does not fit its qweight"),
        ("g_idx", "F32", (144,), "wrong dtype"),
    ],
)
def test_a_part_of_another_form(leaf: str, dtype: str, shape: tuple[int, ...], what: str, int4: Path) -> None:
    name = f"{EXPERT}.{leaf}"

    def change(tensors: Contents) -> None:
        if name in tensors:
            tensors[name] = (dtype, shape, tensors[name][2])

    problem = only(check(edit(int4, change)))
    assert isinstance(problem, TensorError if leaf == "qweight" else ScaleError)
    assert problem.what == what
    assert (problem.where or "").endswith(f": {name}")


def bf16(tensors: Contents, module: str, shape: tuple[int, int]) -> None:
    tensors[f"{module}.weight"] = ("BF16", shape, bytes(2 * prod(shape)))


def test_a_weight_that_is_not_quantized_and_should_be(int4: Path) -> None:
    def change(tensors: Contents) -> None:
        if f"{EXPERT}.qweight" in tensors:
            bf16(tensors, EXPERT, (128, 144))
        for leaf in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"{EXPERT}.{leaf}", None)

    problem = only(check(edit(int4, change)))
    assert problem.what == "not quantized, and no rule of quantization_config excepts it"
    assert problem.expected == f"{EXPERT}.qweight"


def test_a_weight_that_is_quantized_and_should_not_be(int4: Path) -> None:
    rules = {**Gptq().config(V3_INT4)["dynamic"], f"-:{EXPERT}": {}}  # type: ignore[dict-item]
    declare(int4, dynamic=rules)
    problem = only(check(int4))
    assert isinstance(problem, TensorError)
    assert problem.what == "quantized, although quantization_config excepts it"
    assert problem.expected == f"{EXPERT}.weight"


def test_fp8_that_was_left(int4: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"

    def change(tensors: Contents) -> None:
        if name in tensors:
            tensors[name] = ("F8_E4M3", (144, 512), bytes(144 * 512))
            tensors[f"{name}_scale_inv"] = ("F32", (2, 4), bytes(32))

    problem = only(check(edit(int4, change)))
    assert problem.what.startswith("FP8 beside GPTQ: engines take every tensor that is not F16, BF16 or F32")
    assert (problem.where or "").endswith(name)
    assert "2 tensors" in (problem.found or "")


# Declarations


def test_declared_and_not_there(tmp_path: Path) -> None:
    write_tiny(tmp_path, replace(V3, fp8=False))
    edit_json(tmp_path / "config.json", quantization_config=Gptq().config(V3_INT4))
    problem = only(check(tmp_path))
    assert isinstance(problem, ConfigError)
    assert problem.what == "quantization_config declares GPTQ weights, and none is"
    assert problem.found == "54 in BF16"


def test_declared_and_fp8_there(tmp_path: Path) -> None:
    write_tiny(tmp_path, V3)
    edit_json(tmp_path / "config.json", quantization_config=Gptq().config(V3_INT4))
    assert only(check(tmp_path)).what == "quantization_config declares GPTQ weights, and none is"


@pytest.mark.parametrize("quantization", [None, V3.config()["quantization_config"]], ids=["none", "fp8"])
@pytest.mark.parametrize("side", [True, False])
def test_there_and_not_declared(side: bool, quantization: object, int4: Path) -> None:
    edit_json(int4 / "config.json", quantization_config=quantization)
    if not side:
        (int4 / SIDE).unlink()
    report = check(int4)
    assert only(report).what == "no GPTQ in quantization_config, and weights are GPTQ"
    tensors = next(item for item in report.checks if item.name == "tensors")
    assert tensors.done is side  # the side file says what to expect


def test_parts_against_each_other_where_nothing_says_what_to_expect(int4: Path) -> None:
    edit_json(int4 / "config.json", quantization_config=None)
    (int4 / SIDE).unlink()
    remove(int4, f"{EXPERT}.scales", f"{DOWN}.qweight")
    found = sorted(problem.what for problem in check(int4).problems)
    assert found == [
        "a GPTQ weight without its scales",
        "no GPTQ in quantization_config, and weights are GPTQ",
        "the g_idx of no GPTQ weight",
        "the qzeros of no GPTQ weight",
        "the scales of no GPTQ weight",
    ]


@pytest.mark.parametrize(
    ("change", "expected", "found"),
    [
        ({"group_size": 32}, "group_size 16", "group_size 32"),
        ({"sym": False, "bits": 8}, "bits 4, sym True", "bits 8, sym False"),
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format gptq", "checkpoint_format gptq_v2"),
    ],
)
def test_both_dictionaries_must_agree(change: dict[str, object], expected: str, found: str, int4: Path) -> None:
    edit_json(int4 / SIDE, **change)
    problem = only(check(int4))
    assert isinstance(problem, ConfigError)
    assert (problem.where, problem.expected, problem.found) == (str(int4 / SIDE), expected, found)


def test_what_does_not_matter_may_differ(int4: Path) -> None:
    edit_json(int4 / SIDE, meta={"damp_percent": 0.1}, model_name_or_path="somewhere")
    assert check(int4).ok


@pytest.mark.parametrize("text", ["{", '{"bits": 4}', '{"bits": 3, "group_size": 1, "sym": true, "desc_act": true}'])
def test_a_damaged_side_file(text: str, int4: Path) -> None:
    (int4 / SIDE).write_text(text)
    only(check(int4))


def test_a_side_file_that_was_left(tmp_path: Path) -> None:
    write_tiny(tmp_path, V3)
    (tmp_path / SIDE).write_text(json.dumps(Gptq().config(V3_INT4)))
    report = check(tmp_path)
    assert report.ok
    assert any(SIDE in note for note in report.notes)


@pytest.mark.parametrize("fields", [{"bits": 3}, {"dynamic": {"-:(a+)+(?=b)": {}}}, {"group_size": "128"}])
def test_a_variant_that_is_not_read(fields: dict[str, object], int4: Path) -> None:
    declare(int4, **fields)
    report = check(int4)
    assert any(isinstance(problem, ConfigError) for problem in report.problems)
    assert len(report.problems) <= 2  # in config.json and in the side file


# Values


@pytest.mark.parametrize(("value", "word"), [(np.nan, "1 NaN"), (np.inf, "1 Inf"), (0, "1 zero"), (-0.5, "1 zero or")])
def test_scales(value: float, word: str, int4: Path) -> None:
    def change(values: np.ndarray) -> None:
        values[3, 5] = value

    problem = only(check(swap(int4, f"{EXPERT}.scales", change, "<f2"), values=True))
    assert isinstance(problem, ValuesError)
    assert problem.what == "scales that are not positive and finite"
    assert (problem.where or "").endswith(f": {EXPERT}.scales")
    assert word in (problem.found or "")
    assert "the first at [3, 5]" in (problem.found or "")
    assert check(int4).ok  # only --values looks


@pytest.mark.parametrize(("value", "found"), [(1, "1 at [40]"), (9, "9 at [40]"), (-1, "-1 at [40]")])
def test_group_numbers(value: int, found: str, int4: Path) -> None:
    problem = only(check(swap(int4, f"{EXPERT}.g_idx", lambda values: values.put([40, 50], value)), values=True))
    assert isinstance(problem, ValuesError)
    assert (problem.where or "").endswith(f": {EXPERT}.g_idx")
    assert problem.what == "g_idx is not the input feature's number divided by group_size 16, where desc_act is false"
    assert problem.expected == "2"
    assert problem.found == f"{found}, the first of 2 of I32 [144]"


@pytest.mark.parametrize(("value", "ok"), [(8, True), (9, False), (-1, False), (2**31 - 1, False)])
def test_group_numbers_in_activation_order(value: int, ok: bool, tmp_path: Path) -> None:
    write_tiny(tmp_path, VARIANTS["activation order"])
    report = check(swap(tmp_path, f"{EXPERT}.g_idx", lambda values: values.put(7, value)), values=True)
    assert report.ok is ok
    if not ok:
        problem = only(report)
        assert problem.what == "g_idx names a group that there is not; there are 9"
        assert (problem.expected, problem.found) == ("0 to 8", f"{value} at [7], the first of 1 of I32 [144]")


def test_one_group_is_number_0(tmp_path: Path) -> None:
    write_tiny(tmp_path, VARIANTS["one group"])
    problem = only(check(swap(tmp_path, f"{DOWN}.g_idx", lambda values: values.put(7, 1)), values=True))
    assert "is not 0 everywhere" in problem.what


@pytest.mark.parametrize(
    ("variant", "wanted"), [("int4", "0x77777777"), ("v2", "0x88888888"), ("int8", "0x80808080"), ("asymmetric", None)]
)
def test_zero_points(variant: str, wanted: str | None, tmp_path: Path) -> None:
    write_tiny(tmp_path, VARIANTS[variant])

    def change(values: np.ndarray) -> None:
        values[2, 4] = np.array(0x9777_7777, "<u4").view("<i4")

    report = check(swap(tmp_path, f"{EXPERT}.qzeros", change), values=True)
    assert report.ok is (wanted is None)
    if wanted is not None:
        problem = only(report)
        assert problem.what == "zero points that are not all the middle, where sym is true"
        assert (problem.where or "").endswith(f": {EXPERT}.qzeros")
        assert problem.expected == wanted
        assert (problem.found or "").startswith("0x97777777 at [2, 4], the first of 1 of")


def test_defects_across_chunks(int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is read in pieces, whose borders change nothing."""
    swap(int4, f"{DOWN}.g_idx", lambda values: values.put([100, 500], 9))
    whole = only(check(int4, values=True))
    for size in (52, 1000):
        monkeypatch.setattr(stream, "CHUNK_BYTES", size)
        assert str(only(check(int4, values=True))) == str(whole)
        monkeypatch.undo()


@pytest.mark.parametrize("rank", [0, 3])
def test_ranks_are_numbered_as_the_whole(rank: int, int4: Path, tmp_path: Path) -> None:
    ranks = tmp_path / "ranks"
    wk.write(wk.shard(wk.open_checkpoint(int4), mp=4), ranks, progress=False)
    assert check(ranks, values=True).ok
    path, name = ranks / f"model{rank}-mp4.safetensors", "layers.2.ffn.shared_experts.w2.g_idx"
    tensors = read_safetensors(path)
    tensors[name] = ("I32", (128,), (np.arange(128) // 16 + 1).astype("<i4").tobytes())  # numbered from another start
    write_safetensors(path, tensors)
    (ranks / "weightkit.lock.json").unlink()
    problem = only(check(ranks, values=True))
    assert (problem.where or "") == f"{path.name}: {name}"
    assert problem.expected == str(8 * rank)


# inspect


@pytest.mark.parametrize("variant", VARIANTS)
def test_inspect_counts_weights(variant: str, tmp_path: Path) -> None:
    model: Tiny = VARIANTS[variant]
    contents = write_tiny(tmp_path / "int4", model)
    write_tiny(tmp_path / "bf16", replace(model, gptq=None))
    found, plain = wk.inspect(tmp_path / "int4"), wk.inspect(tmp_path / "bf16")
    assert [(part.name, part.parameters) for part in found.components] == [
        (part.name, part.parameters) for part in plain.components
    ]
    assert (found.parameters, found.main_parameters) == (plain.parameters, plain.main_parameters)
    assert found.activated_parameters == plain.activated_parameters
    assert (found.tensors, found.size_bytes) == (len(contents), sum(len(data) for _, _, data in contents.values()))
    assert {total.dtype for total in found.dtypes} == {"I32", "F16", "BF16", "F32"}


def test_inspect_says_what_is_quantized(int4: Path, tmp_path: Path) -> None:
    found = wk.inspect(int4)
    assert found.legal_mp == {"int4": (1, 2, 4, 8), "bf16": (1, 2, 4, 8)}
    assert found.quantization == {
        "method": "gptq",
        "bits": 4,
        "group_size": 16,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    assert "quantized     int4 GPTQ, groups of 16, symmetric\n" in found.render()
    assert json.loads(json.dumps(found.to_json()))["quantization"]["bits"] == 4
    write_tiny(tmp_path / "v2", VARIANTS["activation order"])
    assert "int4 GPTQ, groups of 16, symmetric, activation order" in wk.inspect(tmp_path / "v2").render()


def test_inspect_of_a_stale_declaration(tmp_path: Path) -> None:
    write_tiny(tmp_path, replace(V3, fp8=False))
    edit_json(tmp_path / "config.json", quantization_config=Gptq().config(V3_INT4))
    found = wk.inspect(tmp_path)
    assert found.quantization == {}
    assert "other" not in {part.name for part in found.components}
