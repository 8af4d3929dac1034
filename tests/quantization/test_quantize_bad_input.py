"""What ``quantize`` refuses: said clearly, with exit code 1, before work where that is possible, and never in place of
something good. What it needs of memory and disk: the least that it names is enough."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import INDEX, Contents, read_safetensors
from quantizing import SMALL, run, small, weight_files, write_tokens
from tiny import V3_BF16, V3_INT4, Tiny, write_safetensors, write_tiny

from weightkit.errors import CalibrationError, Interrupted, PlanError, Problems, SpaceError
from weightkit.layouts import open_checkpoint
from weightkit.quantization import Settings, job, load_calibration, memory
from weightkit.quantization import run as running
from weightkit.quantization.activations import Activations
from weightkit.quantization.memory import MemoryPlan, plan_memory
from weightkit.quantization.plan import plan_quantization
from weightkit.quantization.solver import Solver
from weightkit.writer import target as targets

pytestmark = pytest.mark.usefixtures("one_thread")

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
BF16 = small(V3_BF16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "tokens.npy")
    return tmp_path


def poison(folder: Path, model: Tiny, name: str, bits: bytes) -> None:
    """Write the model, and over one tensor's first value."""
    write_tiny(folder, model)
    for path in folder.glob("*.safetensors"):
        tensors: Contents = read_safetensors(path)
        if name in tensors:
            dtype, shape, data = tensors[name]
            write_safetensors(path, {**tensors, name: (dtype, shape, bits + data[len(bits) :])})


@pytest.fixture
def refused(folder: Path, weightkit: Callable[..., Any]) -> Callable[..., str]:
    """Runs the command, which must fail with exit code 1 and a message; gives the message."""

    def call(*options: object, tokens: Path | None = None, src: str = "source") -> str:
        amount = [] if "--samples" in options else ["--samples", 8, "--seq-len", 64]
        group = [] if "--group-size" in options else ["--group-size", 16]
        calibration = ["--calibration", tokens or folder / "tokens.npy"]
        done = weightkit("quantize", folder / src, folder / "out", *calibration, *amount, *group, *options)
        assert done.code == 1, done.out
        assert done.err.startswith("Error: ")
        assert "defect" not in done.err
        assert "Traceback" not in done.err
        assert not (folder / "out" / INDEX).exists()
        message: str = done.err.removeprefix("Error: ")
        return message

    return call


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--method", "rtn"], ["--scales", "largest"]], ids=str)
@pytest.mark.parametrize("source", ["FP8", "BF16"])
def test_nan_among_weights(source: str, options: list[str], folder: Path, refused: Callable[..., str]) -> None:
    if source == "FP8":
        poison(folder / "source", SMALL, UP, b"\x7f")
    else:
        poison(folder / "source", BF16, UP, b"\xc0\x7f")
    message = refused(*options)
    assert message.startswith(f"{UP}: weights that are not finite")
    assert "weightkit verify --values" in message
    assert weight_files(folder / "out").keys() <= {f"model-0000{n}-of-000005.safetensors" for n in (1, 2, 5)}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.embed_tokens.weight", "model.layers.0: the states after this layer"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0: the states after this layer"),
        ("model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.experts.0.gate_proj.weight: the inputs"),
        ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.experts.0.gate_proj.weight: the inputs"),
        ("model.layers.2.input_layernorm.weight", "model.layers.2.mlp.experts.0.gate_proj.weight: the inputs"),
    ],
)
def test_inf_in_what_is_not_quantized(name: str, where: str, folder: Path, refused: Callable[..., str]) -> None:
    """Named where it first shows: in a matrix's inputs, or in the states after a layer."""
    poison(folder / "source", BF16, name, b"\x80\x7f" * 64)
    message = refused()
    assert re.sub(r"experts\.\d", "experts.0", message).startswith(f"{where} hold NaN or Inf")
    assert "weightkit verify --values" in message


def test_a_finished_layer_stays_where_a_later_one_fails(folder: Path, refused: Callable[..., str]) -> None:
    poison(folder / "source", BF16, UP.replace("layers.1", "layers.2"), b"\xc0\x7f")
    assert refused().startswith("model.layers.2.mlp.experts.3.up_proj.weight")
    assert "model-00003-of-000005.safetensors" in weight_files(folder / "out")


# --- calibration ------------------------------------------------------------------------------------------------------


def test_no_calibration(folder: Path, weightkit: Callable[..., Any]) -> None:
    write_tiny(folder / "source", SMALL)
    done = weightkit("quantize", folder / "source", folder / "out")
    assert done.code == 1
    assert "--calibration: GPTQ needs text to calibrate with" in done.err
    assert "--method rtn" in done.err


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (
            np.zeros((8, 64), "<i4"),
            ["--samples", 9, "--seq-len", 64],
            "expected 576 tokens (9 samples of 64), found 512",
        ),
        (np.zeros((0, 64), "<i4"), [], "no calibration data in it"),
        (np.zeros(100, "<i4"), [], "too little calibration data"),
        (np.zeros((8, 32), "<i4"), [], "rows shorter than a sequence"),
        (np.full((8, 64), 64, "<i4"), [], "a token id that the model does not have: expected 0 to 63, found 64"),
        (np.full((8, 64), -1, "<i4"), [], "a token id that the model does not have: expected 0 to 63, found -1"),
        (np.zeros((8, 64), "<f4"), [], "not token ids"),
        (np.zeros((1, 600), "<i4"), ["--samples", 1, "--seq-len", 600], "sequences longer than the model's context"),
    ],
    ids=["few", "empty", "short", "short rows", "unknown", "negative", "floats", "long"],
)
def test_calibration_that_is_none(
    tokens: np.ndarray, options: list[object], message: str, folder: Path, refused: Callable[..., str]
) -> None:
    write_tiny(folder / "source", SMALL)
    np.save(folder / "other.npy", tokens)
    assert message in refused(*options, tokens=folder / "other.npy")
    assert not (folder / "out").exists()


def test_text_without_a_tokenizer_and_no_file(folder: Path, refused: Callable[..., str]) -> None:
    write_tiny(folder / "source", SMALL)
    (folder / "text.txt").write_text("a text")
    assert "tokenizer" in refused(tokens=folder / "text.txt")
    assert "no such file or folder" in refused(tokens=folder / "missing.npy")


def test_calibration_of_another_model(folder: Path) -> None:
    """From memory it was checked against that model's vocabulary, not this one's."""
    write_tiny(folder / "source", SMALL)
    np.save(folder / "other.npy", np.full((8, 64), 99, "<i4"))
    other = load_calibration(folder / "other.npy", None, samples=8, seq_len=64, vocab_size=100)
    with pytest.raises(CalibrationError, match="expected 0 to 63, found 99"):
        run(folder / "source", folder / "out", calibration=other)


def test_sequences_that_only_sparse_attention_would_take(folder: Path, refused: Callable[..., str]) -> None:
    model = replace(SMALL, extra_config={"index_topk": 32, "index_n_heads": 4, "index_head_dim": 32})
    write_tiny(folder / "source", model)
    (folder / "source/config.json").write_text(json.dumps(model.config() | {"model_type": "deepseek_v32"}))
    message = refused()
    assert "sparse attention" in message or "indexer" in message


# --- settings and sources ---------------------------------------------------------------------------------------------


def test_groups_that_do_not_divide(folder: Path, refused: Callable[..., str]) -> None:
    write_tiny(folder / "source", SMALL)
    message = refused("--group-size", 128)
    assert message.startswith("--group-size: groups of 128 do not divide the 64 input features of model.layers.1.mlp.")
    assert "expected -1 or a divisor of 64" in message
    assert not (folder / "out").exists()


def test_settings_are_checked_together() -> None:
    with pytest.raises(Problems) as caught:
        Settings(bits=3, group_size=0, scope="some", method="awq", damping=0.0, order="desc", scales="mse")
    assert len(caught.value.problems) == 7
    with pytest.raises(PlanError, match=r"--damping: .*found nan"):
        Settings(damping=float("nan"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--bits", "3"], "--bits"),
        (["--scope", "x"], "--scope"),
        (["--damping", "0"], "--damping"),
        (["--samples", "0"], "--samples"),
        (["--gpu-memory", "much"], "is no size"),
    ],
    ids=lambda value: str(value),
)
def test_a_wrong_call_exits_2(options: list[str], complaint: str, weightkit: Callable[..., Any]) -> None:
    done = weightkit("quantize", "source", "target", *options)
    assert done.code == 2
    assert complaint in done.err


def test_a_source_that_is_quantized_already(folder: Path, refused: Callable[..., str]) -> None:
    write_tiny(folder / "source", V3_INT4)
    message = refused()
    assert "quantized already: expected FP8, BF16, F16 or F32 weights, found gptq." in message
    assert "Quantize the FP8 or BF16 repository of this model." in message


def test_a_target_that_is_something_else(folder: Path, refused: Callable[..., str]) -> None:
    """Not even ``--force`` replaces what is not ours; nor is the source itself a target."""
    write_tiny(folder / "source", SMALL)
    write_tiny(folder / "out", SMALL)
    (folder / "out" / INDEX).rename(folder / "out/index.json")
    before = {path: path.read_bytes() for path in (folder / "out").iterdir()}
    for options in ([], ["--force"]):
        assert "holds files that this would mix with or overwrite" in refused(*options)
    assert {path: path.read_bytes() for path in (folder / "out").iterdir()} == before


def test_a_source_as_its_own_target(folder: Path, weightkit: Callable[..., Any]) -> None:
    write_tiny(folder / "source", SMALL)
    done = weightkit("quantize", folder / "source", folder / "source", "--method", "rtn", "--group-size", 16)
    assert done.code == 1
    assert "two folders" in done.err


# --- memory -----------------------------------------------------------------------------------------------------------


def least(error: SpaceError) -> int:
    match = re.match(r"at least ([\d,]+) bytes", error.expected or "")
    assert match is not None
    return int(match[1].replace(",", ""))


def test_the_least_host_memory_works(folder: Path, refused: Callable[..., str]) -> None:
    write_tiny(folder / "source", SMALL)
    with pytest.raises(SpaceError, match="not enough host memory") as caught:
        run(folder / "source", folder / "out", host_memory=1000)
    needed = least(caught.value)
    message = refused("--host-memory", needed - 1)
    assert message.startswith(f"--host-memory: not enough host memory: expected at least {needed:,} bytes")
    assert "--samples" in message
    assert not (folder / "out").exists()
    run(folder / "source", folder / "out", host_memory=needed)
    run(folder / "source", folder / "roomy", host_memory=100 << 30)
    assert weight_files(folder / "out") == weight_files(folder / "roomy")


def test_the_least_gpu_memory_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan for a GPU, which needs none: at the least the activations lie in host memory, with more on it."""
    write_tiny(folder / "source", SMALL)
    checkpoint = open_checkpoint(folder / "source")
    plan = plan_quantization(checkpoint, folder / "out", Settings(group_size=16), calibration="x", version="0")

    def planned(gpu: int, host: int, ranks: int = 1, sequences: int = 64) -> MemoryPlan:
        return plan_memory(
            plan,
            sequences=64,
            seq_len=4096,
            device=torch.device("cuda"),
            gpu_memory=gpu,
            host_memory=host,
            ranks=ranks,
            all_sequences=sequences,
        )

    with pytest.raises(SpaceError, match="not enough GPU memory") as caught:
        planned(1, 1 << 40)
    gpu = least(caught.value)
    with pytest.raises(SpaceError):
        planned(gpu - 1, 1 << 40)
    with pytest.raises(SpaceError, match="not enough host memory") as caught:
        planned(gpu, 1)
    host = least(caught.value)
    with pytest.raises(SpaceError):
        planned(gpu, host - 1)
    low = planned(gpu, host)
    activations = 64 * 4096 * 64 * 2
    assert (low.on_device, low.activations, low.kept, low.host) == (False, activations, 0, host)
    assert not planned(gpu + activations - 1, host).on_device
    high = planned(gpu + activations, host)
    assert high.on_device
    assert high.host == host - activations
    assert planned(gpu + activations + 1000, host).kept == 1000
    monkeypatch.setattr(memory, "PREFILL_SIZE_BYTES", 0)

    def needed(ranks: int, sequences: int) -> int:
        with pytest.raises(SpaceError, match="not enough GPU memory") as caught:
            planned(1, host, ranks, sequences)
        return least(caught.value)

    an_input = 64 * 2
    assert needed(64, 4096) - needed(8, 512) == 56 * 65_536 * an_input  # to send: of each expert, 64 Ki inputs at most
    assert needed(64, 4096) == needed(64, 16)
    assert needed(64, 16) - needed(64, 15) == 66 * 4096 * an_input  # it is no more than there is


class Elsewhere(Activations):
    """Activations on one device, computed with on another: whatever is changed there must be brought back."""

    def batches(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for place, batch in super().batches():
            yield place, batch.clone()

    def put(self, place: slice, batch: torch.Tensor) -> None:
        self.hidden[place] = batch


@pytest.mark.parametrize("scope", ["experts", "all"])
def test_activations_in_host_memory_give_the_same_bytes(
    scope: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(folder / "source", SMALL)
    monkeypatch.setattr("weightkit.quantization.activations.BATCH_TOKENS", 128)
    settings = Settings(group_size=16, scope=scope)
    run(folder / "source", folder / "here", settings)
    monkeypatch.setattr(running, "Activations", Elsewhere)
    run(folder / "source", folder / "there", settings)
    assert weight_files(folder / "here") == weight_files(folder / "there")


def test_a_gpu_that_fails_is_no_defect(
    folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    write_tiny(folder / "source", SMALL)
    monkeypatch.setattr(Solver, "solve", fail)
    message = refused("--device", "cpu")
    assert message.startswith("cpu: the GPU failed: found CUDA error: an illegal memory access was encountered.\nRun")


# --- disk -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the disk have so many bytes free."""

    def set_to(count: int) -> None:
        monkeypatch.setattr(targets, "free_disk_bytes", lambda _: count)
        monkeypatch.setattr(job, "free_disk_bytes", lambda _: count)

    return set_to


def needed(source: Path, target: Path, free: Callable[[int], None], **options: Any) -> int:
    """What the refusal says; ``free`` leaves room for all but the kept activations."""
    with pytest.raises(SpaceError) as caught:
        run(source, target, **options)
    exact = re.search(r"\(([\d,]+) bytes\)", str(caught.value.expected))
    assert exact is not None
    return int(exact[1].replace(",", ""))


def test_not_enough_disk(folder: Path, free: Callable[[int], None], refused: Callable[..., str]) -> None:
    write_tiny(folder / "source", SMALL)
    free(0)
    assert "out: not enough free space: expected" in refused()
    for_output = needed(folder / "source", folder / "out", free)
    free(for_output)
    message = refused()
    assert "not enough free space for the activations that are kept for a resume" in message
    assert "--snapshot-layers 0" in message
    assert not (folder / "out").exists()
    for_both = needed(folder / "source", folder / "out", free)
    assert for_both == for_output + 2 * 8 * 64 * 64 * 4
    run(folder / "source", folder / "without", snapshot_layers=0)
    free(for_both)
    run(folder / "source", folder / "with")
    assert weight_files(folder / "with") == weight_files(folder / "without")


def test_what_lies_there_counts_when_a_run_continues(
    folder: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that was just large enough, a stopped run may go on; and one that begins anew replaces it."""
    write_tiny(folder / "source", SMALL)
    free(0)
    for_output = needed(folder / "source", folder / "out", free)
    free(for_output)
    first = needed(folder / "source", folder / "out", free)
    free(first)
    solve, count = Solver.solve, 0

    def stopping(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 27:
            raise KeyboardInterrupt
        return solve(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Solver, "solve", stopping)
        with pytest.raises(Interrupted):
            run(folder / "source", folder / "out", snapshot_layers=1)
    states = 8 * 64 * 64 * 4
    for force in (False, True):
        target = shutil.copytree(folder / "out", folder / f"copy-{force}")
        held = sum(path.stat().st_blocks * 512 for path in target.rglob("*") if path.is_file())
        assert held > 2 * states
        free(first - held + states // 2)  # small files and ends of blocks are not worth counting
        run(folder / "source", target, snapshot_layers=1, force=force)
