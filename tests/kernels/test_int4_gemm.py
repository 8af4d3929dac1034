"""Products with GPTQ weights: each weight bit for bit, sums within the bound of their order, the same in every run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType

import gptq_cases
import numpy as np
import pytest
import torch
from gemm_cases import assert_within_bound, compiled
from interpreted import interpreted_copy, on_gpu

from weightkit.errors import PlanError, ScaleError
from weightkit.kernels import int4_gemm
from weightkit.kernels.gemm_plan import TileConfig, split_of

# Codes with scales that are Inf or NaN are among the operands; numpy says so where it computes with them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SMALL = TileConfig(tokens=16, columns=32, depth=16, splits=1, num_warps=1, num_stages=2)
REAL_SHAPES = [(2048, 7168), (7168, 2048), (18432, 7168), (7168, 16384), (24576, 1536)]


@pytest.fixture(scope="session")
def interpreted_int4() -> Iterator[ModuleType]:
    with interpreted_copy("int4_gemm") as module:
        yield module


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, interpreted_int4: ModuleType) -> ModuleType:
    """The module under test; tensors belong where ``device`` says."""
    if request.param == "interpreter":
        return interpreted_int4
    return on_gpu(int4_gemm)


@pytest.fixture
def device(kernels: ModuleType) -> torch.device:
    return torch.device("cpu" if kernels.interpreted() else "cuda")


def packed(codes: np.ndarray, bits: int, device: torch.device) -> torch.Tensor:
    """Codes [K, N] as they are stored."""
    return torch.from_numpy(gptq_cases.packed_rows(codes, bits)).to(device)


def operands(n: int, k: int, group_size: int, bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng([n, k, group_size + 1, bits])
    groups = 1 if group_size == -1 else -(-k // group_size)
    scales = (random.normal(size=(groups, n)) * 2e-3).astype(np.float16)
    codes = random.integers(0, 1 << bits, (k, n), dtype=np.uint8)
    return packed(codes, bits, device), torch.from_numpy(scales).to(device)


def exact_weight(
    qweight: torch.Tensor, scales: torch.Tensor, group_size: int, bits: int, zero: int, dtype: torch.dtype
) -> torch.Tensor:
    """[N, K] F32 by numpy: what the weight is in BF16, then in ``dtype``."""
    words = qweight.cpu().numpy().view(np.uint32)
    codes = np.stack([words >> np.uint32(bits * j) & np.uint32((1 << bits) - 1) for j in range(32 // bits)], 1)
    codes = codes.reshape(-1, words.shape[1]).astype(np.float32) - np.float32(zero)
    each = np.repeat(scales.cpu().numpy().astype(np.float32), len(codes) if group_size == -1 else group_size, 0)
    values = torch.from_numpy((codes * each[: len(codes)]).T.copy())
    return values.to(torch.bfloat16).to(dtype).float().to(qweight.device)


def rows(count: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count * 7919 + k)
    return torch.randn(count, k, generator=generator).to(dtype).to(device)


def seen(found: torch.Tensor) -> list[int]:
    """The bits, on the host."""
    return (
        found.cpu().contiguous().view(torch.int32 if found.dtype == torch.float32 else torch.int16).flatten().tolist()
    )


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_each_weight_is_that_of_cast(kernels: ModuleType, device: torch.device, bits: int, dtype: torch.dtype) -> None:
    """The rows of a unit matrix bring out the weights: every code under scales that round every way, bit for bit."""
    finite = [bit for bit in gptq_cases.SCALE_BITS if np.isfinite(np.array(bit, np.uint16).view(np.float16))]
    if dtype == torch.float16:  # whose range the products leave
        finite = [bit for bit in finite if bit & 0x7FFF < 0x5000]
    scales = torch.from_numpy(np.array([finite], np.uint16).view(np.float16).copy()).to(device)
    k = 1 << bits if bits == 8 else 32
    codes = np.repeat(np.arange(k)[:, None] % (1 << bits), len(finite), 1).astype(np.uint8)
    qweight = packed(codes, bits, device)
    unit = torch.eye(k, dtype=dtype, device=device)
    found = kernels.int4_linear(unit, qweight, scales, group_size=-1, bits=bits, config=SMALL)
    expected = exact_weight(qweight, scales, -1, bits, 1 << (bits - 1), dtype).T.to(dtype) + 0.0  # a sum has no -0
    assert seen(found) == seen(expected)


@pytest.mark.parametrize("zero", [0, 7, 15])
def test_any_zero(kernels: ModuleType, device: torch.device, zero: int) -> None:
    qweight, scales = operands(32, 32, 16, 4, device)
    unit = torch.eye(32, dtype=torch.bfloat16, device=device)
    found = kernels.int4_linear(unit, qweight, scales, group_size=16, zero=zero, config=SMALL)
    assert seen(found) == seen(exact_weight(qweight, scales, 16, 4, zero, torch.bfloat16).T.bfloat16() + 0.0)


def run_ptx(source: str, registers: dict[str, int]) -> dict[str, int]:
    """What a few instructions of PTX ISA 8.5 do, by its text, one thread's registers of 32 bits."""

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def bf16(bits: int) -> torch.Tensor:
        return torch.tensor(bits << 16, dtype=torch.int64).to(torch.int32).view(torch.float32).double()

    def half(bits: list[int], place: int) -> int:
        a, b, c = (bf16(bit >> 16 * place & 0xFFFF) for bit in bits)
        nearest = (a * b + c).float()  # exact: the operands have few bits
        assert torch.equal(nearest.double(), a * b + c)
        return int(nearest.bfloat16().view(torch.int16)) & 0xFFFF

    for line in source.splitlines():
        if not line.endswith(";") or line.startswith("."):
            continue
        operation, *operands = re.split(r"[ ,;]+", line.rstrip(";"))
        target, *inputs = operands
        v = [value(name) for name in inputs]
        if operation == "mov.b32":
            registers[target] = v[0]
        elif operation == "shr.b32":
            registers[target] = v[0] >> v[1]
        elif operation == "prmt.b32":
            eight = (v[1] << 32 | v[0]).to_bytes(8, "little")
            registers[target] = int.from_bytes([eight[v[2] >> 4 * i & 7] for i in range(4)], "little")
        elif operation == "lop3.b32" and v[3] == 0xEA:
            registers[target] = v[0] & v[1] | v[2]
        elif operation == "fma.rn.bf16x2":
            registers[target] = half(v, 0) | half(v, 1) << 16
        else:
            raise AssertionError(f"unknown instruction: {line}")
    return registers


@pytest.mark.parametrize("zero", [8, 0, 15])
def test_assembly_unpacks_two_words(zero: int) -> None:
    """The assembly, which no interpreter of Triton's runs, by its own text."""
    random = np.random.default_rng(zero)
    for bits in (0x3C01, 0x2E66, 0x9234, 0x03FF, 0x7BFF, 0x0001, 0x1555, 0x8000):
        scale = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
        high = scale.bfloat16()
        low = (scale - high.float()).bfloat16()
        pair = [0x10001 * (int(part.view(torch.int16)) & 0xFFFF) for part in (high, low)]
        words = random.integers(0, 2**32, 2).tolist()
        found = run_ptx(
            int4_gemm._unpack_assembly(zero), dict(zip(("$8", "$9", "$10", "$11"), [*words, *pair], strict=True))
        )
        for j in range(8):
            for place, word in enumerate(words):
                expected = (((word >> 4 * j & 15) - zero) * scale).bfloat16()
                bits_found = found[f"${j}"] >> 16 * place & 0xFFFF
                assert bits_found & 0x7FFF == int(expected.view(torch.int16)) & 0x7FFF  # a zero may have either sign
                assert bits_found == int(expected.view(torch.int16)) & 0xFFFF or expected == 0


def test_a_scale_in_two_parts_makes_the_same_weight() -> None:
    """All finite F16 scales with all differences of codes: every step of the assembly is exact but the last."""
    scale = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()[:, None]
    difference = torch.arange(-15, 16, dtype=torch.float32)[None, :]
    high = scale.bfloat16().float()
    low = scale - high
    assert torch.equal(low.bfloat16().float(), low)
    rest = difference * low
    assert torch.equal(rest.bfloat16().float(), rest)
    fused = (difference.double() * high + rest.double()).float()
    assert torch.equal(fused.double(), difference.double() * scale)
    assert torch.equal(fused.bfloat16(), (difference * scale).bfloat16())


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize(("n", "k"), [(72, 328)])
def test_products_at_sizes_that_are_no_multiple_of_tiles(
    kernels: ModuleType, device: torch.device, n: int, k: int, tokens: int, group_size: int
) -> None:
    qweight, scales = operands(n, k, group_size, 4, device)
    x = rows(tokens, k, torch.bfloat16, device)
    found = kernels.int4_linear(x, qweight, scales, group_size=group_size, config=SMALL)
    assert_within_bound(found, x, exact_weight(qweight, scales, group_size, 4, 8, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_other_dtypes_and_widths(kernels: ModuleType, device: torch.device, bits: int, dtype: torch.dtype) -> None:
    qweight, scales = operands(40, 288, 32, bits, device)
    x = rows(3, 288, dtype, device)
    found = kernels.int4_linear(x.view(3, 1, 288), qweight, scales, group_size=32, bits=bits)
    assert found.dtype == dtype
    assert found.shape == (3, 1, 40)
    assert_within_bound(found[:, 0], x, exact_weight(qweight, scales, 32, bits, 1 << (bits - 1), dtype))


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits_give_the_same_sum_and_the_same_bits_again(
    kernels: ModuleType, device: torch.device, splits: int
) -> None:
    """Whole numbers are summed exactly in any order."""
    k, n = 640, 40
    random = np.random.default_rng(splits)
    qweight = packed(random.integers(0, 16, (k, n), dtype=np.uint8), 4, device)
    scales = torch.full((5, n), 0.5, dtype=torch.float16, device=device)
    config = TileConfig(16, 32, 16, splits, 1, 2)
    x = torch.from_numpy(random.integers(-3, 4, (3, k))).to(device, torch.bfloat16)
    found = kernels.int4_linear(x, qweight, scales, group_size=128, config=config)
    exact = x.double() @ exact_weight(qweight, scales, 128, 4, 8, torch.bfloat16).double().T
    assert seen(found) == seen(exact.bfloat16())
    uneven = rows(3, k, torch.bfloat16, device)
    first = kernels.int4_linear(uneven, qweight, scales, group_size=128, config=config)
    assert seen(kernels.int4_linear(uneven, qweight, scales, group_size=128, config=config)) == seen(first)


def test_splits_cover_all_steps() -> None:
    cpu = torch.device("cpu")
    for steps in (1, 2, 7, 56, 224):
        for splits in (0, 1, 3, 8, 64, 500):
            split = split_of(TileConfig(splits=splits), 1, steps, cpu)
            assert split.parts * split.steps >= steps > (split.parts - 1) * split.steps
            assert split.parts <= 64


def test_scales_that_are_not_finite_show(kernels: ModuleType, device: torch.device) -> None:
    qweight, scales = operands(16, 32, 32, 4, device)
    scales[0, 3], scales[0, 5] = torch.inf, torch.nan
    found = kernels.int4_linear(rows(2, 32, torch.bfloat16, device), qweight, scales, group_size=32, config=SMALL)
    assert not found[:, [3, 5]].isfinite().any()
    assert found[:, [0, 1, 2, 4, 6]].isfinite().all()


def test_experts_each_take_their_rows(kernels: ModuleType, device: torch.device) -> None:
    """More rows than a tile has, none at all, rows that two share, and rows that nobody takes."""
    n, k = 40, 256
    weights = [operands(n, k + 8 * i, 128, 4, device) for i in range(4)]
    qweights, scales = [w[: k // 8].clone() for w, _ in weights], [s[: k // 128].clone() for _, s in weights]
    x = rows(24, k, torch.bfloat16, device)
    counts, starts = [18, 0, 2, 3], [0, 18, 16, 21]
    found = kernels.int4_experts(x, qweights, scales, counts, starts=starts, group_size=128, config=SMALL)
    assert found.shape == (23, n)
    each = [
        kernels.int4_linear(x[start : start + count], w, s, group_size=128, config=SMALL)
        for w, s, start, count in zip(qweights, scales, starts, counts, strict=True)
    ]
    assert seen(found) == seen(torch.cat(each))
    split = kernels.int4_experts(x[:5], qweights[:2], scales[:2], [3, 2], group_size=128)
    for part, w, s, own in ((split[:3], qweights[0], scales[0], x[:3]), (split[3:], qweights[1], scales[1], x[3:5])):
        assert_within_bound(part, own, exact_weight(w, s, 128, 4, 8, torch.bfloat16))
    assert kernels.int4_experts(x, qweights, scales, [0] * 4, group_size=128).shape == (0, n)


def test_reference_is_the_definition() -> None:
    cpu = torch.device("cpu")
    qweight, scales = operands(40, 264, 64, 4, cpu)
    x = rows(5, 264, torch.bfloat16, cpu)
    weight = exact_weight(qweight, scales, 64, 4, 8, torch.bfloat16)
    assert_within_bound(int4_gemm.int4_linear_reference(x, qweight, scales, group_size=64), x, weight)
    if not int4_gemm.interpreted():  # on a CPU the reference serves
        assert_within_bound(int4_gemm.int4_linear(x, qweight, scales, group_size=64), x, weight)
        parts = int4_gemm.int4_experts(x, [qweight] * 2, [scales] * 2, [2, 3], group_size=64)
        assert_within_bound(parts, x, weight)


def test_no_tokens_and_no_outputs(kernels: ModuleType, device: torch.device) -> None:
    qweight, scales = operands(16, 32, 32, 4, device)
    x = rows(2, 32, torch.bfloat16, device)
    assert kernels.int4_linear(x[:0], qweight, scales, group_size=32).shape == (0, 16)
    assert kernels.int4_linear(x, qweight[:, :0].contiguous(), scales[:, :0].contiguous(), group_size=32).shape == (
        2,
        0,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 512, 1024])
@pytest.mark.parametrize(("n", "k"), REAL_SHAPES)
def test_real_shapes(n: int, k: int, tokens: int) -> None:
    device = torch.device("cuda")
    qweight, scales = operands(n, k, 128, 4, device)
    x = rows(tokens, k, torch.bfloat16, device)
    found = int4_gemm.int4_linear(x, qweight, scales, group_size=128)
    assert_within_bound(found, x, exact_weight(qweight, scales, 128, 4, 8, torch.bfloat16))
    for _ in range(3):
        assert torch.equal(int4_gemm.int4_linear(x, qweight, scales, group_size=128), found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_weight_of_a_real_shape() -> None:
    qweight, scales = operands(2048, 7168, 128, 4, torch.device("cuda"))
    expected = exact_weight(qweight, scales, 128, 4, 8, torch.bfloat16).T.bfloat16() + 0.0
    unit = torch.eye(7168, dtype=torch.bfloat16, device="cuda")
    for config in (int4_gemm.choose_config(1), int4_gemm.choose_config(512)):
        assert torch.equal(int4_gemm.int4_linear(unit, qweight, scales, group_size=128, config=config), expected)


# --- machine code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [False, True], ids=["linear", "experts"])
@pytest.mark.parametrize(
    ("capability", "tokens", "product"),
    [(80, 1, "mma.sync"), (80, 512, "mma.sync"), (90, 1, "mma.sync"), (90, 512, "wgmma")],
)
def test_compiles_for_gpus(capability: int, tokens: int, product: str, table: bool) -> None:
    """What the interpreter does not see: shapes that do not fit, words loaded one by one."""
    if int4_gemm.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    config = int4_gemm.choose_config(tokens)
    constants = int4_gemm._options("BF16", 128, 4, 8, config) | {
        "TABLE": table, "ALIGNED": True, "OUT_KIND": "F32", "STEPS": 0, "STAGES": config.num_stages, "HARDWARE": True,
        "UNPACK": int4_gemm._unpack_assembly(8),
    }  # fmt: skip
    pointers = {"x": "*bf16", "qweight": "*i32", "scales": "*fp16", "out": "*i32", "table": "*i64"}
    ptx = compiled(int4_gemm._matrix_kernel, constants, pointers, capability, config.num_warps, config.num_stages)
    assert product in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)  # words, 16 bytes at a time
    assert "fma.rn.bf16x2" in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert ptx.count("bar.sync") <= 12  # weights stay in the registers they were made in


@pytest.mark.parametrize(("kind", "bits", "group_size"), [("F32", 4, 32), ("F16", 8, 32), ("BF16", 8, -1)])
def test_compiles_for_other_dtypes(kind: str, bits: int, group_size: int) -> None:
    if int4_gemm.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    config = int4_gemm.choose_config(1)
    constants = int4_gemm._options(kind, group_size, bits, 1 << (bits - 1), config) | {
        "TABLE": False, "ALIGNED": False, "OUT_KIND": kind, "STEPS": 0, "STAGES": config.num_stages, "HARDWARE": True,
    }  # fmt: skip
    value, out = {"F32": ("*fp32", "*i32"), "F16": ("*fp16", "*i16"), "BF16": ("*bf16", "*i16")}[kind]
    pointers = {"x": value, "qweight": "*i32", "scales": "*fp16", "out": out, "table": "*i32"}
    compiled(int4_gemm._matrix_kernel, constants, pointers, 80, config.num_warps, config.num_stages)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_operands_that_do_not_fit() -> None:
    cpu = torch.device("cpu")
    qweight, scales = operands(16, 64, 32, 4, cpu)
    x = rows(2, 64, torch.bfloat16, cpu)
    with pytest.raises(ScaleError, match=r"^scales does not fit .*expected torch.float16 \[2, 16\], found .*\[1, 16\]"):
        int4_gemm.int4_linear(x, qweight, scales[:1], group_size=32)
    with pytest.raises(ScaleError, match=r"^qweight does not fit"):
        int4_gemm.int4_linear(x, qweight.long(), scales, group_size=32)
    with pytest.raises(PlanError, match=r"activations .*\[..., 64\], found torch.bfloat16 \[2, 56\]"):
        int4_gemm.int4_linear(x[:, :56], qweight, scales, group_size=32)
    with pytest.raises(PlanError, match=r"torch\.float64"):
        int4_gemm.int4_linear(x.double(), qweight, scales, group_size=32)
    with pytest.raises(PlanError, match="power of two from 8, found 48"):
        int4_gemm.int4_linear(x, qweight, scales, group_size=48)
    with pytest.raises(PlanError, match="4 or 8 bits"):
        int4_gemm.int4_linear(x, qweight, scales, group_size=32, bits=3)
    with pytest.raises(PlanError, match="0 to 15, found 16"):
        int4_gemm.int4_linear(x, qweight, scales, group_size=32, zero=16)
    with pytest.raises(PlanError, match="contiguous"):
        int4_gemm.int4_linear(x, qweight.t().contiguous().t(), scales, group_size=32)
    with pytest.raises(PlanError, match=r"2 of each.*2 scales, 1 starts, 1 counts"):
        int4_gemm.int4_experts(x, [qweight] * 2, [scales] * 2, [2], group_size=32)
    with pytest.raises(PlanError, match=r"expert 1 .*rows within 0 to 2, found 1 from 2"):
        int4_gemm.int4_experts(x, [qweight] * 2, [scales] * 2, [2, 1], group_size=32)
    with pytest.raises(PlanError, match="no weights"):
        int4_gemm.int4_experts(x, [], [], [], group_size=32)
