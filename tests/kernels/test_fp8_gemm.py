"""Products with FP8 weights: each weight bit for bit, sums within the bound of their order, the same in every run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from dequant_cases import SPECIAL_SCALES, random_operands
from gemm_cases import assert_within_bound, compiled
from interpreted import interpreted_copy, on_gpu

from weightkit.errors import PlanError, ScaleError
from weightkit.kernels import fp8_gemm, partial_sums
from weightkit.kernels.fp8_dequant import dequant_reference
from weightkit.kernels.gemm_plan import TileConfig

# Codes and scales that are NaN are among the operands; numpy says so where it computes with them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SMALL = TileConfig(tokens=16, columns=32, depth=32, splits=1, num_warps=1, num_stages=2)
LEFT = TileConfig(tokens=16, columns=64, depth=64, splits=2, num_warps=4, num_stages=2, weights_left=True)
REAL_SHAPES = [(2048, 7168), (7168, 2048), (18432, 7168), (7168, 16384), (24576, 1536)]


@pytest.fixture(scope="session")
def interpreted_fp8() -> Iterator[ModuleType]:
    with interpreted_copy("fp8_gemm") as module:
        yield module


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, interpreted_fp8: ModuleType) -> ModuleType:
    """The module under test; tensors belong where ``device`` says."""
    if request.param == "interpreter":
        return interpreted_fp8
    return on_gpu(fp8_gemm)


@pytest.fixture
def device(kernels: ModuleType) -> torch.device:
    return torch.device("cpu" if kernels.interpreted() else "cuda")


def operands(n: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes without NaN, and scales of the size that checkpoints have."""
    codes, scale = random_operands(n, k)
    codes[(codes & 0x7F) == 0x7F] = 0
    return torch.from_numpy(codes).to(device), torch.from_numpy(scale).to(device)


def exact_weight(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return dequant_reference(codes, scale, torch.bfloat16).to(dtype)


def rows(count: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count * 7919 + k)
    return torch.randn(count, k, generator=generator).to(dtype).to(device)


def seen(found: torch.Tensor) -> list[int]:
    """The bits, on the host."""
    integers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[found.dtype.itemsize]
    return found.cpu().contiguous().view(integers).flatten().tolist()


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_each_weight_is_that_of_cast(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """The rows of a unit matrix bring out the weights: every code under scales that round every way, bit for bit."""
    finite = SPECIAL_SCALES[np.isfinite(SPECIAL_SCALES) & (np.abs(SPECIAL_SCALES) < 1e30)]
    finite = finite[(np.abs(finite) > 1e-30) | (finite == 0)]  # products below a normal number are the GPU's own matter
    codes = np.zeros((128 * len(finite), 8), np.uint8)
    every = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    codes.reshape(len(finite), -1)[:, : len(every)] = every
    scale = torch.from_numpy(finite.copy())[:, None].to(device)
    weight = torch.from_numpy(codes).to(device)
    unit = torch.eye(8, dtype=dtype, device=device)
    found = kernels.fp8_linear(unit, weight, scale, config=SMALL)
    assert seen(found) == seen(exact_weight(weight, scale, dtype).T + 0.0)  # a sum has no -0


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, SMALL, LEFT], ids=["default", "small", "left"])
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize(("n", "k"), [(136, 328)])
def test_products_at_sizes_that_are_no_multiple_of_tiles(
    kernels: ModuleType, device: torch.device, n: int, k: int, tokens: int, config: TileConfig | None
) -> None:
    codes, scale = operands(n, k, device)
    x = rows(tokens, k, torch.bfloat16, device)
    found = kernels.fp8_linear(x, codes.view(torch.float8_e4m3fn), scale, config=config)
    assert_within_bound(found, x, exact_weight(codes, scale, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    codes, scale = operands(40, 288, device)
    x = rows(3, 288, dtype, device)
    found = kernels.fp8_linear(x.view(3, 1, 288), codes, scale)
    assert found.dtype == dtype
    assert found.shape == (3, 1, 40)
    assert_within_bound(found[:, 0], x, exact_weight(codes, scale, dtype))


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits_give_the_same_sum_and_the_same_bits_again(
    kernels: ModuleType, device: torch.device, splits: int
) -> None:
    """Whole numbers are summed exactly in any order."""
    k, n = 640, 40
    random = np.random.default_rng(splits)
    whole = torch.from_numpy(random.integers(-4, 5, (n, k))).float()
    codes = whole.to(torch.float8_e4m3fn).view(torch.uint8).to(device)
    scale = torch.full((1, 5), 0.25, device=device)
    config = TileConfig(16, 32, 64, splits, 1, 2)
    x = torch.from_numpy(random.integers(-3, 4, (3, k))).to(device, torch.bfloat16)
    found = kernels.fp8_linear(x, codes, scale, config=config)
    assert seen(found) == seen((x.double().cpu() @ whole.double().T * 0.25).bfloat16())
    uneven = rows(3, k, torch.bfloat16, device)
    first = kernels.fp8_linear(uneven, codes, scale, config=config)
    assert seen(kernels.fp8_linear(uneven, codes, scale, config=config)) == seen(first)


def test_weights_that_are_no_numbers_show(kernels: ModuleType, device: torch.device) -> None:
    codes, scale = operands(136, 256, device)
    codes[3, 5], codes[4, 200], scale[1, 0] = 0x7F, 0xFF, torch.inf
    found = kernels.fp8_linear(rows(2, 256, torch.bfloat16, device), codes, scale, config=SMALL)
    assert not found[:, [3, 4, *range(128, 136)]].isfinite().any()
    assert found[:, [0, 1, 2, *range(5, 128)]].isfinite().all()


def test_experts_each_take_their_rows(kernels: ModuleType, device: torch.device) -> None:
    """More rows than a tile has, none at all, rows that two share, and rows that nobody takes."""
    n, k = 40, 256
    whole, scales = operands(4 * 128, k, device)
    codes = [whole[128 * i : 128 * i + n] for i in range(4)]
    factors = [scales[i : i + 1] for i in range(4)]
    x = rows(24, k, torch.bfloat16, device)
    counts, starts = [18, 0, 2, 3], [0, 18, 16, 21]
    found = kernels.fp8_experts(x, codes, factors, counts, starts=starts, config=SMALL)
    each = [
        kernels.fp8_linear(x[start : start + count], c, s, config=SMALL)
        for c, s, start, count in zip(codes, factors, starts, counts, strict=True)
    ]
    assert seen(found) == seen(torch.cat(each))
    assert kernels.fp8_experts(x, codes, factors, [0] * 4).shape == (0, n)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 512, 1024])
@pytest.mark.parametrize(("n", "k"), REAL_SHAPES)
def test_real_shapes(n: int, k: int, tokens: int) -> None:
    codes, scale = operands(n, k, torch.device("cuda"))
    x = rows(tokens, k, torch.bfloat16, codes.device)
    found = fp8_gemm.fp8_linear(x, codes, scale)
    assert_within_bound(found, x, exact_weight(codes, scale, torch.bfloat16))
    for _ in range(3):
        assert torch.equal(fp8_gemm.fp8_linear(x, codes, scale), found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_weight_of_a_real_shape() -> None:
    codes, scale = operands(2048, 7168, torch.device("cuda"))
    expected = exact_weight(codes, scale, torch.bfloat16).T + 0.0
    unit = torch.eye(7168, dtype=torch.bfloat16, device="cuda")
    for config in (fp8_gemm.choose_config(1), fp8_gemm.choose_config(512)):
        assert torch.equal(fp8_gemm.fp8_linear(unit, codes, scale, config=config), expected)


# --- machine code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [False, True], ids=["linear", "experts"])
@pytest.mark.parametrize(
    ("capability", "tokens", "product"),
    [
        (80, 1, "mma.sync"),
        (80, 512, "mma.sync"),
        (89, 512, "mma.sync"),
        (90, 1, "mma.sync"),
        (90, 512, "wgmma"),
    ],
)
def test_compiles_for_gpus(capability: int, tokens: int, product: str, table: bool) -> None:
    """What the interpreter does not see: shapes that do not fit, loads of single codes, types that a GPU lacks."""
    if fp8_gemm.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    config = fp8_gemm.choose_config(tokens)
    constants = fp8_gemm._options("BF16", capability >= 89, config) | {
        "TABLE": table, "ALIGNED": True, "WHOLE": True, "OUT_KIND": "F32", "STEPS": 0, "STAGES": config.num_stages,
        "HARDWARE": True, "NATIVE": capability >= 89,
    }  # fmt: skip
    pointers = {"x": "*bf16", "codes": "*u8", "scales": "*fp32", "out": "*i32", "table": "*i64"}
    ptx = compiled(fp8_gemm._matrix_kernel, constants, pointers, capability, config.num_warps, config.num_stages)
    assert re.search(product, ptx)
    assert re.search(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x(10|8)", ptx)
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert ptx.count("bar.sync") <= 12  # weights stay in the registers they were made in
    assert ".ftz" not in ptx
    assert ("e4m3" in ptx) == (capability >= 89)


def test_the_sum_of_parts_compiles() -> None:
    if fp8_gemm.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    constants = {"KIND": "BF16", "HARDWARE": True, "SPLITS": 16, "BLOCK": 64}
    compiled(partial_sums._sum_kernel, constants, {"parts": "*fp32", "out": "*i16"}, 90, 4, 3)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_operands_that_do_not_fit() -> None:
    cpu = torch.device("cpu")
    codes, scale = operands(136, 256, cpu)
    x = rows(2, 256, torch.bfloat16, cpu)
    with pytest.raises(
        ScaleError, match=r"\[136, 256\].*expected torch.float32 \[2, 2\], found torch.float32 \[1, 2\]"
    ):
        fp8_gemm.fp8_linear(x, codes, scale[:1])
    with pytest.raises(PlanError, match=r"E4M3 codes.*torch\.int8"):
        fp8_gemm.fp8_linear(x, codes.view(torch.int8), scale)
    with pytest.raises(PlanError, match=r"activations .*\[..., 256\], found torch.bfloat16 \[2, 128\]"):
        fp8_gemm.fp8_linear(x[:, :128], codes, scale)
    with pytest.raises(PlanError, match="contiguous"):
        fp8_gemm.fp8_linear(x, codes, scale.t().contiguous().t())
    deep = TileConfig(16, 32, 256, 1, 1, 2)
    with pytest.raises(PlanError, match="columns and depth up to 128, found columns 32, depth 256"):
        fp8_gemm.fp8_linear(x, codes, scale, config=deep)
    with pytest.raises(PlanError, match=r"2 of each.*2 scales, 1 starts, 1 counts"):
        fp8_gemm.fp8_experts(x, [codes] * 2, [scale] * 2, [2])
    with pytest.raises(PlanError, match="matrices of one shape"):
        fp8_gemm.fp8_experts(x, [codes, codes[:128]], [scale] * 2, [1, 1])
    with pytest.raises(PlanError, match="no weights"):
        fp8_gemm.fp8_experts(x, [], [], [])


def test_on_a_cpu_the_reference_serves() -> None:
    if fp8_gemm.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    cpu = torch.device("cpu")
    codes, scale = operands(136, 256, cpu)
    x = rows(2, 256, torch.bfloat16, cpu)
    assert_within_bound(fp8_gemm.fp8_linear(x, codes, scale), x, exact_weight(codes, scale, torch.bfloat16))
    parts = fp8_gemm.fp8_experts(x, [codes] * 2, [scale] * 2, [1, 1])
    assert torch.equal(parts, fp8_gemm.fp8_linear_reference(x, codes, scale))
