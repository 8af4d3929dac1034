"""The Triton kernels equal their reference, and the reference the definition, bit for bit."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import product
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch
from dequant_cases import (
    DTYPES,
    SPECIAL_SCALES,
    assert_same_bits,
    bits_of,
    every_code_with,
    f32,
    random_operands,
    random_scales,
)

from weightkit.errors import DeviceError, PlanError, ScaleError
from weightkit.kernels import fp8_dequant
from weightkit.kernels.fp8_dequant import dequant_reference

# Numbers that overflow or are no numbers are what these tests are about; numpy warns of them under the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Operands = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]


def tensors(operands: Operands, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    weight, scale = operands
    return torch.from_numpy(weight).to(device), torch.from_numpy(scale.copy()).to(device)


def expected_bits(operands: Operands, dtype: str) -> npt.NDArray[np.uint16 | np.uint32]:
    return bits_of(dequant_reference(*tensors(operands, torch.device("cpu")), DTYPES[dtype]))


def test_a_mismatch_is_reported_with_its_place_and_values() -> None:
    found = np.full((2, 3), 0x3F80, np.uint16)
    expected = found.copy()
    expected[1, 2] = 0x4000
    with pytest.raises(AssertionError, match=r"1 of 6 BF16 .* \[1, 2\]: found 0x3f80 \(1.0\), expected 0x4000 \(2.0\)"):
        assert_same_bits(found, expected, "BF16")


# --- the reference ----------------------------------------------------------------------------------------------------


def e4m3_by_definition(code: int) -> Fraction | None:
    """OCP 8-bit floating point, E4M3: None for NaN."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return None
    magnitude = (
        Fraction(mantissa, 8) * Fraction(2) ** -6
        if exponent == 0
        else (1 + Fraction(mantissa, 8)) * (Fraction(2) ** (exponent - 7))
    )
    return -magnitude if sign else magnitude


def nearest_even(value: Fraction, mantissa_bits: int, exponent_bits: int) -> int:
    """The bits (without sign) of the binary float nearest to ``value`` >= 0, by rational arithmetic alone."""
    bias = 2 ** (exponent_bits - 1) - 1
    if not value:
        return 0
    exponent = max(1 - bias, value.numerator.bit_length() - value.denominator.bit_length() - 1)
    while value >= Fraction(2) ** (exponent + 1):
        exponent += 1
    units = value / Fraction(2) ** (exponent - mantissa_bits)
    count = round(units)  # Python rounds halves to even
    bits = count + ((exponent + bias - 1) << mantissa_bits)
    infinity = (2**exponent_bits - 1) << mantissa_bits
    return min(bits, infinity)


@pytest.mark.parametrize(("dtype", "mantissa_bits", "exponent_bits"), [("BF16", 7, 8), ("F16", 10, 5), ("F32", 23, 8)])
def test_reference_is_the_definition(dtype: str, mantissa_bits: int, exponent_bits: int) -> None:
    finite = SPECIAL_SCALES[np.isfinite(SPECIAL_SCALES)]
    operands = every_code_with(finite)
    found = expected_bits(operands, dtype)
    expected = np.empty_like(found)
    sign_bit = 1 << (mantissa_bits + exponent_bits)
    for column, scale in enumerate(finite):
        for code in range(256):
            value = e4m3_by_definition(code)
            if value is None:
                bits = sign_bit - 1
            else:
                product = nearest_even(abs(value * Fraction(float(scale))), 23, 8)
                infinite = product == 0x7F800000
                bits = (
                    (2**exponent_bits - 1) << mantissa_bits
                    if infinite
                    else nearest_even(Fraction(f32(product)), mantissa_bits, exponent_bits)
                )
                bits |= sign_bit if (code >= 128) != bool(np.signbit(scale)) else 0
            expected[code // 128, column * 128 + code % 128] = bits
    assert_same_bits(found, expected, dtype)


@pytest.mark.parametrize(("dtype", "nan"), [("BF16", 0x7FFF), ("F16", 0x7FFF), ("F32", 0x7FFFFFFF)])
def test_reference_has_one_nan(dtype: str, nan: int) -> None:
    not_finite = SPECIAL_SCALES[~np.isfinite(SPECIAL_SCALES)]
    operands = every_code_with(not_finite)
    found = expected_bits(operands, dtype).reshape(2, -1, 128).swapaxes(0, 1).reshape(-1, 256)
    for scale, row in zip(not_finite, found, strict=True):
        is_nan = row == nan
        expected_nan = np.isin(np.arange(256), [0x00, 0x80, 0x7F, 0xFF]) | np.isnan(scale)
        np.testing.assert_array_equal(is_nan, expected_nan)
        infinity = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
        assert set(row[~is_nan] & nan) <= {infinity}


# --- the kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_under_special_and_random_scales(kernels: ModuleType, device: torch.device, dtype: str) -> None:
    operands = every_code_with(np.concatenate([SPECIAL_SCALES, random_scales(220, seed=1)]))
    found = kernels.dequant(*tensors(operands, device), DTYPES[dtype])
    assert_same_bits(bits_of(found), expected_bits(operands, dtype), dtype)


# 576: kv_a_proj_with_mqa's rows; 10944 / 8: V2-Lite's odd half block, once a multiple of 8 alone; 77: of nothing.
SHAPES = [(1, 1), (1, 128), (127, 129), (128, 128), (130, 77), (576, 256), (129, 1368), (64, 10944), (300, 144)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(kernels: ModuleType, device: torch.device, shape: tuple[int, int]) -> None:
    operands = random_operands(*shape)
    found = kernels.dequant(*tensors(operands, device), torch.bfloat16)
    assert_same_bits(bits_of(found), expected_bits(operands, "BF16"), "BF16")


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        *product(({}, {"hardware_rounding": False}), DTYPES),
        # of outputs of two bytes and of four
        *product(
            ({"rows": 128, "col_blocks": 1}, {"rows": 1, "col_blocks": 16}, {"wide_loads": True}, {"streaming": True}),
            ("BF16", "F32"),
        ),
    ],
    ids=str,
)
def test_tiles_do_not_change_bits(
    kernels: ModuleType, device: torch.device, change: dict[str, int | bool], dtype: str
) -> None:
    operands = random_operands(200, 336)
    config = kernels.TileConfig(**change)
    found = kernels.dequant(*tensors(operands, device), DTYPES[dtype], config=config)
    assert_same_bits(bits_of(found), expected_bits(operands, dtype), dtype)


@pytest.mark.parametrize("shape", [(200, 144), (128, 256), (3, 5)], ids=str)
def test_stack_in_one_launch(kernels: ModuleType, device: torch.device, shape: tuple[int, int]) -> None:
    matrices = [random_operands(*shape, seed=seed) for seed in range(3)]
    stacked = np.stack([weight for weight, _ in matrices]), np.stack([scale for _, scale in matrices])
    found = bits_of(kernels.dequant(*tensors(stacked, device)))
    for i, operands in enumerate(matrices):
        assert_same_bits(found[i], expected_bits(operands, "BF16"), "BF16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aligned", [True, False])
def test_list_in_one_launch(kernels: ModuleType, device: torch.device, aligned: bool, dtype: str) -> None:
    """Mixed shapes, an empty one among them; unaligned ones lie on odd addresses of one buffer, as in a file."""
    shapes = [(128, 256), (576, 128), (0, 128), (16, 1408)] if aligned else [(130, 77), (1, 1), (33, 300), (128, 128)]
    matrices = [random_operands(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    weights, scales = map(list, zip(*[tensors(operands, device) for operands in matrices], strict=True))
    if not aligned:
        sizes = [weight.numel() for weight in weights]
        buffer = torch.cat(
            [torch.zeros(1, dtype=torch.uint8, device=device), *[weight.flatten() for weight in weights]]
        )
        weights = [part.view(w.shape) for part, w in zip(buffer[1:].split(sizes), weights, strict=True)]
    found = kernels.dequant_many(weights, scales, DTYPES[dtype])
    for values, operands in zip(found, matrices, strict=True):
        assert_same_bits(bits_of(values), expected_bits(operands, dtype), dtype)


def test_strip_of_rows_is_the_rows_of_the_whole(kernels: ModuleType, device: torch.device) -> None:
    weight, scale = tensors(random_operands(400, 256), device)
    whole = bits_of(kernels.dequant(weight, scale))
    for first, last in [(0, 128), (128, 400), (256, 300)]:
        strip = kernels.dequant(weight[first:last], scale[first // 128 : -(-last // 128)])
        assert_same_bits(bits_of(strip), whole[first:last], "BF16")


def test_writes_into_out_and_nowhere_else(kernels: ModuleType, device: torch.device) -> None:
    operands = random_operands(130, 144)
    weight, scale = tensors(operands, device)
    guarded = torch.full((130 * 144 + 512,), 7.0, dtype=torch.bfloat16, device=device)
    out = guarded[256:-256].view(130, 144)
    assert kernels.dequant(weight.view(torch.float8_e4m3fn), scale, out=out) is out
    assert_same_bits(bits_of(out), expected_bits(operands, "BF16"), "BF16")
    assert (guarded[:256] == 7.0).all()
    assert (guarded[-256:] == 7.0).all()
    again = torch.zeros_like(out)
    assert kernels.dequant_many([weight], [scale], outs=[again])[0] is again
    assert_same_bits(bits_of(again), expected_bits(operands, "BF16"), "BF16")


def test_empty(kernels: ModuleType, device: torch.device) -> None:
    for shape, blocks in [((0, 128), (0, 1)), ((4, 0), (1, 0)), ((0, 128, 128), (0, 1, 1))]:
        weight = torch.empty(shape, dtype=torch.uint8, device=device)
        assert kernels.dequant(weight, torch.empty(blocks, device=device)).shape == shape
    assert kernels.dequant_many([], []) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_than_two_to_the_31_elements() -> None:
    weight = torch.empty((160, 2048, 7168), dtype=torch.uint8, device="cuda")  # 2.35e9
    weight.fill_(0x38)
    scale = torch.arange(160 * 16 * 56, dtype=torch.float32, device="cuda").view(160, 16, 56)
    found = fp8_dequant.dequant(weight, scale, torch.bfloat16)
    corners = found[:, ::128, ::128]
    assert torch.equal(corners, scale.to(torch.bfloat16))
    assert torch.equal(found[-1], dequant_reference(weight[-1], scale[-1]))


def test_pain_01_compiles_for_gpus_without_fp8() -> None:
    """Compiled here for an A100 (sm_80): no FP8 type, no flushing of subnormals, 16-byte stores."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    if fp8_dequant.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    for kernel, pointers in [
        (fp8_dequant._dequant_stacked_kernel, {"weight_ptr": "*u8", "scale_ptr": "*fp32", "out_ptr": "*i16"}),
        (fp8_dequant._dequant_table_kernel, {"table_ptr": "*i64", "owner_ptr": "*i32"}),
    ]:
        options = fp8_dequant._options(torch.bfloat16, fp8_dequant.DEFAULT_CONFIG)
        constants = {"ALIGNED": True, **options, "HARDWARE": True}
        signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names} | pointers
        source = ASTSource(
            kernel,
            signature,
            constexprs={(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants},
        )
        ptx = compile(
            source, target=GPUTarget("cuda", 80, 32), options={"num_warps": fp8_dequant.DEFAULT_CONFIG.num_warps}
        ).asm["ptx"]
        assert "mul.f32" in ptx
        assert "e4m3" not in ptx
        assert ".ftz" not in ptx
        assert re.search(r"st\.global(\.cs)?\.v4\.b32", ptx)
        assert re.search(r"ld\.global\S*\.v2\.b32", ptx)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_scale_that_does_not_fit(kernels: ModuleType, device: torch.device) -> None:
    weight = torch.zeros(576, 256, dtype=torch.uint8, device=device)
    for shape in [(4, 2), (5, 3), (2, 5), (10,)]:
        with pytest.raises(ScaleError, match=r"\[576, 256\].*expected torch.float32 \[5, 2\]"):
            kernels.dequant(weight, torch.ones(shape, device=device))
    with pytest.raises(ScaleError, match="bfloat16"):
        kernels.dequant(weight, torch.ones(5, 2, dtype=torch.bfloat16, device=device))


def test_operands_that_cannot_be(kernels: ModuleType, device: torch.device) -> None:
    weight, scale = tensors(random_operands(128, 256), device)
    with pytest.raises(PlanError, match=r"torch\.int8"):
        kernels.dequant(weight.view(torch.int8), scale)
    with pytest.raises(PlanError, match=r"torch\.float64"):
        kernels.dequant(weight, scale, torch.float64)
    with pytest.raises(PlanError, match="contiguous"):
        kernels.dequant(weight.t(), scale.t())
    with pytest.raises(PlanError, match=r"expected torch.bfloat16 \[128, 256\]"):
        kernels.dequant(weight, scale, out=torch.empty(128, 128, dtype=torch.bfloat16, device=device))
    with pytest.raises(PlanError, match="1 of each"):
        kernels.dequant_many([weight], [scale, scale])
    with pytest.raises(PlanError, match="matrices"):
        kernels.dequant_many([weight[None]], [scale[None]])


def test_cpu_tensors_need_the_interpreter() -> None:
    if fp8_dequant.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    with pytest.raises(DeviceError, match="fp8_dequant_cpu"):
        fp8_dequant.dequant(*tensors(random_operands(128, 128), torch.device("cpu")))
