"""GPTQ packing and dequantization against the format's definition in plain numpy, every code and zero, any order of
groups; the kernel as Triton's interpreter and a GPU run it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import gptq_cases
import numpy as np
import numpy.typing as npt
import pytest
import torch
from dequant_cases import BITS, DTYPES, assert_same_bits, bits_of
from gptq_cases import Packed, random_packed
from interpreted import interpreted_copy, on_gpu

from weightkit.errors import PlanError, ScaleError
from weightkit.kernels import gptq_format
from weightkit.kernels.gptq_format import TileConfig, dequant_reference, pack, pack_zeros, unpack
from weightkit.kernels.gptq_format_cpu import dequant_cpu

# NaN and Inf are among the operands; numpy says so where it computes with them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="session")
def interpreted_format() -> Iterator[ModuleType]:
    with interpreted_copy("gptq_format") as module:
        yield module


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, interpreted_format: ModuleType) -> ModuleType:
    """The module under test; tensors belong where ``device`` says."""
    if request.param == "interpreter":
        return interpreted_format
    return on_gpu(gptq_format)


@pytest.fixture
def device(kernels: ModuleType) -> torch.device:
    return torch.device("cpu" if kernels.interpreted() else "cuda")


def on(device: torch.device, packed: Packed) -> list[torch.Tensor]:
    return [torch.from_numpy(array).to(device) for array in packed.arrays]


# --- packing ----------------------------------------------------------------------------------------------------------


def test_words_hold_codes_from_the_lowest_bits_up() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [15, 0, 0, 0, 0, 0, 0, 9]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [[0x87654321 - (1 << 32), 0x9000000F - (1 << 32)]]
    assert pack(codes, 8).tolist() == [[0x04030201, 15], [0x08070605, 0x09000000]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 8), (3, 16), (5, 2, 40), (17, 128)], ids=str)
def test_pack_is_the_definition_and_unpack_its_inverse(bits: int, shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(1).integers(0, 1 << bits, shape, dtype=np.uint8)
    words = pack(torch.from_numpy(codes), bits)
    assert words.is_contiguous()
    assert np.array_equal(words.numpy(), gptq_cases.packed_rows(codes.swapaxes(-1, -2), bits))
    assert np.array_equal(unpack(words, bits).numpy(), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_strided_and_unaligned_codes(bits: int) -> None:
    codes = np.random.default_rng(2).integers(0, 1 << bits, (9, 80), dtype=np.uint8)
    for part in (torch.from_numpy(codes)[1:, 3:67], torch.from_numpy(codes).reshape(-1)[3:643].view(8, 80)):
        assert torch.equal(unpack(pack(part, bits), bits), part)


def test_symmetric_zeros_are_the_words_that_engines_know() -> None:
    assert (pack_zeros(3, 16) == 0x77777777).all()
    assert (pack_zeros(3, 16, 4, 8, zero_offset=0) == 0x88888888 - (1 << 32)).all()
    assert (pack_zeros(1, 4, 8) == 0x7F7F7F7F).all()
    assert (pack_zeros(1, 8, 4, 0) == -1).all()
    assert pack_zeros(3, 16).shape == (3, 2)
    assert pack_zeros(3, 16, 8).shape == (3, 4)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(PlanError, match="multiple of 8"):
        pack(torch.zeros(4, 12, dtype=torch.uint8), 4)
    with pytest.raises(PlanError, match=r"torch\.uint8"):
        pack(torch.zeros(4, 16, dtype=torch.int32), 4)
    with pytest.raises(PlanError, match=r"torch\.int32"):
        unpack(torch.zeros(4, 16, dtype=torch.int64), 4)
    with pytest.raises(PlanError, match="expected 4 or 8 bits, found 3"):
        pack(torch.zeros(4, 16, dtype=torch.uint8), 3)
    with pytest.raises(PlanError, match="multiples of 8"):
        pack_zeros(1, 12)
    with pytest.raises(PlanError, match="zero 16"):
        pack_zeros(1, 16, 4, 16)


# --- dequantization ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_reference_is_the_definition(bits: int, offset: int, dtype: str) -> None:
    """Every code with every zero, under scales of all kinds."""
    packed = gptq_cases.every_code_and_zero(bits)
    found = dequant_reference(*on(torch.device("cpu"), packed), bits, offset, DTYPES[dtype])
    assert_same_bits(bits_of(found), packed.dequantized(offset, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_kernel_with_every_code_and_zero(kernels: ModuleType, device: torch.device, bits: int, dtype: str) -> None:
    packed = gptq_cases.every_code_and_zero(bits)
    found = kernels.dequant(*on(device, packed), bits, 1, DTYPES[dtype], config=TileConfig(columns=256, words=64))
    assert_same_bits(bits_of(found), packed.dequantized(1, dtype), dtype)


@pytest.mark.parametrize("order", ["ascending", "one", "random", "ragged"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "offset"), [((8, 8), 0), ((72, 200), 1), ((200, 72), 0), ((136, 320), 1)], ids=str)
def test_kernel_at_sizes_that_are_no_multiple_of_tiles(
    kernels: ModuleType, device: torch.device, shape: tuple[int, int], bits: int, offset: int, order: str
) -> None:
    packed = random_packed(*shape, bits, order)
    found = kernels.dequant(*on(device, packed), bits, offset)
    assert_same_bits(bits_of(found), packed.dequantized(offset, "BF16"), "BF16")


@pytest.mark.parametrize("config", [TileConfig(16, 4), TileConfig(32, 32, 8, streaming=False)], ids=str)
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_tiles_of_any_shape_give_the_same(
    kernels: ModuleType, device: torch.device, config: TileConfig, order: str
) -> None:
    packed = random_packed(104, 136, 4, order)
    out = torch.full((104, 136), 7, dtype=torch.float16, device=device)
    found = kernels.dequant(*on(device, packed), 4, 1, torch.float16, out=out, config=config)
    assert found is out
    assert_same_bits(bits_of(found), packed.dequantized(1, "F16"), "F16")


def test_g_idx_outside_the_groups_is_nan_and_reads_nothing_else(kernels: ModuleType, device: torch.device) -> None:
    packed = random_packed(16, 64, 4, "ascending")
    packed.g_idx[8:16] = [-1, 1 << 30, 4, 0, -(1 << 31), (1 << 31) - 1, 1, 2]
    packed.g_idx[16:24] = 99
    found = bits_of(kernels.dequant(*on(device, packed), 4, 1))
    assert_same_bits(found, packed.dequantized(1, "BF16"), "BF16")
    assert (found[:, 16:24] == 0x7FFF).all()
    assert (found[:, 8] == 0x7FFF).all()
    assert (found[:, 11] != 0x7FFF).all()


# --- on a CPU ---------------------------------------------------------------------------------------------------------


def on_cpu(packed: Packed, zero_offset: int, dtype: str) -> npt.NDArray[np.unsignedinteger]:
    out = np.full(packed.codes.shape, 0x1234, BITS[dtype])
    dequant_cpu(*packed.arrays, out, bits=packed.bits, zero_offset=zero_offset, dtype=dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_compiled_loops_with_every_code_and_zero(bits: int, offset: int, dtype: str) -> None:
    packed = gptq_cases.every_code_and_zero(bits)
    assert_same_bits(on_cpu(packed, offset, dtype), packed.dequantized(offset, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["ascending", "one", "random", "ragged"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(8, 8), (72, 200), (200, 72), (24, 1000)], ids=str)
def test_compiled_loops_at_sizes_that_are_no_multiple_of_anything(
    shape: tuple[int, int], bits: int, order: str, dtype: str
) -> None:
    packed = random_packed(*shape, bits, order)
    assert_same_bits(on_cpu(packed, 1, dtype), packed.dequantized(1, dtype), dtype)


def test_compiled_loops_read_strided_and_read_only_operands() -> None:
    packed = random_packed(48, 64, 4, "ascending")
    qweight, qzeros, scales, g_idx = packed.arrays
    strided = [array[:, ::2] for array in (np.repeat(qweight, 2, 1), np.repeat(qzeros, 2, 1), np.repeat(scales, 2, 1))]
    for array in (*strided, g_idx):
        array.flags.writeable = False
    out = np.empty((48, 64), np.uint16)
    dequant_cpu(strided[0], strided[1], strided[2], g_idx, out, bits=4, zero_offset=1, dtype="BF16")
    assert_same_bits(out, packed.dequantized(1, "BF16"), "BF16")


@pytest.mark.parametrize("group", [-1, 4])
def test_compiled_loops_refuse_a_group_that_there_is_not(group: int) -> None:
    packed = random_packed(16, 64, 4, "ascending")
    packed.g_idx[9] = group
    with pytest.raises(ScaleError, match="g_idx names groups that have no scale: expected from 0 to 3"):
        on_cpu(packed, 1, "BF16")


def test_compiled_loops_refuse_what_does_not_fit() -> None:
    packed = random_packed(16, 64, 4, "ascending")
    whole, out = packed.arrays, np.empty((16, 64), np.uint16)
    for place, name in enumerate(("qweight", "qzeros", "scales", "g_idx")):
        parts = [array[..., :-1] if i == place else array for i, array in enumerate(whole)]
        with pytest.raises(ScaleError, match="does not fit a GPTQ weight"):
            dequant_cpu(*parts, out, bits=4, zero_offset=1, dtype="BF16")
        parts = [array.astype(np.int64) if i == place else array for i, array in enumerate(whole)]
        with pytest.raises(ScaleError, match=f"^{name} does not fit"):
            dequant_cpu(*parts, out, bits=4, zero_offset=1, dtype="BF16")
    for wrong in (np.empty((16, 64), np.float16), np.empty((64, 16), np.uint16).T, np.empty((16, 56), np.uint16)):
        with pytest.raises(PlanError, match="output"):
            dequant_cpu(*whole, wrong, bits=4, zero_offset=1, dtype="BF16")
    with pytest.raises(PlanError, match="3 bits"):
        dequant_cpu(*whole, out, bits=3, zero_offset=1, dtype="BF16")


def test_tensors_on_a_cpu_take_the_reference() -> None:
    packed = random_packed(24, 40, 4, "random")
    found = gptq_format.dequant(*on(torch.device("cpu"), packed), 4, 1)
    assert_same_bits(bits_of(found), packed.dequantized(1, "BF16"), "BF16")


def test_empty_weights() -> None:
    packed = random_packed(8, 16, 4, "ascending")
    qweight, qzeros, scales, g_idx = on(torch.device("cpu"), packed)
    assert gptq_format.dequant(qweight[:0], qzeros, scales, g_idx[:0]).shape == (8, 0)


def test_operands_that_do_not_fit() -> None:
    whole = on(torch.device("cpu"), random_packed(16, 64, 4, "ascending"))
    cases = {
        "qzeros": (1, lambda t: t[:, :1]),
        "scales": (2, lambda t: t.float()),
        "g_idx": (3, lambda t: t[:56]),
        "qweight": (0, lambda t: t.long()),
    }
    for name, (place, change) in cases.items():
        parts = [change(t) if i == place else t for i, t in enumerate(whole)]
        with pytest.raises(ScaleError, match=f"^{name} does not fit"):
            gptq_format.dequant(*parts)
    with pytest.raises(PlanError, match="4 or 8 bits"):
        gptq_format.dequant(*whole, 2)
    with pytest.raises(PlanError, match="found 2"):
        gptq_format.dequant(*whole, 4, 2)
    with pytest.raises(PlanError, match="no such output"):
        gptq_format.dequant(*whole, 4, 1, torch.float64)
    with pytest.raises(PlanError, match="contiguous"):
        gptq_format.dequant(whole[0].t().contiguous().t(), *whole[1:])
    with pytest.raises(PlanError, match="output"):
        gptq_format.dequant(*whole, out=torch.empty(16, 64))
