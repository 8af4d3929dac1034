"""What weightkit writes as GPTQ means the same to auto-gptq, where the format comes from, and to GPTQModel.

Both are heavy, and auto-gptq wants an old transformers, so each runs in an environment of its own, which two variables
name (the README says how to make them); without them these tests are skipped:

    WEIGHTKIT_AUTOGPTQ_PYTHON=.../bin/python WEIGHTKIT_GPTQMODEL_PYTHON=.../bin/python pytest tests/oracles
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median

import pytest
import torch
from oracle_cases import LEAVES, Case, write_cases
from safetensors.torch import load_file, save_file

from weightkit.family import Architecture
from weightkit.kernels.gptq_format import dequant, pack, pack_zeros
from weightkit.layouts import open_checkpoint
from weightkit.manifests import load
from weightkit.model import CheckpointWeights, Model, TensorWeights
from weightkit.quantization import Settings, default_calibration, quantize
from weightkit.transforms import cast
from weightkit.writer import write

pytestmark = pytest.mark.oracle

HERE = Path(__file__).parent
PICO = load("pico").path or Path("no checkpoint ships")
AUTOGPTQ, GPTQMODEL = "WEIGHTKIT_AUTOGPTQ_PYTHON", "WEIGHTKIT_GPTQMODEL_PYTHON"
WANTED = {
    variable: pytest.mark.skipif(variable not in os.environ, reason=f"{variable} names no Python with {peer}")
    for variable, peer in ((AUTOGPTQ, "auto-gptq 0.7.1"), (GPTQMODEL, "GPTQModel 7.6"))
}
N, K = 96, 384
BITS, GROUPS = (4, 8), (128, 64, 32, -1)
WRAPS = "a zero of 0"
"""Stored as -1, that is 15, in ``gptq``: where programs differ. Here and in auto-gptq's first linear it is 0 again; its
later one makes it 16, and GPTQModel lets it carry into the next. Symmetric weights have none."""

SAME_WEIGHTS = 4e-6
"""Of the largest logit: F32 sums by two programs over the same F16 weights. Measured: at most 1.2e-6."""
ROUNDED_WEIGHTS = 3e-3
"""The same for the median token, with weights rounded to BF16 here and to F16 there, and the other's model in F32 or in
F16. Measured: 0.8e-3 to 1.5e-3. One token in 50 may be sent to another expert, and is then apart by more."""
SAME_TOKEN = 0.97
"""Share of places where the likeliest token is then the same. Measured: 0.99 and more."""


def run(variable: str, *arguments: object) -> None:
    """A program in the environment that ``variable`` names."""
    command = [os.environ[variable], *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


# --- values -----------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Every combination of what a config may say, with all codes, zeros and sizes of scale; one that ends in a short
    group; and ``WRAPS``."""
    generator = torch.Generator().manual_seed(0)
    for bits, group_size, act_order, zero_offset in product(BITS, GROUPS, (False, True), (1, 0)):
        name = f"{bits}-{group_size}-{'act' if act_order else 'none'}-{zero_offset}"
        yield case(generator, name, bits, group_size, K, act_order=act_order, zero_offset=zero_offset)
        if zero_offset:
            yield case(generator, f"{name}-symmetric", bits, group_size, K, act_order=act_order, symmetric=True)
    yield case(generator, "short group", 4, 128, 320)
    yield case(generator, WRAPS, 4, 128, K, zero_from=0)


def case(
    generator: torch.Generator,
    name: str,
    bits: int,
    group_size: int,
    k: int,
    *,
    act_order: bool = False,
    zero_offset: int = 1,
    symmetric: bool = False,
    zero_from: int | None = None,
) -> Case:
    """A weight [N, k] with zeros from ``zero_from``, by default the first that is not stored as -1. See ``WRAPS``."""
    size = k if group_size == -1 else group_size
    g_idx = torch.arange(k, dtype=torch.int32) // size
    groups = int(g_idx[-1]) + 1
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    codes = torch.randint(0, 1 << bits, (N, k), generator=generator, dtype=torch.uint8)
    first = zero_offset if zero_from is None else zero_from
    zeros = torch.randint(first, 1 << bits, (groups, N), generator=generator)
    stored = ((zeros - zero_offset) % (1 << bits)).to(torch.uint8)
    qzeros = pack_zeros(groups, N, bits) if symmetric else pack(stored, bits).t().contiguous()
    # Down to the smallest F16, where products are subnormal, and up to where none overflows.
    scales = torch.exp2(torch.rand(groups, N, generator=generator) * 31 - 24).half()
    return Case(name, bits, group_size, zero_offset, pack(codes, bits), qzeros, scales, g_idx)


def values(case: Case) -> torch.Tensor:
    return dequant(**case.tensors(), bits=case.bits, zero_offset=case.zero_offset, dtype=torch.float16)


def require_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    different = {
        name: int((weight.view(torch.int16) != expected[name.removesuffix("/old")].view(torch.int16)).sum())
        for name, weight in found.items()
    }
    assert not {name: count for name, count in different.items() if count}


@WANTED[AUTOGPTQ]
def test_autogptq_gives_the_same_f16(tmp_path: Path) -> None:
    ours = [case for case in cases() if case.zero_offset]
    write_cases(tmp_path / "cases", ours)
    run(AUTOGPTQ, HERE / "peer_autogptq.py", tmp_path / "cases", tmp_path / "out")
    found = load_file(tmp_path / "out")
    assert {name for name in found if not name.endswith("/old")} == {case.name for case in ours}
    assert sum(name.endswith("/old") for name in found) >= len(BITS) * len(GROUPS)
    del found[WRAPS]
    require_same_bits(found, {case.name: values(case) for case in ours})


@WANTED[GPTQMODEL]
def test_gptqmodel_gives_the_same_f16(tmp_path: Path) -> None:
    ours = [case for case in cases() if case.name != WRAPS]
    write_cases(tmp_path / "cases", ours)
    run(GPTQMODEL, HERE / "peer_gptqmodel.py", "dequantize", tmp_path / "cases", tmp_path / "out")
    found = load_file(tmp_path / "out")
    assert found.keys() == {case.name for case in ours}
    require_same_bits(found, {case.name: values(case) for case in ours})


# --- a checkpoint -----------------------------------------------------------------------------------------------------


QUANTIZED = {
    "int4 experts": (Settings(), 2 * 17 * 3, 0.25),
    "int8 all": (Settings(bits=8, group_size=-1, scope="all"), 2 * 17 * 3 + 3 + 3 * 5, 0.018),
}
"""Settings; the weights that they quantize: 2 layers of 16 experts and a shared one, a dense MLP, 3 attentions; and
what the median weight may change by, |W - Q| / |W|, so that both reading the same is not enough. Measured: 0.173 and
0.0116; with zeros that are one off, 0.380 and 0.0268."""


@pytest.fixture(scope="module", params=QUANTIZED)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pico, quantized by weightkit."""
    folder: Path = tmp_path_factory.mktemp("pico") / request.param
    settings, text = QUANTIZED[request.param][0], default_calibration("pico")
    quantize(PICO, folder, settings, calibration=text, samples=8, seq_len=128, device="cpu", progress=False)
    return folder


def stored_weights(folder: Path) -> dict[str, Case]:
    """The quantized weights by name, read by safetensors alone."""
    told = json.loads((folder / "quantize_config.json").read_text())
    assert told == json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = read(folder)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {
        f"{module}.weight": Case(
            f"{module}.weight", told["bits"], told["group_size"], 1, *(tensors[f"{module}.{leaf}"] for leaf in LEAVES)
        )
        for module in modules
    }


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(scope="module")
def in_f32(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """All weights under their published names, as weightkit casts the checkpoint to F32: no value is rounded."""
    return cast_to_f32(quantized, tmp_path_factory.mktemp("pico") / "f32")


def cast_to_f32(folder: Path, target: Path) -> dict[str, torch.Tensor]:
    write(cast(open_checkpoint(folder), "f32"), target, device="cpu", progress=False)
    return read(target)


@pytest.mark.parametrize(
    "peer", [pytest.param(peer, marks=mark, id=peer.split("_")[1].lower()) for peer, mark in WANTED.items()]
)
def test_a_peers_linears_hold_the_weights_that_cast_gives(
    peer: str, quantized: Path, in_f32: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ours = stored_weights(quantized)
    _, count, most_change = QUANTIZED[quantized.name]
    assert len(ours) == count
    write_cases(tmp_path / "cases", ours.values())
    program = {AUTOGPTQ: ["peer_autogptq.py"], GPTQMODEL: ["peer_gptqmodel.py", "dequantize"]}[peer]
    run(peer, HERE / program[0], *program[1:], tmp_path / "cases", tmp_path / "out")
    found = load_file(tmp_path / "out")
    assert ours.keys() <= found.keys()
    require_same_bits(found, {name: in_f32[name].half() for name in ours})
    source = cast_to_f32(PICO, tmp_path / "source")
    changed = [float((found[name].float() - source[name]).norm() / source[name].norm()) for name in ours]
    assert median(changed) < most_change


@WANTED[GPTQMODEL]
def test_gptqmodel_loads_the_checkpoint_and_gives_our_logits(
    quantized: Path, in_f32: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ids = torch.randint(3, 512, (4, 48), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, tmp_path / "ids")
    run(GPTQMODEL, HERE / "peer_gptqmodel.py", "logits", quantized, tmp_path / "ids", tmp_path / "out")
    theirs = load_file(tmp_path / "out")
    largest = theirs["f32"].abs().max()

    arch = Architecture.from_config(open_checkpoint(quantized).config)
    integers = stored_weights(quantized)
    as_stored = {name: weight.half().float() if name in integers else weight for name, weight in in_f32.items()}
    ours = Model(arch, TensorWeights(as_stored))(ids)
    with CheckpointWeights(open_checkpoint(quantized), device="cpu") as weights:
        as_generated = Model(arch, weights)(ids)

    assert (ours - theirs["f32"]).abs().max() < SAME_WEIGHTS * largest
    for found in theirs.values():
        apart = (as_generated - found).abs().amax(-1) / largest
        assert apart.median() < ROUNDED_WEIGHTS
        assert (as_generated.argmax(-1) == found.argmax(-1)).float().mean() > SAME_TOKEN
