"""What counts as a device's failure, whatever torch and Triton are, and what one that was dealt with leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from weightkit.compute import engines
from weightkit.errors import DeviceError, ScaleError


class OutOfResources(Exception):  # noqa: N818 - Triton's name, which is no RuntimeError
    pass


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        RuntimeError("CUDA error: an illegal memory access was encountered\nmore"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
        OutOfResources("out of resource: shared memory, Required: 262144, Hardware limit: 232448."),
    ],
    ids=lambda error: str(error)[:12],
)
def test_a_devices_failure_is_a_device_error(error: Exception) -> None:
    with pytest.raises(DeviceError, match="the GPU failed") as raised, engines.cuda_errors("cuda:1"):
        raise error
    assert raised.value.__cause__ is error
    assert str(error).splitlines()[0].rstrip(".") in str(raised.value)
    assert "more" not in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 must be on one device, found cuda:0 and cpu"),
        ValueError("a CUDA stream"),
        ScaleError("CUDA"),
        DeviceError("no CUDA device is usable"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, engines.cuda_errors("cuda:1"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("code", [0, 712])
def test_memory_that_cannot_be_locked_leaves_no_error(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    undone, forgotten = list[int](), list[object]()
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: code, cudaHostUnregister=undone.append)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(engines, "_forget_error", forgotten.append)
    lane, memory = SimpleNamespace(device=torch.device("cpu")), np.zeros(8, np.uint8)
    strip = engines._OnDevice(lane, torch.zeros(8), None)  # type: ignore[arg-type]
    strip.pin(memory)()
    assert undone == ([memory.ctypes.data] if code == 0 else [])
    assert forgotten == ([lane.device] if code else [])


class Failed:
    """What torch asks of a device that has failed."""

    def __init__(self, device: torch.device) -> None:
        pass

    def __enter__(self) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    def __exit__(self, *_: object) -> None:
        pass


def test_memory_is_locked_and_unlocked_on_the_strips_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads begin with the first device as their current one."""
    events, current = list[object](), list[torch.device]()

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    def register(*_: object) -> int:
        events.append(("lock", *current))
        return 0

    runtime = SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=lambda _: events.append(("unlock", *current))
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", device)
    where = torch.device("cuda", 5)
    strip = engines._OnDevice(SimpleNamespace(device=where), torch.zeros(8), None)  # type: ignore[arg-type]
    undo = strip.pin(np.zeros(8, np.uint8))
    undo()
    assert events == [("lock", where), ("unlock", where)]


def test_a_device_that_failed_is_told_of_when_memory_is_locked_not_when_it_is_unlocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unlocking is what a failure ends with: it must not stand before what went wrong."""
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda _: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    lane = SimpleNamespace(device=torch.device("cuda", 1))
    strip = engines._OnDevice(lane, torch.zeros(8), None)  # type: ignore[arg-type]
    undo = strip.pin(np.zeros(8, np.uint8))
    monkeypatch.setattr(torch.cuda, "device", Failed)
    with pytest.raises(DeviceError, match="cuda:1: the GPU failed"):
        strip.pin(np.zeros(8, np.uint8))
    undo()


def test_forgetting_an_error_raises_none(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = list[float]()

    def fill(tensor: torch.Tensor, value: float) -> None:
        launched.append(value)
        raise RuntimeError("CUDA error: part or all of the requested memory range is already mapped")

    monkeypatch.setattr(torch.Tensor, "fill_", fill)
    engines._forget_error(torch.device("cpu"))
    assert launched == [1]
