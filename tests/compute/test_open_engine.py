"""An engine for whoever must know which it is: its GPU has computed what will be asked of it, or there is an error."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from weightkit.checkpoint.reading import Bytes
from weightkit.checkpoint.tensors import Dequantized, Stored
from weightkit.compute import CpuEngine, CudaEngine, StartingEngine, engines, open_engine, start_engine, starting
from weightkit.compute.bounds import beyond_roundings
from weightkit.compute.engines import Scales
from weightkit.errors import DeviceError

WORK = [Dequantized(Stored("a", 0, "F8_E4M3", (256, 256)), Stored("b", 0, "F32", (2, 2)), "F32")]


class Gpu(CpuEngine):
    """What one does with a strip is ``does``."""

    does = "compute"

    def __init__(self, devices: Sequence[int] = (0,)) -> None:
        super().__init__()
        self.devices = list(devices)

    def dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Bytes:
        if self.does == "fail" and self.devices == [0]:
            raise RuntimeError("Failed to find C compiler\nand more")
        made = super().dequantize(weight, scale, dtype)
        return made ^ np.uint8(1) if self.does == "lie" else made


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of NVIDIA's."""
    monkeypatch.setattr(starting, "choose_engine", lambda device: Gpu() if device != "cpu" else CpuEngine())
    monkeypatch.setattr(starting, "CudaEngine", Gpu)
    monkeypatch.setattr(starting, "count_gpus", lambda: 2)
    monkeypatch.setattr(starting, "_torch_lacks_cuda", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("gpus")
def test_a_gpu_that_computes_as_the_cpu_does_is_taken() -> None:
    assert isinstance(open_engine("cuda", WORK), Gpu)
    assert not isinstance(open_engine("cpu", WORK), Gpu)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("does", "says"),
    [("lie", "cuda:0: the GPU computes other bits than the CPU"), ("fail", "RuntimeError: Failed to find C compiler")],
)
def test_one_that_lies_or_fails_is_an_error(does: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gpu, "does", does)
    with pytest.raises(DeviceError, match=says) as raised:
        open_engine("auto", WORK)
    assert "--device cpu" in str(raised.value)
    assert "and more" not in str(raised.value)
    assert isinstance(open_engine("auto"), Gpu)  # no work, no trial


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("variable", "name"), [("", "0"), ("5,GPU-8f6a", "5"), ("MIG-1,MIG-2", "MIG-1")])
def test_a_gpu_that_fails_in_any_way_is_left_out_by_its_name(
    variable: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr(Gpu, "does", "fail")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # as NVML counts where CUDA shows instances
    started, told = start_engine("cuda", WORK), list[str]()
    assert isinstance(started, StartingEngine)
    started.wait(60)
    started.tell(told.append)
    working = started.now()
    assert isinstance(working, Gpu)
    assert working.devices == [1]
    assert [line.partition(" (")[0] for line in told] == [f"GPU {name} cannot be used"]


@pytest.mark.usefixtures("gpus")
def test_gpus_that_torch_alone_knows_are_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's."""
    monkeypatch.setattr(starting, "count_gpus", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(Gpu, "does", "fail")
    started = start_engine("cuda", WORK)
    assert isinstance(started, StartingEngine)
    started.wait(60)
    working = started.now()
    assert isinstance(working, Gpu)
    assert working.devices == [1, 2]


def test_a_gpu_that_cannot_be_opened_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(number: int) -> str:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    with pytest.raises(DeviceError, match="cuda:3: the GPU failed"):
        CudaEngine([3])


@pytest.mark.parametrize("said", ["HIP error: invalid device function", "cusolver error: CUSOLVER_STATUS_INTERNAL"])
def test_what_other_libraries_say_of_a_device(said: str) -> None:
    with pytest.raises(DeviceError, match="the GPU failed"), engines.cuda_errors("cuda:0"):
        raise RuntimeError(said)


def test_what_hides_all_gpus_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> object:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", none)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert starting._what_cuda_says() == "no device with CUDA_VISIBLE_DEVICES="
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert starting._what_cuda_says() == "no device"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_roundings_are_no_errors_and_a_missing_product_is_one(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, 512, generator=random).bfloat16() for count in (5, 7))
    found = (x.float() @ weight.float().T).to(dtype)
    assert not beyond_roundings(found, x, weight).any()
    x[3, 100] = 8.0
    weight[2, 100] = 2.0
    assert beyond_roundings(found, x, weight)[3, 2]
    found[1, 1] = float("nan")
    assert beyond_roundings(found, x, weight)[1, 1]
    x[1, 0] = float("nan")
    assert not beyond_roundings(found, x, weight)[1].any()


@pytest.mark.parametrize("smaller", [0, 17], ids=["alike", "small-after-large"])
def test_sums_that_are_cut_off_at_each_step_are_no_errors(smaller: int) -> None:
    """As tensor cores do: at worst each product loses all but a bit of what F32 has below the largest."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.rand(count, 512, generator=random).add(0.5).bfloat16() for count in (5, 7))
    x[:, 1:] *= 2.0**-smaller
    total = torch.zeros(5, 7, dtype=torch.float64)
    for k in range(512):
        total += x[:, k, None].double() * weight[:, k].double()
        total = cut_off(total)
    assert not beyond_roundings(total.float(), x, weight).any()
    assert beyond_roundings(total.float() * (1 - 2.0**-12), x, weight).all()


def cut_off(values: torch.Tensor) -> torch.Tensor:
    """F64 to the 24 bits of F32, toward zero."""
    fractions, exponents = torch.frexp(values)
    return torch.ldexp((fractions * 2.0**24).trunc(), exponents - 24)


def test_sums_that_may_pass_what_f32_holds_are_no_errors() -> None:
    x, weight = torch.full((1, 4), 1e38).bfloat16(), torch.tensor([[2.0, 2.0, -2.0, -2.0]]).bfloat16()
    for found in (float("inf"), float("nan"), 0.0):
        assert not beyond_roundings(torch.tensor([[found]]).bfloat16(), x, weight).any()
    assert beyond_roundings(torch.tensor([[float("inf")]]).bfloat16(), x / 8, weight).all()
