"""What is said of a driver that shows no GPU."""

from __future__ import annotations

import ctypes

import pytest

from weightkit.checkpoint.tensors import Dequantized, Stored
from weightkit.compute import start_engine, starting
from weightkit.errors import DeviceError

WORK = [Dequantized(Stored("a", 0, "F8_E4M3", (128, 128)), Stored("b", 0, "F32", (1, 1)), "BF16")]


class Driver:
    """As libcuda, as far as it is asked."""

    def __init__(self, code: int, name: bytes | None = None) -> None:
        self.code, self.name = code, name

    def cuInit(self, flags: int) -> int:  # noqa: N802 - CUDA's name
        return self.code

    def cuDeviceGetCount(self, count: object) -> int:  # noqa: N802
        return 0

    def cuGetErrorName(self, code: int, name: object) -> int:  # noqa: N802
        if self.name is None:
            return 1
        name._obj.value = self.name  # type: ignore[attr-defined]
        return 0


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (Driver(100, b"CUDA_ERROR_NO_DEVICE"), "found CUDA_ERROR_NO_DEVICE from cuInit"),
        (Driver(999), "found error 999 from cuInit"),
        (Driver(0), "found no device with CUDA_VISIBLE_DEVICES=7"),
    ],
)
def test_why_there_is_none(driver: Driver, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert starting.count_gpus() == 0
    with pytest.raises(DeviceError, match=f"no CUDA device is usable: {expected}"):
        start_engine("cuda", WORK)
