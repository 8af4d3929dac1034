"""``quantize`` on tiny members of the family: what is written, for each source and setting, against a model by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import INDEX, read_published, without
from quantizing import GROUPS, SMALL, check_output, exact_weights, integers, run, small, weight_files, write_tokens
from tiny import KIMI, MOONLIGHT, V2_LITE, V3, V3_BF16, V31, Tiny, write_tiny

import weightkit as wk
from weightkit import workspace
from weightkit.cli.app import group
from weightkit.errors import Interrupted, SpaceError
from weightkit.generation import Runtime
from weightkit.manifests.pico.questions import held_out
from weightkit.quantization import QuantizationReport, Settings, default_calibration, load_calibration
from weightkit.quantization.solver import Solver

pytestmark = pytest.mark.usefixtures("one_thread")

MEMBERS = {
    "V3": V3,
    "V3 BF16": V3_BF16,
    "V3.1": V31,
    "V2-Lite": V2_LITE,
    "Moonlight": MOONLIGHT,
    "Kimi": KIMI,
    "three MTP layers": replace(V3, mtp_layers=3, layers=2),
}


def check_report(report: QuantizationReport, target: Path, model: Tiny, settings: Settings) -> None:
    """The report is complete, of this run, and read back from the target the same."""
    assert QuantizationReport.load(target / "quantization_report.json") == report
    assert (target / "quantization_report.html").is_file()
    quantized = [name.removesuffix(".qweight") for name in read_published(target) if name.endswith(".qweight")]
    assert sorted(matrix.name for matrix in report.matrices) == sorted(quantized)
    assert [layer.layer for layer in report.layers] == sorted({layer.layer for layer in report.layers})
    assert report.settings.bits == settings.bits
    for matrix in report.matrices:
        assert matrix.method == settings.method
        assert matrix.error is not None
        assert 0 < matrix.error < 0.5
    assert report.resumed_layers == ()
    assert report.sizes.output_bytes == sum(path.stat().st_size for path in target.glob("*.safetensors"))


@pytest.mark.parametrize("name", MEMBERS)
def test_members(name: str, tmp_path: Path) -> None:
    model = small(MEMBERS[name])
    source = write_tiny(tmp_path / "source", model)
    report = run(tmp_path / "source", tmp_path / "int4")
    check_output(source, tmp_path / "int4", model, GROUPS)
    check_report(report, tmp_path / "int4", model, GROUPS)
    assert wk.verify(tmp_path / "int4", values=True).problems == ()
    assert not (tmp_path / "int4/.weightkit").exists()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(group_size=16, scope="all"),
        Settings(group_size=32, bits=8),
        Settings(group_size=-1),
        Settings(group_size=-1, scope="all", bits=8, mtp=False),
        Settings(group_size=8, order="none"),
        Settings(group_size=16, scales="largest"),
        Settings(group_size=16, mtp=False, damping=0.05),
        Settings(group_size=16, method="rtn"),
        Settings(group_size=32, method="rtn", bits=8, scope="all", scales="largest"),
    ],
    ids=lambda settings: "-".join([*settings.form, settings.order, settings.scales]),
)
def test_settings(settings: Settings, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", SMALL)
    report = run(tmp_path / "source", tmp_path / "out", settings)
    found = check_output(source, tmp_path / "out", SMALL, settings)
    check_report(report, tmp_path / "out", SMALL, settings)
    assert wk.verify(tmp_path / "out", values=True).problems == ()
    if settings.method == "gptq":
        assert report.worse_than_rounding == ()
        errors = [(matrix.error, matrix.rounding_error) for matrix in report.matrices]
        assert sum(error or 0 for error, _ in errors) < 0.85 * sum(rounding or 0 for _, rounding in errors)
    else:
        check_rounding(source, found, settings)
        assert report.calibration is None


def check_rounding(source: dict, found: dict, settings: Settings) -> None:
    """Codes are the weights over the scales, rounded; and ``largest`` scales span each group."""
    half = 1 << (settings.bits - 1)
    for name, weight in exact_weights(source).items():
        module = name.removesuffix(".weight")
        if f"{module}.qweight" not in found:
            continue
        codes, scales = integers(found, module, settings.bits)
        size = weight.shape[1] if settings.group_size == -1 else settings.group_size
        each = scales.T.repeat(size, axis=1)
        expected = np.clip(np.floor(weight / each + np.float32(half + 0.5)), 0, 2 * half - 1)
        assert (codes == expected).all(), name
        if settings.scales == "largest":
            largest = np.abs(weight.reshape(len(weight), -1, size)).max(axis=2)
            np.testing.assert_allclose(scales.T, largest * 2 / (2 * half - 1), rtol=1e-3)


def test_settings_of_a_wider_model(tmp_path: Path) -> None:
    """Groups of 64 and 128, as published checkpoints have them."""
    model = small(V3, hidden=128, moe=128, shared=1, experts=4, layers=2, intermediate=128)
    source = write_tiny(tmp_path / "source", model)
    for size in (64, 128):
        run(tmp_path / "source", tmp_path / str(size), Settings(group_size=size), samples=2)
        check_output(source, tmp_path / str(size), model, Settings(group_size=size))


@pytest.mark.parametrize(
    "way",
    [
        lambda checkpoint: wk.shard(wk.cast(checkpoint, "bf16"), mp=2),
        lambda checkpoint: wk.shard(checkpoint, ep=2),
    ],
    ids=["mp2 in BF16", "ep2 in FP8"],
)
def test_rank_files_as_the_source(way: Callable, tmp_path: Path) -> None:
    """The same integers as from the published layout of the same weights."""
    write_tiny(tmp_path / "source", SMALL)
    ranks = way(wk.open_checkpoint(tmp_path / "source"))
    wk.write(ranks, tmp_path / "ranks", device="cpu", progress=False)
    wk.write(wk.merge(wk.open_checkpoint(tmp_path / "ranks")), tmp_path / "merged", device="cpu", progress=False)
    run(tmp_path / "ranks", tmp_path / "from-ranks")
    run(tmp_path / "merged", tmp_path / "from-merged")
    assert weight_files(tmp_path / "from-ranks") == weight_files(tmp_path / "from-merged")
    assert wk.verify(tmp_path / "from-ranks", values=True).problems == ()


def test_other_seeds_and_files_give_other_tokens(tmp_path: Path) -> None:
    write_tiny(tmp_path / "source", SMALL)
    tokens = write_tokens(tmp_path / "tokens.npy", 16)
    results = [
        run(tmp_path / "source", tmp_path / f"{seed}-{number}", seed=seed, calibration=tokens)
        for number, seed in enumerate((0, 0, 1))
    ]
    files = [weight_files(tmp_path / name) for name in ("0-0", "0-1", "1-2")]
    assert files[0] == files[1] != files[2]
    digests = [report.calibration.sha256 for report in results if report.calibration is not None]
    assert digests[0] == digests[1] != digests[2]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("0-0", "1-2")]
    assert [config["quantization_config"]["meta"]["calibration_sha256"] for config in configs] == digests[1:]


def test_side_files_travel(tmp_path: Path) -> None:
    write_tiny(tmp_path / "source", SMALL)
    (tmp_path / "source/tokenizer.json").write_text('{"模": "型"}')
    run(tmp_path / "source", tmp_path / "int4", Settings(group_size=16, method="rtn"))
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "int4" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    weight_map = json.loads((tmp_path / "int4" / INDEX).read_text())["weight_map"]
    for layer in range(4):
        assert len({file for name, file in weight_map.items() if name.startswith(f"model.layers.{layer}.")}) == 1


def test_experts_that_no_token_reached_are_rounded_and_named(tmp_path: Path) -> None:
    """One token alone is in two experts; the others are told in the report, and as good as rounding makes them."""
    write_tiny(tmp_path / "source", SMALL)
    np.save(tmp_path / "tokens.npy", np.full((1, 1), 7, np.int32))
    report = run(tmp_path / "source", tmp_path / "int4", samples=1, seq_len=1)
    assert [sum(layer.tokens_by_expert) for layer in report.layers] == [0, 2, 2]
    rounded = {matrix.name: matrix for matrix in report.rounded}
    assert len(rounded) == 2 * 6 * 3
    assert {matrix.note for matrix in rounded.values()} == {"no calibration token reached it"}
    assert all(matrix.tokens == 0 and matrix.damping is None for matrix in rounded.values())
    assert any("36 matrices of 54 rounded to nearest" in warning for warning in report.warnings)
    run(tmp_path / "source", tmp_path / "rtn", Settings(group_size=16, method="rtn"))
    found, rtn = read_published(tmp_path / "int4"), read_published(tmp_path / "rtn")
    for name in rounded:
        assert found[f"{name}.qweight"] == rtn[f"{name}.qweight"]
    others = without(found, *rounded)
    assert sum(others[name] != rtn[name] for name in others if name.endswith(".qweight")) == 18


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    model = small(V3, dense_layers=3)
    source = write_tiny(tmp_path / "source", model)
    with pytest.raises(wk.errors.PlanError, match="nothing to quantize"):
        run(tmp_path / "source", tmp_path / "int4")
    settings = Settings(group_size=16, scope="all")
    run(tmp_path / "source", tmp_path / "int4", settings)
    check_output(source, tmp_path / "int4", model, settings)


def test_a_checkpoint_object_and_calibration_from_memory(tmp_path: Path) -> None:
    """What a notebook has: an opened and transformed checkpoint, tokens that were loaded before."""
    write_tiny(tmp_path / "source", SMALL)
    checkpoint = wk.keep_experts(wk.open_checkpoint(tmp_path / "source"), 4)
    tokens = write_tokens(tmp_path / "tokens.npy")
    calibration = load_calibration(tokens, None, samples=8, seq_len=64, vocab_size=64)
    run(checkpoint, tmp_path / "a", calibration=calibration)
    run(checkpoint, tmp_path / "b", calibration=str(tokens))
    assert weight_files(tmp_path / "a") == weight_files(tmp_path / "b")
    check = replace(SMALL, experts=4)
    assert {name for name in read_published(tmp_path / "a") if ".experts.3." in name}
    assert not {name for name in read_published(tmp_path / "a") if ".experts.4." in name}
    assert check.experts == 4


@pytest.mark.gpu
@pytest.mark.parametrize("scope", ["experts", "all"])
def test_on_a_gpu(scope: str, tmp_path: Path) -> None:
    """As good as on a CPU; the same bytes wherever the activations lie, and again where a run was continued."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    source = write_tiny(tmp_path / "source", SMALL)
    settings = Settings(group_size=16, scope=scope)
    reference = run(tmp_path / "source", tmp_path / "cpu", settings)
    report = run(tmp_path / "source", tmp_path / "gpu", settings, device="cuda")
    check_output(source, tmp_path / "gpu", SMALL, settings)
    assert wk.verify(tmp_path / "gpu", values=True).problems == ()
    ours, theirs = (sum(matrix.error or 0 for matrix in found.matrices) for found in (report, reference))
    assert ours == pytest.approx(theirs, rel=0.1)
    with stopped_in_the_last_layer(), pytest.raises(Interrupted):
        run(tmp_path / "source", tmp_path / "again", settings, device="cuda", snapshot_layers=1)
    run(tmp_path / "source", tmp_path / "again", settings, device="cuda", snapshot_layers=1)
    assert weight_files(tmp_path / "again") == weight_files(tmp_path / "gpu")
    with pytest.raises(SpaceError) as caught:
        run(tmp_path / "source", tmp_path / "host", settings, device="cuda", gpu_memory=1)
    needed = int((caught.value.expected or "").split()[2].replace(",", ""))
    run(tmp_path / "source", tmp_path / "host", settings, device="cuda", gpu_memory=needed)
    assert weight_files(tmp_path / "host") == weight_files(tmp_path / "gpu")


@contextmanager
def stopped_in_the_last_layer() -> Iterator[None]:
    """Ctrl-C in the last layer."""
    solve = Solver.solve

    def stopping(solver: Solver, names: Sequence[str], *rest: Any) -> Any:
        if names[0].startswith("model.layers.2.mlp.experts.5"):
            raise KeyboardInterrupt
        return solve(solver, names, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Solver, "solve", stopping)
        yield


# --- pico, which is trained -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pico:
    """pico in the workspace, by the command line without SRC and DST: as published, quantized, and rounded."""

    published: Path
    int4: Path
    rounded: Path
    said: str


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    home = tmp_path_factory.mktemp("home")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setenv("WEIGHTKIT_HOME", str(home))
        for options in (["--samples", "8", "--seq-len", "256"], ["--method", "rtn", "-q"]):
            group.main(["quantize", "--model", "pico", "--device", "cpu", *options], standalone_mode=False)
    return Pico(workspace.source("pico"), home / "pico/int4", home / "pico/int4-rtn", said.getvalue())


def test_pico_verifies(pico: Pico) -> None:
    assert pico.said.startswith("pico: 102 matrices of 2 layers in int4 (gptq, groups of 128, scope experts), ")
    for folder in (pico.int4, pico.rounded):
        found = wk.verify(folder, values=True)
        assert found.problems == ()
        assert {check.name for check in found.checks if check.done} >= {"tensors", "checksums", "values"}
    report = QuantizationReport.load(pico.int4 / "quantization_report.json")
    assert report.title == "pico"
    assert report.warnings == ()
    assert report.calibration is not None
    assert (report.calibration.samples, report.calibration.seq_len) == (8, 256)
    assert [sum(layer.tokens_by_expert) for layer in report.layers] == [0, 4 * 2048, 4 * 2048]
    for matrix in report.matrices:
        assert matrix.error is not None
        assert matrix.rounding_error is not None
        assert matrix.error < 0.9 * matrix.rounding_error


def test_pico_computes_as_before(pico: Pico) -> None:
    """On text that it was not calibrated with its predictions are nearer to the source's than rounding's; answers to
    held-out questions are right."""
    data = default_calibration("pico")
    text = load_calibration(data, pico.published, samples=8, seq_len=128, seed=9, vocab_size=512).tokens
    questions, shares = held_out(2026, 1), {}
    for folder in (pico.published, pico.int4, pico.rounded):
        with Runtime(folder, device="cpu") as runtime:
            shares[folder] = runtime.model(torch.from_numpy(text).long()).double().log_softmax(-1)
            answers = [runtime.generate(question.prompt, max_new_tokens=32).text for question in questions]
        assert sum(answer == asked.answer for answer, asked in zip(answers, questions, strict=True)) >= 11

    def divergence(folder: Path) -> float:
        exact = shares[pico.published]
        return (exact.exp() * (exact - shares[folder])).sum(-1).mean().item()

    assert divergence(pico.int4) < 0.6 * divergence(pico.rounded)
    assert divergence(pico.int4) < 0.01
