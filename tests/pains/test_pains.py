"""What users of such tools suffer from elsewhere, one test a row of that list, by its number: none of it here.

Rows about generating and launching are tested in those rooms; what is tested more closely elsewhere is
shown here in the form in which a user would meet it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plain_reference
import pytest
import torch
from folders import Contents, metadata, read_config, read_published, read_safetensors, tree, without
from safetensors.torch import load_file
from sparse import write_sparse
from tiny import MOONLIGHT, V2_LITE, V3, V3_INT4, Gptq, write_safetensors, write_tiny

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.errors import (
    FormatError,
    IndexFileError,
    MissingFileError,
    PlanError,
    QuantizationError,
    ScaleError,
    SpaceError,
    UnsupportedError,
    WeightkitError,
)
from weightkit.family import Architecture, legal_mp, legal_tp, tp_problems
from weightkit.layouts import FileSet, lay_out_published
from weightkit.quantization import QuantizationReport, Settings, quantize
from weightkit.quantization.solver import Solver
from weightkit.writer import make_plan, target
from weightkit.writer.executor import execute, peak_memory_bytes

EXPERT = "model.layers.1.mlp.experts.1.up_proj.weight"
Result = Checkpoint | FileSet

#: Every way from a checkpoint to files.
WAYS: dict[str, Callable[[Checkpoint], Result]] = {
    "copy": lambda checkpoint: checkpoint,
    "strip": wk.strip_mtp,
    "cast": lambda checkpoint: wk.cast(checkpoint, "bf16"),
    "shard --mp": lambda checkpoint: wk.shard(checkpoint, mp=2),
    "shard --ep": lambda checkpoint: wk.shard(checkpoint, ep=3),
    "experts": lambda checkpoint: wk.keep_experts(checkpoint, 4),
}
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def v3(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "v3")
    return tmp_path / "v3"


def write(what: Result, folder: Path) -> Path:
    wk.write(what, folder, device="cpu", progress=False)
    return folder


def edit(folder: Path, change: Callable[[Contents], object]) -> None:
    """Change every shard's tensors, and write the index that follows."""
    weight_map: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_safetensors(path)
        change(tensors)
        write_safetensors(path, tensors)
        weight_map |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_pain_01_machines_without_an_fp8_type(v3: Path, tmp_path: Path) -> None:
    """A torch that has no FP8 at all casts with the same bits."""
    code = (
        "import sys, torch\n"
        "for name in [name for name in dir(torch) if name.startswith('float8')]:\n"
        "    delattr(torch, name)\n"
        "import weightkit as wk\n"
        "checkpoint = wk.cast(wk.open_checkpoint(sys.argv[1]), 'bf16')\n"
        "wk.write(checkpoint, sys.argv[2], device='cpu', progress=False)\n"
    )
    subprocess.run([sys.executable, "-c", code, v3, tmp_path / "bf16"], check=True)
    contents = read_published(v3)
    codes = np.frombuffer(contents[EXPERT][2], np.uint8).reshape(contents[EXPERT][1])
    scale_shape, scale = contents[f"{EXPERT}_scale_inv"][1:]
    scales = np.frombuffer(scale, np.float32).reshape(scale_shape)
    assert read_published(tmp_path / "bf16")[EXPERT][2] == plain_reference.dequantized(codes, scales, "BF16")


def test_pain_01_devices_without_an_fp8_type() -> None:
    """No Triton FP8 type is named in the kernel or reaches it: what it is launched with are bytes."""
    source = (Path(wk.__file__).parent / "kernels/fp8_dequant.py").read_text()
    assert "tl.float8" not in source
    assert "tl.float32" in source
    code = (
        "import torch\n"
        "from triton.runtime.interpreter import GridExecutor\n"
        "from weightkit.kernels.fp8_dequant import dequant\n"
        "launch = GridExecutor.__call__\n"
        "def launching(self, *arguments, **options):\n"
        "    found = [a.dtype for a in [*arguments, *options.values()] if isinstance(a, torch.Tensor)]\n"
        "    assert torch.uint8 in found and torch.float8_e4m3fn not in found, found\n"
        "    launch(self, *arguments, **options)\n"
        "GridExecutor.__call__ = launching\n"
        "codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128)\n"
        "for weight in (codes, codes.view(torch.float8_e4m3fn)):\n"
        "    made = dequant(weight, torch.full((1, 1), 0.3), torch.bfloat16)\n"
        "    print(made.view(torch.uint8).numpy().tobytes().hex())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    every_code = np.arange(256, dtype=np.uint8).reshape(2, 128)
    expected = plain_reference.dequantized(every_code, np.full((1, 1), 0.3, np.float32), "BF16").hex()
    assert done.stdout.split() == [expected, expected]


def test_pain_02_memory_is_bounded_stated_and_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the checkpoint, the same peak; and a machine that has less is told before it starts."""
    peaks = []
    for layers in (2, 20):
        model = replace(V3, layers=layers, mtp_layers=0, hidden=1024, moe=1024)
        write_sparse(tmp_path / str(layers), model.config(), model.tensors(), shards=8)
        plan = make_plan(lay_out_published(wk.cast(wk.open_checkpoint(tmp_path / str(layers)), "bf16")), tmp_path / "o")
        peaks.append(peak_memory_bytes(plan, 4))
    assert peaks[0] == peaks[1] < 300 << 20
    monkeypatch.setattr(target, "available_memory_bytes", lambda: peaks[1] - 1)
    with pytest.raises(SpaceError, match="not enough memory"):
        execute(plan, jobs=4, progress=False)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "renamed"])
@every_way
def test_pain_03_missing_and_truncated_shards_do_not_load(damage: str, way: str, v3: Path) -> None:
    path = sorted(v3.glob("*.safetensors"))[1]
    size = path.stat().st_size
    if damage == "missing":
        path.unlink()
    elif damage == "renamed":
        path.rename(path.with_name("model-00002-of-000004.safetensors"))
    else:
        os.truncate(path, size + (1 if damage == "longer" else -1))
    with pytest.raises((MissingFileError, FormatError), match=path.name):
        WAYS[way](wk.open_checkpoint(v3))


def test_pain_04_mtp_layers_go_as_a_whole(v3: Path, tmp_path: Path) -> None:
    """Tensors, config, index, total size: one transform, and ranks leave them out likewise."""
    contents = without(read_published(v3), "layers.3.")
    stripped = write(wk.strip_mtp(wk.open_checkpoint(v3)), tmp_path / "stripped")
    assert read_published(stripped) == contents
    assert read_config(stripped)["num_nextn_predict_layers"] == 0
    ranks = write(wk.shard(wk.open_checkpoint(v3), mp=2), tmp_path / "mp2")
    assert read_config(ranks)["num_nextn_predict_layers"] == 0
    assert not any("layers.3." in name for name in read_safetensors(ranks / "model0-mp2.safetensors"))


def test_pain_05_scale_blocks_are_never_split(v3: Path) -> None:
    """8 ranks would cut 4 blocks of scales: told before a byte is read, with the legal degrees and the way out."""
    for path in v3.glob("*.safetensors"):
        path.chmod(0o400)
    with pytest.raises(PlanError, match="4 scale blocks cannot be split over 8 ranks") as caught:
        wk.shard(wk.open_checkpoint(v3), mp=8)
    assert "Legal --mp for this FP8 checkpoint: 1, 2, 4. Use one of them, or add --to bf16." in str(caught.value)
    wk.shard(wk.cast(wk.open_checkpoint(v3), "bf16"), mp=8)


def test_pain_05_widths_that_are_no_multiple_of_a_block(tmp_path: Path) -> None:
    """As V2-Lite's 10944 in FP8 would: 2.5 blocks belong to no two ranks, in BF16 to any."""
    write_tiny(tmp_path / "odd", replace(V3, intermediate=320))
    checkpoint = wk.open_checkpoint(tmp_path / "odd")
    assert legal_mp(Architecture.from_config(checkpoint.config), fp8=True) == (1,)
    with pytest.raises(PlanError, match="dimension 320, which ends within a scale block"):
        wk.shard(checkpoint, mp=2)
    wk.shard(wk.cast(checkpoint, "bf16"), mp=8)


def test_pain_06_the_config_declares_what_the_tensors_are(v3: Path, tmp_path: Path) -> None:
    bf16 = write(wk.cast(wk.open_checkpoint(v3), "bf16"), tmp_path / "bf16")
    assert "quantization_config" not in read_config(bf16)
    assert read_config(bf16)["torch_dtype"] == "bfloat16"
    assert read_config(write(wk.cast(wk.open_checkpoint(v3), "f16"), tmp_path / "f16"))["torch_dtype"] == "float16"


@pytest.mark.parametrize("way", ["copy", "strip", "cast", "shard --mp", "experts"])
def test_pain_06_a_config_that_another_tool_left_stale(way: str, tmp_path: Path) -> None:
    """BF16 weights under a config that says FP8: no output of ours says so again."""
    write_tiny(tmp_path / "bf16", replace(V3, fp8=False))
    (tmp_path / "bf16/config.json").write_text(json.dumps(V3.config()))
    result = write(WAYS[way](wk.open_checkpoint(tmp_path / "bf16")), tmp_path / "out")
    assert "quantization_config" not in read_config(result)
    if way == "shard --mp":
        assert json.loads((result / "demo_config.json").read_text())["dtype"] == "bf16"


def test_pain_07_weight_and_scale_in_different_shards(v3: Path, tmp_path: Path) -> None:
    places = wk.open_checkpoint(v3).placement
    assert places[EXPERT] != places[f"{EXPERT}_scale_inv"]
    contents = read_published(v3)
    codes = np.frombuffer(contents[EXPERT][2], np.uint8).reshape(contents[EXPERT][1])
    scale_shape, scale = contents[f"{EXPERT}_scale_inv"][1:]
    scales = np.frombuffer(scale, np.float32).reshape(scale_shape)
    found = read_published(write(wk.cast(wk.open_checkpoint(v3), "bf16"), tmp_path / "bf16"))
    assert found[EXPERT] == ("BF16", (128, 144), plain_reference.dequantized(codes, scales, "BF16"))
    ranks = write(wk.shard(wk.open_checkpoint(v3), mp=2), tmp_path / "mp2")
    rank = read_safetensors(ranks / "model0-mp2.safetensors")
    assert rank["layers.1.ffn.experts.1.w3.scale"] == contents[f"{EXPERT}_scale_inv"]


@pytest.mark.parametrize("way", ["cast", "shard --mp", "shard --ep", "experts"])
def test_pain_08_an_fp8_weight_without_scale_is_an_error(way: str, v3: Path) -> None:
    edit(v3, lambda tensors: tensors.pop(f"{EXPERT}_scale_inv", None))
    with pytest.raises(WeightkitError, match=EXPERT.replace(".", r"\.")):
        WAYS[way](wk.open_checkpoint(v3))
    with pytest.raises(ScaleError, match="an FP8 weight without its scale"):
        wk.cast(wk.open_checkpoint(v3), "bf16")


@pytest.mark.parametrize("dtype", ["I8", "U8"])
def test_pain_09_one_byte_is_not_fp8(dtype: str, v3: Path) -> None:
    """Packed FP4 and INT8 weights with scales beside them are no FP8, and are not passed through either."""

    def change(tensors: Contents) -> None:
        for name, (stored, shape, data) in tensors.items():
            if stored == "F8_E4M3":
                tensors[name] = (dtype, shape, data)

    edit(v3, change)
    with pytest.raises(WeightkitError, match=dtype) as caught:
        wk.cast(wk.open_checkpoint(v3), "bf16")
    assert "no cast is defined for this dtype" in str(caught.value)


def test_pain_09_an_unknown_dtype(v3: Path) -> None:
    edit(v3, lambda tensors: tensors.update({EXPERT: ("FP4", *tensors[EXPERT][1:])}) if EXPERT in tensors else None)
    with pytest.raises(FormatError, match=f"'{EXPERT}': unknown dtype"):
        wk.open_checkpoint(v3)


@every_way
def test_pain_10_metadata_and_total_size(way: str, v3: Path, tmp_path: Path) -> None:
    result = write(WAYS[way](wk.open_checkpoint(v3)), tmp_path / "out")
    files = list(result.glob("*.safetensors"))
    assert files
    for path in files:
        assert metadata(path) == {"format": "pt"}
        load_file(path)
    if "shard" not in way:
        read_published(result)  # holds total_size against the bytes


@every_way
def test_pain_11_what_belongs_to_the_checkpoint_travels(way: str, v3: Path, tmp_path: Path) -> None:
    auto_map = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
    }
    (v3 / "config.json").write_text(json.dumps(V3.config() | {"auto_map": auto_map}))
    sides = {
        "configuration_deepseek.py": "class DeepseekV3Config: ...\n",
        "modeling_deepseek.py": "class DeepseekV3Model: ...\n",
        "tokenizer.json": '{"模": "型"}',
        "tokenizer.model": "\x00",
        "chat_template.jinja": "{{ messages }}",
        "special_tokens_map.json": "{}",
        "LICENSE-MODEL": "text",
    }
    for name, text in sides.items():
        (v3 / name).write_text(text)
    result = write(WAYS[way](wk.open_checkpoint(v3)), tmp_path / "out")
    for name, text in {**sides, "generation_config.json": (v3 / "generation_config.json").read_text()}.items():
        assert (result / name).read_text() == text
    assert read_config(result)["auto_map"] == auto_map


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "deepseek_v4", None])
@pytest.mark.parametrize("way", ["strip", "cast", "shard --mp", "shard --ep", "experts"])
def test_pain_12_another_architecture_is_named(model_type: str | None, way: str, tmp_path: Path) -> None:
    """A distilled model in the folder of the large one."""
    tensors = {"model.layers.0.self_attn.q_proj.weight": ("BF16", (8, 8)), "lm_head.weight": ("BF16", (8, 8))}
    config = {"model_type": model_type, "architectures": ["Qwen2ForCausalLM"], "hidden_size": 8}
    write_sparse(tmp_path, config, tensors)
    with pytest.raises(UnsupportedError) as caught:
        WAYS[way](wk.open_checkpoint(tmp_path))
    assert f"found model_type {model_type!r}" in str(caught.value)
    assert "deepseek_v3 (V3, V3-0324, R1" in str(caught.value)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small products are slower on several threads, and far slower where these are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def to_int4(source: Path, folder: Path, tokens: np.ndarray, **options: Any) -> QuantizationReport:
    """Quantize with these token ids [samples, seq_len]."""
    np.save(folder.parent / "tokens.npy", tokens.astype(np.int32))
    options = {"samples": tokens.shape[0], "seq_len": tokens.shape[1], "device": "cpu", "progress": False, **options}
    report = quantize(source, folder, Settings(group_size=16), calibration=folder.parent / "tokens.npy", **options)
    assert report is not None
    return report


@pytest.mark.usefixtures("one_thread")
def test_pain_13_experts_without_calibration_tokens(v3: Path, tmp_path: Path) -> None:
    """One token has two of eight experts: the others are counted, rounded, and named, in the report and in words."""
    report = to_int4(v3, tmp_path / "int4", np.array([[7]]))
    starved = 0
    for layer in report.layers[1:]:
        assert sorted(layer.tokens_by_expert) == [0, 0, 0, 0, 0, 0, 1, 1]
        for expert, tokens in enumerate(layer.tokens_by_expert):
            matrices = [matrix for matrix in layer.matrices if matrix.expert == expert]
            assert [matrix.tokens for matrix in matrices] == [tokens] * 3
            assert {matrix.method for matrix in matrices} == {"gptq" if tokens else "rtn"}
            assert {matrix.note for matrix in matrices} == {None if tokens else "no calibration token reached it"}
            starved += not tokens
    assert starved == 12
    said = report.summary()
    assert "12 modules saw no calibration tokens: model.layers.1.mlp.experts." in said
    assert "36 matrices of 54 rounded to nearest instead of solved (no calibration token reached it)" in said
    page = (tmp_path / "int4/quantization_report.html").read_text()
    assert "no calibration token reached it" in page


@pytest.mark.usefixtures("one_thread")
def test_pain_14_no_scale_that_f16_cannot_hold(tmp_path: Path) -> None:
    """An int4 weight whose scale would be Inf in F16 is never written: it is refused, by its name."""
    model = replace(V3, fp8=False)
    write_tiny(tmp_path / "bf16", model)

    def enlarge(tensors: Contents) -> None:
        if EXPERT in tensors:
            dtype, shape, data = tensors[EXPERT]
            tensors[EXPERT] = (dtype, shape, b"\x00\x4b" + data[2:])  # 2^23 in BF16

    edit(tmp_path / "bf16", enlarge)
    with pytest.raises(QuantizationError, match=EXPERT.replace(".", r"\.")) as caught:
        to_int4(tmp_path / "bf16", tmp_path / "int4", np.array([[7, 8, 9, 10]]))
    assert "too large for scales in F16" in str(caught.value)
    assert not (tmp_path / "int4/model.safetensors.index.json").exists()


def test_pain_15_groups_are_never_split(tmp_path: Path) -> None:
    """512 columns are 8 groups of 64: 16 ranks would cut them. Told before a byte is read, with the way out."""
    write_tiny(tmp_path / "int4", replace(V3_INT4, experts=16, hidden=192, gptq=Gptq(group_size=64)))
    checkpoint = wk.open_checkpoint(tmp_path / "int4")
    for path in (tmp_path / "int4").glob("*.safetensors"):
        path.chmod(0o400)
    with pytest.raises(PlanError) as caught:
        wk.shard(checkpoint, mp=16)
    assert str(caught.value) == (
        "model.layers.1.mlp.shared_experts.down_proj.qweight: 8 groups of 64 columns cannot be split over 16 ranks.\n"
        "Legal --mp for this int4 checkpoint: 1, 2, 4, 8. Use one of them, or add --to bf16."
    )
    wk.shard(wk.cast(checkpoint, "bf16"), mp=16)


def test_pain_15_every_rank_has_whole_groups(tmp_path: Path) -> None:
    """A rank's scales are those of its columns, and merged they are the source's, byte for byte."""
    contents = without(write_tiny(tmp_path / "int4", V3_INT4), "layers.3.")
    ranks = write(wk.shard(wk.open_checkpoint(tmp_path / "int4"), mp=4), tmp_path / "mp4")
    shared, ours = "model.layers.1.mlp.shared_experts.down_proj", "layers.1.ffn.shared_experts.w2"
    scales = np.frombuffer(contents[f"{shared}.scales"][2], "<f2").reshape(32, 144)
    for rank in range(4):
        held = read_safetensors(ranks / f"model{rank}-mp4.safetensors")
        assert held[f"{ours}.scales"] == ("F16", (8, 144), scales[8 * rank : 8 * rank + 8].tobytes())
        assert held[f"{ours}.qweight"][1] == (16, 144)
        groups = np.frombuffer(held[f"{ours}.g_idx"][2], "<i4")
        assert (groups == np.arange(128) // 16 + 8 * rank).all()
    assert read_published(write(wk.merge(wk.open_checkpoint(ranks)), tmp_path / "merged")) == contents


def test_pain_15_the_degree_that_an_engine_will_have(tmp_path: Path) -> None:
    """Engines cut experts too: V3's 2048 columns in groups of 1024 are for 2 GPUs, not for 8."""
    arch = Architecture.from_config(
        replace(V3_INT4, hidden=7168, moe=2048, shared=1, heads=128, gptq=Gptq(group_size=1024)).config()
    )
    assert legal_tp(arch) == (1, 2)
    assert any("(group size 1024)" in str(problem) for problem in tp_problems(arch, 8))


def test_pain_16_a_killed_run_continues(v3: Path, tmp_path: Path) -> None:
    """Kill -9 in the second of three files: the first is kept, and the result is as if nothing had happened."""
    code = (
        "import os, signal, sys\n"
        "import weightkit as wk\n"
        "from weightkit.checkpoint.reading import Reader\n"
        "read = Reader.read_range\n"
        "def dying(self, path, offset, out):\n"
        "    if '00002-of' in path:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    read(self, path, offset, out)\n"
        "Reader.read_range = dying\n"
        "wk.write(wk.open_checkpoint(sys.argv[1]), sys.argv[2], jobs=1, progress=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, v3, tmp_path / "out"], check=False)
    assert done.returncode == -9
    first = tmp_path / "out/model-00001-of-000003.safetensors"
    before = first.stat().st_mtime_ns
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    written = wk.write(wk.open_checkpoint(v3), tmp_path / "out", progress=False)
    assert first.stat().st_mtime_ns == before
    assert written.written_bytes == written.size_bytes - first.stat().st_size
    assert tree(tmp_path / "out") == tree(write(wk.open_checkpoint(v3), tmp_path / "whole"))


@pytest.mark.usefixtures("one_thread")
def test_pain_16_a_killed_quantization_continues(v3: Path, tmp_path: Path) -> None:
    """Kill -9 in the second of two layers: the first is not solved again, and the result is as if nothing had
    happened."""
    tokens = np.arange(256).reshape(4, 64) % 61 % 64
    code = (
        "import os, signal, sys\n"
        "import weightkit.quantization as q\n"
        "from weightkit.quantization.solver import Solver\n"
        "solve = Solver.solve\n"
        "def dying(self, names, *rest):\n"
        "    if names[0].startswith('model.layers.2.mlp.experts.3'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return solve(self, names, *rest)\n"
        "Solver.solve = dying\n"
        "settings = q.Settings(group_size=16)\n"
        "options = dict(samples=4, seq_len=64, device='cpu', snapshot_layers=1, progress=False)\n"
        "q.quantize(sys.argv[1], sys.argv[2], settings, calibration=sys.argv[3], **options)\n"
    )
    whole = to_int4(v3, tmp_path / "whole", tokens)
    done = subprocess.run(
        [sys.executable, "-c", code, v3, tmp_path / "out", tmp_path / "tokens.npy"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == -9
    layer_1 = tmp_path / "out/model-00003-of-000005.safetensors"
    before = layer_1.stat().st_mtime_ns
    report = to_int4(v3, tmp_path / "out", tokens, snapshot_layers=1)
    assert layer_1.stat().st_mtime_ns == before
    assert report.resumed_layers == (1,)
    assert [layer.matrices for layer in report.layers] == [layer.matrices for layer in whole.layers]
    ours, theirs = (without_reports(tree(tmp_path / name)) for name in ("out", "whole"))
    assert ours == theirs


def without_reports(files: dict[str, bytes]) -> dict[str, bytes]:
    """Reports tell the time."""
    return {name: content for name, content in files.items() if not name.startswith("quantization_report.")}


def test_pain_17_numbers_of_layers_and_experts_come_from_the_config(tmp_path: Path) -> None:
    """61 layers, of which the last is not an MTP layer here, and 12 experts."""
    model = replace(V2_LITE, layers=63, experts=12, moe=8, intermediate=16, hidden=16, heads=2, kv_lora=8, shared=2)
    contents = write_tiny(tmp_path / "deep", model)
    checkpoint = wk.open_checkpoint(tmp_path / "deep")
    assert read_published(write(wk.strip_mtp(checkpoint), tmp_path / "stripped")) == contents
    ranks = write(wk.shard(checkpoint, mp=2), tmp_path / "mp2")
    names = read_safetensors(ranks / "model1-mp2.safetensors")
    experts = {int(name.split(".")[4]) for name in names if ".experts." in name}
    assert experts == set(range(6, 12))
    assert {int(name.split(".")[1]) for name in names if name.startswith("layers.")} == set(range(63))
    assert read_published(write(wk.merge(wk.open_checkpoint(ranks)), tmp_path / "merged")) == contents


@every_way
def test_pain_18_what_is_f32_stays_f32(way: str, v3: Path, tmp_path: Path) -> None:
    contents = read_published(v3)
    result = write(WAYS[way](wk.open_checkpoint(v3)), tmp_path / "out")
    biases = {
        name: content
        for path in result.glob("*.safetensors")
        for name, content in read_safetensors(path).items()
        if name.endswith(("gate.e_score_correction_bias", "gate.bias"))
    }
    assert len(biases) >= 2
    for name, (dtype, shape, data) in biases.items():
        layer = int(name.removeprefix("model.").split(".")[1])
        whole = contents[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"][2]
        assert dtype == "F32"
        assert data == whole if shape == (8,) else data == whole[:8] + whole[16:24]


def test_pain_18_inv_freq_stays_f32(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "moonlight", MOONLIGHT)
    found = read_published(write(wk.cast(wk.open_checkpoint(tmp_path / "moonlight"), "f16"), tmp_path / "f16"))
    kept = [name for name in contents if contents[name][0] == "F32"]
    assert any(name.endswith("inv_freq") for name in kept)
    assert all(found[name] == contents[name] for name in kept)


def test_pain_19_nothing_in_between_and_space_checked_first(
    v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 to BF16 ranks without MTP: the source is read once, only the target is written."""
    plan = make_plan(wk.shard(wk.cast(wk.open_checkpoint(v3), "bf16"), mp=8), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(target, "free_disk_bytes", lambda place: plan.bytes_written - 1)
        with pytest.raises(SpaceError, match="not enough free space"):
            execute(plan, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v3"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_oublock * 512
    execute(plan, progress=False)
    written = resource.getrusage(resource.RUSAGE_SELF).ru_oublock * 512 - before
    assert written < plan.bytes_written + (1 << 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "v3"]


@pytest.mark.usefixtures("one_thread")
def test_pain_19_fp8_to_int4_has_no_bf16_in_between(v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on the disk while it is quantized is the part of the output that is done, and no more of the rest than
    a layer; space for all of it was checked before."""
    tokens = np.arange(256).reshape(4, 64) % 64
    with monkeypatch.context() as patch:
        patch.setattr(target, "free_disk_bytes", lambda place: 1 << 20)
        with pytest.raises(SpaceError, match="not enough free space"):
            to_int4(v3, tmp_path / "int4", tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.npy", "v3"]
    solve, most = Solver.solve, 0

    def watching(*arguments: Any) -> Any:
        nonlocal most
        sizes = {}
        for path in tmp_path.rglob("*"):
            with suppress(FileNotFoundError):  # the writer renames what is done
                if path.is_file() and "v3" not in path.parts:
                    sizes[path] = path.stat().st_size
        assert {path.parent.name for path in sizes} <= {tmp_path.name, "int4", ".weightkit", "quantization"}
        most = max(most, sum(sizes.values()))
        return solve(*arguments)

    monkeypatch.setattr(Solver, "solve", watching)
    report = to_int4(v3, tmp_path / "int4", tokens, snapshot_layers=0)
    bf16 = sum(
        2 * np.prod(shape, dtype=int) for shape in (shape for _, shape in replace(V3, fp8=False).tensors().values())
    )
    assert most < report.sizes.output_bytes + (1 << 16) < bf16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int4", "tokens.npy", "v3"]


def test_pain_21_shards_of_any_name_and_whole_components(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "v3", pattern="weights.{number}.part.safetensors")
    checkpoint = wk.open_checkpoint(tmp_path / "v3")
    assert read_published(write(wk.strip_mtp(checkpoint), tmp_path / "out")) == without(contents, "layers.3.")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {
        f"weights.{number}.part.safetensors" for number in (1, 2, 3)
    }
    rank = read_safetensors(write(wk.shard(checkpoint, mp=1), tmp_path / "mp1") / "model0-mp1.safetensors")
    # `gate` and `gate_proj`, `norm` and `q_a_layernorm`, `head` and `heads`: none is taken for part of another
    assert rank["layers.1.ffn.gate.weight"] == contents["model.layers.1.mlp.gate.weight"]
    assert (
        rank["layers.1.ffn.shared_experts.w1.weight"] == contents["model.layers.1.mlp.shared_experts.gate_proj.weight"]
    )
    assert rank["layers.1.attn.q_norm.weight"] == contents["model.layers.1.self_attn.q_a_layernorm.weight"]
    assert rank["layers.1.attn.wq_b.scale"] == contents["model.layers.1.self_attn.q_b_proj.weight_scale_inv"]
    assert rank["norm.weight"] == contents["model.norm.weight"]
    assert rank["head.weight"] == contents["lm_head.weight"]


@every_way
def test_pain_22_files_have_the_umasks_mode(way: str, v3: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        result = write(WAYS[way](wk.open_checkpoint(v3)), tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in result.iterdir()} == {0o640}


@pytest.mark.parametrize("length", [2**63, 10**8 + 1, 10**7])
def test_pain_23_a_hostile_header_length_allocates_nothing(length: int, v3: Path) -> None:
    import tracemalloc

    path = sorted(v3.glob("*.safetensors"))[1]
    content = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + content[8:])
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=path.name):
            wk.open_checkpoint(v3)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/../../x.safetensors"])
def test_pain_23_an_index_that_leaves_its_folder(name: str, v3: Path) -> None:
    path = v3 / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][EXPERT] = name
    path.write_text(json.dumps(index))
    with pytest.raises(IndexFileError, match="not a file name beside the index"):
        wk.open_checkpoint(v3)


def test_pain_23_a_link_out_of_the_folder(v3: Path, tmp_path: Path) -> None:
    path = sorted(v3.glob("*.safetensors"))[0]
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FormatError, match="leads out of the checkpoint's folder"):
        wk.open_checkpoint(v3)


def test_pain_23_overlapping_tensors(v3: Path) -> None:
    path = sorted(v3.glob("*.safetensors"))[0]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second = list(header)[1:3]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [header[first]["data_offsets"][0], header[first]["data_offsets"][0] + size]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(FormatError, match=r"begins within|a hole before"):
        wk.open_checkpoint(v3)
