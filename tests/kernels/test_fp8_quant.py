"""FP8 quantization: codes against torch's conversion, scales that give dequantized values back, three equal paths."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gemm_cases import compiled

from weightkit.errors import PlanError
from weightkit.kernels import fp8_quant, fp8_quant_reference
from weightkit.kernels.fp8_quant_cpu import quantize_cpu

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def from_fp8(dtype: torch.dtype, rows: int = 300, columns: int = 200, seed: int = 0) -> torch.Tensor:
    """A matrix as a cast makes it of FP8 codes and scales; block [1, 0] holds no large code, a row is all zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == 0x7F] = 0
    codes[128:256, :128] %= 0x60
    codes[5:6] = 0
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) * 0.002 + 0.0005
    each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    return (codes.view(torch.float8_e4m3fn).float() * each).to(dtype)


def rounded_up_to_powers_of_two(dtype: torch.dtype) -> torch.Tensor:
    """A matrix as ``from_fp8``'s, whose scales leave a significand just enough below a power of two to round up."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
    generator = torch.Generator().manual_seed(14)
    shares = (1 - torch.arange(1, 9)[:, None] / 100) * 2.0 ** -(bits + 1)  # of half a place there
    scales = (2.0**-7 / (torch.arange(8, 16) / 8) * (1 - shares.double())).float()
    codes = torch.randint(0, 256, (8 * 128, 8 * 128), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == 0x7F] = 0
    return dequantized(codes, scales, dtype)


def all_codes_by_each_scale(count: int) -> torch.Tensor:
    """BF16 [1, 128 * count]: all codes times ``count`` scales, evenly through an octave."""
    mantissas = torch.arange(count, dtype=torch.int32) * ((1 << 23) // count) + torch.arange(count) % 61
    scales = ((116 << 23) + mantissas.int()).view(torch.float32)
    codes = torch.arange(128, dtype=torch.uint8)
    codes[0x7F] = 0x80
    return (codes.view(torch.float8_e4m3fn).float() * scales[:, None]).to(torch.bfloat16).view(1, -1)


TWO_CODES_A_VALUE = {
    torch.bfloat16: [(0x109B5, [104, 88, 87]), (0x1A7D, [120, 119, 117])],
    torch.float16: [(0x3332A19A, [96, 95, 94])],
}
"""Scales and codes of blocks, subnormal numbers all: the nearest code to a value by largest / 448 is another."""


def small_blocks(dtype: torch.dtype) -> torch.Tensor:
    """[1, 128 * 96]: blocks of some codes, by scales with which values, or a scale shifted to them, are subnormal."""
    generator = torch.Generator().manual_seed(15)
    tops = torch.randint(1, 127, (96, 1), generator=generator)
    spans = torch.randint(1, 127, (96, 1), generator=generator)
    codes = (tops - torch.randint(0, 1 << 20, (96, 128), generator=generator) % spans).clamp(min=0).to(torch.uint8)
    codes[::3, 3:] = 0
    least, most = {torch.bfloat16: (-141, -118), torch.float16: (-31, -12), torch.float32: (-149, -117)}[dtype]
    exponents = torch.randint(least, most, (96,), generator=generator)
    scales = ((1 + torch.rand(96, generator=generator)).double() * 2.0 ** exponents.double()).float()
    for i, (bits, few) in enumerate(TWO_CODES_A_VALUE.get(dtype, [])):
        scales[-i - 1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        codes[-i - 1] = torch.tensor(few * 64)[:128]
    return dequantized(codes.view(1, -1), scales[None], dtype)


def blocks_with_one_scale_beside_the_middle() -> torch.Tensor:
    """F16 [1, 256]: subnormals among the values leave one point, no F32, of which but one neighbour explains all."""
    codes = torch.zeros(2, 128, dtype=torch.uint8)
    codes[:, :10] = torch.tensor([0x77, 3, 0x76, 0x75, 0x74, 0x73, 0x72, 0x71, 0x70, 0xF7])
    scales = torch.tensor([0x3B7FAAAA, 0x3AFFAAAA], dtype=torch.int32).view(torch.float32)
    codes[1, 1] = 6
    return dequantized(codes.view(1, -1), scales[None], torch.float16)


def dequantized(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: codes.shape[0], : codes.shape[1]]
    return (codes.view(torch.float8_e4m3fn).float() * each).to(dtype)


def on_cpu(values: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    raw = values.contiguous().view(torch.uint8).numpy().reshape(-1)
    codes, scales = quantize_cpu(raw, tuple(values.shape), DTYPES[values.dtype], power_of_two=power_of_two)
    return torch.from_numpy(codes), torch.from_numpy(scales)


def cases(dtype: torch.dtype) -> list[torch.Tensor]:
    plain = torch.randn(130, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    odd = plain.clone()
    odd[3, 4] = odd[5, 6] = float("nan")
    bits = odd.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[5, 6] |= torch.iinfo(bits.dtype).min  # a sign, which torch gives no NaN of BF16
    odd[:128, 128:256] = 0
    odd[128:, 128:256] *= 2.0**-146  # in F32 too small for a scale, else 0
    return [from_fp8(dtype), rounded_up_to_powers_of_two(dtype)[:256, -128:].contiguous(), plain, odd]


def test_every_code_and_many_values_are_encoded_as_torch_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    assert torch.equal(fp8_quant_reference.encode_e4m3(fp8_quant_reference.decode_e4m3(codes)), codes)
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(2))
    values = (values * torch.exp(3 * torch.randn(200_000))).clamp(-448, 448)
    assert torch.equal(fp8_quant_reference.encode_e4m3(values), values.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_came_from_fp8_are_given_back(dtype: torch.dtype) -> None:
    for values in (from_fp8(dtype), rounded_up_to_powers_of_two(dtype)):
        assert torch.equal(dequantized(*on_cpu(values, power_of_two=False), dtype), values)


def test_whatever_the_scale_values_are_given_back() -> None:
    """Close ends of intervals, ties, values that are rounded up to powers of two: some scales meet each."""
    values = all_codes_by_each_scale(1 << 15)
    codes, scales = on_cpu(values, power_of_two=False)
    back = (codes.view(torch.float8_e4m3fn).view(-1, 128).float() * scales.view(-1, 1)).to(torch.bfloat16)
    assert torch.equal(back.view(1, -1).view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_too_small_for_one_scale_each_are_given_back(dtype: torch.dtype) -> None:
    values = small_blocks(dtype)
    assert torch.equal(dequantized(*on_cpu(values, power_of_two=False), dtype), values)
    assert_equals_the_reference(values[:, : 128 * 12].contiguous())


def test_a_scale_beside_the_middle_is_found() -> None:
    values = blocks_with_one_scale_beside_the_middle()
    assert torch.equal(dequantized(*on_cpu(values, power_of_two=False), torch.float16), values)
    assert_equals_the_reference(values)


def test_the_scale_of_a_block_with_inf_is_inf() -> None:
    values = torch.ones(1, 256)
    values[0, 3] = -torch.inf
    for power_of_two in (False, True):
        assert on_cpu(values, power_of_two)[1][0, 0] == torch.inf
        assert fp8_quant_reference.quantize_reference(values, power_of_two=power_of_two)[1][0, 0] == torch.inf


def test_other_values_are_rounded_to_the_nearest_code_of_the_largest_scale() -> None:
    values = cases(torch.bfloat16)[2]
    codes, scales = on_cpu(values, power_of_two=False)
    assert torch.equal(scales[0, 0], values[:128, :128].float().abs().max() / 448)
    each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :300]
    assert torch.equal(codes, (values.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def test_powers_of_two() -> None:
    values = cases(torch.float32)[2]
    _, scales = on_cpu(values, power_of_two=True)
    exact = values[:128, :128].abs().max() / 448
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))
    assert exact <= scales[0, 0] < 2 * exact
    for above in (0.0, 2.0**-22, 2.0**-20):  # by which the logarithm is hardly larger
        assert_equals_the_reference(torch.full((1, 1), 448 * 2.0**-20 * (1 + above)))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_loop_equals_the_reference(dtype: torch.dtype, power_of_two: bool) -> None:
    for values in cases(dtype):
        codes, scales = on_cpu(values, power_of_two)
        expected_codes, expected_scales = fp8_quant_reference.quantize_reference(values, power_of_two=power_of_two)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(scales, expected_scales)


def assert_equals_the_reference(values: torch.Tensor) -> None:
    for power_of_two in (False, True):
        codes, scales = on_cpu(values, power_of_two)
        expected_codes, expected_scales = fp8_quant_reference.quantize_reference(values, power_of_two=power_of_two)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(codes, expected_codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_pattern(dtype: torch.dtype) -> None:
    """In blocks that hold all magnitudes, and in blocks that hold some hundred neighbours, subnormals among them."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[torch.isfinite(patterns)]
    patterns = patterns[patterns.float().abs().argsort(stable=True)]
    for start in (0, 300, 1500, len(patterns) - 512):
        assert_equals_the_reference(patterns[start : start + 512].view(4, 128))
    mixed = patterns[torch.randperm(len(patterns), generator=torch.Generator().manual_seed(5))]
    assert_equals_the_reference(mixed[: len(mixed) // 250 * 250].view(-1, 250))


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_ties_of_the_codes(dtype: torch.dtype) -> None:
    codes = fp8_quant_reference.decode_e4m3(torch.arange(127, dtype=torch.uint8))
    between = (codes[1:] + codes[:-1]) / 2
    generator = torch.Generator().manual_seed(6)
    for exponent in (-140, -20, -3):
        values = between[torch.randint(0, 126, (128, 256), generator=generator)]
        values[0, 0] = values[0, 128] = 448
        values = (values * 2.0 ** (exponent / 2) * 2.0 ** (exponent / 2)).to(dtype)
        bits = values.view(torch.int32 if dtype == torch.float32 else torch.int16)
        near = torch.randint(-1, 2, bits.shape, generator=generator).to(bits.dtype)
        bits += near.masked_fill_(bits == 0, 0)
        assert_equals_the_reference(values)


@pytest.mark.parametrize("shape", [(1, 1), (7, 1300), (129, 300), (3, 1151)], ids=str)
def test_shapes(shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    assert_equals_the_reference(values.to(torch.bfloat16))
    assert_equals_the_reference(from_fp8(torch.float32, *shape))


def test_scales_below_the_least_of_f32_are_one() -> None:
    values = torch.zeros(2, 130)
    values[0, :24] = torch.arange(200, 224) * 2.0**-149  # more in an octave than there are codes
    values[1, 129] = 2.0**-140
    codes, scales = on_cpu(values, power_of_two=False)
    assert scales[0, 0] == 1
    assert 0 < scales[0, 1] < 2**-147
    assert torch.equal(codes != 0, values == 2.0**-140)
    assert_equals_the_reference(values)


def test_values_with_gaps_are_refused() -> None:
    with pytest.raises(PlanError, match="contiguous"):
        fp8_quant.quantize(torch.zeros(128, 256).t())


def test_the_kernel_is_launched_on_the_device_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the thread's current one, which may be another."""
    events: list[object] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: events.append(grid)

    @contextlib.contextmanager
    def on_device(tensor: torch.Tensor) -> Iterator[None]:
        events.append(tensor)
        yield
        events.append("left")

    monkeypatch.setattr(fp8_quant, "_quantize_kernel", Kernel())
    monkeypatch.setattr(fp8_quant, "on_device", on_device)
    values = torch.zeros(130, 300)
    fp8_quant.quantize(values)
    assert events[0] is values
    assert events[1:] == [(6,), "left"]


def hard_blocks(dtype: torch.dtype, columns: int, tiny: float = 2.0**-120) -> torch.Tensor:
    """Few codes, zeros first, one value that no scale explains, powers of two, zeros of both signs, extremes."""
    generator = torch.Generator().manual_seed(11)
    rows = [from_fp8(dtype, 128, columns, seed=seed) for seed in range(7)]
    rows[0] = torch.randint(-2, 3, (128, columns), generator=generator).to(dtype) * 0.5
    rows[1][:8] = -0.0
    rows[2][127, ::128] *= 1.01
    rows[3] = (rows[3].float() * 0).to(dtype)
    codes = torch.randint(0, 0x7E, (128, columns), dtype=torch.uint8, generator=generator)
    rows[4] = dequantized(codes, torch.full((1, -(-columns // 128)), 0.25), dtype)
    if dtype != torch.float16:
        rows[5] = rows[5] * tiny
        rows[6] = rows[6] * 2.0**120
    return torch.cat(rows)


def blocks_of_each_candidate() -> torch.Tensor:
    """BF16 blocks of codes with each of the eight significands as the largest, zeros of both signs, small codes."""
    generator = torch.Generator().manual_seed(12)
    blocks = []
    for candidate in fp8_quant_reference.CANDIDATES:
        codes = torch.randint(0, 0x7E, (128, 128), dtype=torch.uint8, generator=generator)
        codes[3:] %= 0x28  # subnormal codes among them, and zeros
        codes = torch.where(fp8_quant_reference.decode_e4m3(codes) > candidate, codes - 8, codes)
        codes[0, 0] = fp8_quant_reference.encode_e4m3(torch.tensor([candidate]))
        codes |= torch.randint(0, 2, (128, 128), dtype=torch.uint8, generator=generator) << 7
        scale = torch.rand(1, 1, generator=generator) * 0.01 + 1e-4
        blocks.append(dequantized(codes, scale, torch.bfloat16))
    blocks.append(blocks[0].clone())
    blocks[-1][127, 127] = 1.01 * blocks[0].abs().max() / 2  # the sample promises a scale that this one denies
    return torch.cat(blocks, dim=1)


INTERPRETED = """
import sys; sys.path.insert(0, {tests!r})
import torch
import test_fp8_quant as t
from weightkit.kernels import fp8_quant

def check(values, name):
    for power in (False, True):
        got, wanted = fp8_quant.quantize(values, power_of_two=power), t.on_cpu(values, power)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1]), (name, values.dtype, power)

for dtype in t.DTYPES:
    for i, values in enumerate(t.cases(dtype)):
        check(values, i)
for dtype in (torch.float16, torch.float32):
    check(t.small_blocks(dtype)[:, -256:].contiguous(), "small")
check(t.blocks_with_one_scale_beside_the_middle(), "beside the middle")
check(t.hard_blocks(torch.bfloat16, 136, 2.0**-60), "hard")  # subnormal BF16 is not converted rightly here
check(t.blocks_of_each_candidate(), "candidates")
check(t.from_fp8(torch.bfloat16, 130, 135), "odd width")
check(t.from_fp8(torch.bfloat16, 130, 136).view(-1)[1:17409].view(128, 136), "odd address")
print("equal")
"""


FRACTIONS = """
import itertools, torch, triton, triton.language as tl
from weightkit.kernels import fp8_quant

@triton.jit
def kernel(ends, sizes, above, below, n, N: tl.constexpr):
    i = tl.arange(0, N)
    bound = fp8_quant._bound(tl.load(ends + i, mask=i < n, other=8.0), tl.load(sizes + i, mask=i < n, other=8.0))
    numerator, denominator = fp8_quant._fraction(bound)
    tl.store(above + i, numerator, mask=i < n)
    tl.store(below + i, denominator, mask=i < n)

ends, sizes = zip(*itertools.product([(2 * w + d) * 2.0**-30 for w in range(128, 256) for d in (-1, 1, -0.5)],
                                     [m * 2.0**e for m in range(8, 16) for e in (-12, -9, 0, 5)]))
ends, sizes = torch.tensor(ends), torch.tensor(sizes)
above, below = torch.zeros_like(ends), torch.zeros_like(ends)
kernel[(1,)](ends, sizes, above, below, len(ends), 8192)
assert torch.equal(above.double() * sizes.double(), below.double() * ends.double())
print("exact")
"""


def test_the_kernel_equals_it_too_as_the_interpreter_runs_it(tmp_path: Path) -> None:
    code = INTERPRETED.format(tests=os.path.dirname(__file__))  # noqa: PTH120
    assert interpreted(code, tmp_path) == "equal"


def test_ends_of_intervals_are_told_apart_exactly(tmp_path: Path) -> None:
    """All that there are of BF16 and E4M3, of which the kernel keeps an approximation and the significand."""
    assert interpreted(FRACTIONS, tmp_path) == "exact"


def interpreted(code: str, folder: Path) -> str:
    path = folder / "code.py"
    path.write_text(code)  # Triton reads kernels' source
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_a_scale_that_gives_a_value_back_gives_its_code() -> None:
    """Why the codes by which the kernel checks a scale are the block's: all codes, both signs, many scales."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    generator = torch.Generator().manual_seed(13)
    mantissas = torch.cat([torch.randint(0, 1 << 23, (4000,), generator=generator), torch.arange(-40, 40) % (1 << 23)])
    scales = ((117 << 23) + mantissas).to(torch.int32).view(torch.float32)[:, None]
    values = (fp8_quant_reference.decode_e4m3(codes) * scales).to(torch.bfloat16).float()
    assert torch.equal(
        fp8_quant_reference.encode_e4m3((values / scales).clamp(-448, 448)), codes.expand(len(scales), -1)
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "power_of_two"),
    [(80, torch.bfloat16, False), (80, torch.float32, True), (89, torch.bfloat16, False), (90, torch.bfloat16, False),
     (90, torch.bfloat16, True), (90, torch.float16, False)],
)  # fmt: skip
def test_it_compiles_without_a_gpu(capability: int, dtype: torch.dtype, power_of_two: bool) -> None:
    """Through to machine code, with the conversions and packed loads that a GPU of this capability has."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set")
    brain, fp8 = dtype == torch.bfloat16, capability >= 89
    constants: dict[str, object] = {
        **fp8_quant._OPTIONS,
        "MANTISSA": fp8_quant.MANTISSA_BITS[dtype], "LEAST": fp8_quant.LEAST_EXPONENT[dtype],
        "POWER_OF_TWO": power_of_two, "PAIRS": brain, "FP8": fp8, "BLOCK": 128, "PART": 4,
    }  # fmt: skip
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    pointers = {"values": element, "codes": "*u8", "scales": "*fp32"}
    ptx = compiled(fp8_quant._quantize_kernel, constants, pointers, capability, fp8_quant._LAUNCH[fp8]["num_warps"], 3)
    assert ("e4m3x2" in ptx) == (brain and fp8)
    pairs = set(re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32 +(%rs\d+)", ptx))
    assert not pairs & set(re.findall(r"shr\.u16 +\S+ (%rs\d+), 8", ptx.replace("\t", " ")))  # see _code_of
    assert ("max.NaN.xorsign.abs.bf16x2" in ptx) == (brain and fp8)
    if brain:
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
        assert re.search(r"st\.global\S*\.v[24]\.b(16|32)", ptx)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_equals_it_too_on_a_gpu(dtype: torch.dtype) -> None:
    for values in [*cases(dtype), rounded_up_to_powers_of_two(dtype), from_fp8(dtype, 2048, 7168, seed=3)]:
        for power in (False, True):
            codes, scales = fp8_quant.quantize(values.cuda(), power_of_two=power)
            wanted = on_cpu(values, power)
            assert torch.equal(codes.cpu(), wanted[0])
            assert torch.equal(scales.cpu(), wanted[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_whatever_the_scale_a_gpu_finds_it_too() -> None:
    assert_equal_on_a_gpu(all_codes_by_each_scale(1 << 19))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_that_a_sample_says_too_little_of(dtype: torch.dtype) -> None:
    values = hard_blocks(dtype, 1000)
    if dtype == torch.bfloat16:
        assert_equal_on_a_gpu(blocks_of_each_candidate())
    if dtype == torch.float16:
        assert_equal_on_a_gpu(blocks_with_one_scale_beside_the_middle())
    assert_equal_on_a_gpu(small_blocks(dtype))
    assert_equal_on_a_gpu(values)


def assert_equal_on_a_gpu(values: torch.Tensor) -> None:
    for power in (False, True):
        codes, scales = fp8_quant.quantize(values.cuda(), power_of_two=power)
        wanted = on_cpu(values, power)
        assert torch.equal(scales.cpu(), wanted[1])
        assert torch.equal(codes.cpu(), wanted[0])


def test_nan_has_its_code_and_does_not_spoil_its_block() -> None:
    values = cases(torch.float32)[3]
    codes, scales = on_cpu(values, power_of_two=False)
    assert (codes[3, 4], codes[5, 6]) == (0x7F, 0xFF)
    assert np.isfinite(scales.numpy()).all()
    assert (codes & 0x7F == 0x7F).sum() == 2
