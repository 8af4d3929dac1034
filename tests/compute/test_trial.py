"""What a GPU is tried out with: contents that go through every way of a kernel, and one wrong bit is found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from weightkit.checkpoint.reading import Bytes
from weightkit.checkpoint.tensors import BlockQuantized, Cast, Dequantized, GroupDequantized, LazyTensor, Stored
from weightkit.compute import CpuEngine, evaluate
from weightkit.compute.engines import PackedWeight, Scales
from weightkit.compute.trial import MadeUp, Trial
from weightkit.errors import DeviceError

FP8 = Dequantized(Stored("a", 0, "F8_E4M3", (384, 512)), Stored("b", 0, "F32", (3, 4)), "BF16")
BRAIN = Stored("a", 0, "BF16", (512, 384))
GROUPS = GroupDequantized(
    qweight=Stored("q", 0, "I32", (32, 256)),
    qzeros=Stored("z", 0, "I32", (2, 32)),
    scales=Stored("s", 0, "F16", (2, 256)),
    g_idx=Stored("g", 0, "I32", (256,)),
    bits=4,
    zero_offset=1,
    dtype="BF16",
)
SAMPLES: dict[str, LazyTensor] = {
    "fp8": FP8,
    "cast": Cast(FP8, "F32"),
    "codes": BlockQuantized(BRAIN, scales=False, power_of_two=False),
    "scales": BlockQuantized(BRAIN, scales=True, power_of_two=True),
    "groups": GROUPS,
}


class OneBit(CpuEngine):
    """Gives one wrong bit of everything that kernels compute."""

    def dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Bytes:
        return flipped(super().dequantize(weight, scale, dtype))

    def dequantize_groups(self, packed: PackedWeight, dtype: str) -> Bytes:
        return flipped(super().dequantize_groups(packed, dtype))

    def quantize_blocks(
        self, values: Bytes, shape: tuple[int, int], dtype: str, power_of_two: bool
    ) -> tuple[Bytes, Scales]:
        codes, scales = super().quantize_blocks(values, shape, dtype, power_of_two)
        return flipped(codes), flipped(scales.reshape(-1).view(np.uint8)).view(np.float32).reshape(scales.shape)


def flipped(made: Bytes) -> Bytes:
    made = made.copy()
    made[len(made) // 2] ^= 1
    return made


@pytest.mark.parametrize("kind", SAMPLES)
def test_one_wrong_bit_is_found(kind: str) -> None:
    trial = Trial([SAMPLES[kind]])
    trial.require(CpuEngine(), "cuda:1")
    with pytest.raises(DeviceError, match="other bits than the CPU") as caught:
        trial.require(OneBit(), "cuda:1")
    assert "cuda:1" in str(caught.value)
    assert "1 of " in str(caught.value)


def test_contents_have_all_codes_and_blocks_of_both_kinds() -> None:
    assert len(set(MadeUp().read(FP8.weight).tolist())) == 256
    engine, values = CpuEngine(), MadeUp().read(BRAIN)
    codes, scales = engine.quantize_blocks(values, (512, 384), "BF16", False)
    back = engine.dequantize(codes.reshape(512, 384), scales, "BF16").view(np.uint16).reshape(512, 384)
    equal = back == values.view(np.uint16).reshape(512, 384)
    assert equal[:256].all()  # from FP8, and recognized as such
    assert 0 < equal[256:].mean() < 0.5
    computed = evaluate(GROUPS, MadeUp(), CpuEngine())
    assert len(np.unique(computed.view(np.uint16))) > 1000


def test_groups_that_the_made_up_order_does_not_name_are_left_out() -> None:
    Trial([replace(GROUPS, first_group=1)]).require(OneBit(), "cuda:0")


def test_it_ends_early_where_nobody_waits() -> None:
    def end() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Trial([FP8], end)
