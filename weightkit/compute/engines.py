"""Where lazy tensors are computed: on the CPU, or on a CUDA device. Both give the same bits.

An engine owns scratch buffers, one set a thread, so that strips of many megabytes cost no page faults. Threads may
share it.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from weightkit.checkpoint.dtypes import TORCH_NAMES, itemsize
from weightkit.checkpoint.reading import Bytes
from weightkit.errors import DeviceError, UnsupportedError

if TYPE_CHECKING:
    import torch

Scales = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]
DeviceName = Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A GPTQ weight as it is stored; see ``weightkit.checkpoint.tensors.GroupDequantized``."""

    qweight: Words
    qzeros: Words
    scales: npt.NDArray[np.float16]
    g_idx: Words
    bits: int
    zero_offset: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], len(self.g_idx)


class Engine(Protocol):
    """What evaluation needs. The arrays returned may be scratch: the same thread's next call overwrites them."""

    name: str

    def buffer(self, purpose: str, count: int) -> Bytes:
        """``count`` bytes of this thread's scratch for ``purpose``."""
        ...

    def dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Bytes:
        """``float32(weight) * scale`` rounded once to ``dtype``: weight E4M3 codes [M, N], scale [ceil(M/b),
        ceil(N/b)]."""
        ...

    def dequantize_groups(self, packed: PackedWeight, dtype: str) -> Bytes:
        """A GPTQ weight [N, K], ``(code - zero) * float32(scale)`` rounded once to ``dtype``."""
        ...

    def quantize_blocks(
        self, values: Bytes, shape: tuple[int, int], dtype: str, power_of_two: bool
    ) -> tuple[Bytes, Scales]:
        """The matrix ``values`` (its bytes, of ``dtype`` floats) as E4M3 codes, flat, and block scales."""
        ...

    def cast(self, values: Bytes, source: str, dtype: str) -> Bytes:
        """Flat bytes of ``source`` floats, rounded to nearest even in ``dtype``."""
        ...


class _Scratch:
    """Buffers that grow to the largest size asked for, a set for each thread."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._held = threading.local()

    def __call__(self, purpose: str, count: int) -> Bytes:
        held: dict[str, Bytes] = self._held.__dict__
        buffer = held.get(purpose)
        if buffer is None or len(buffer) < count:
            buffer = held[purpose] = self._allocate(count)
        return buffer[:count]

    def _allocate(self, count: int) -> Bytes:
        if not self._pinned:
            return np.empty(count, np.uint8)
        import torch

        return torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()


class CpuEngine:
    """Compiled loops for FP8 and GPTQ, torch for plain casts."""

    name = "cpu"

    def __init__(self) -> None:
        self.buffer = _Scratch()

    def dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Bytes:
        from weightkit.kernels.fp8_dequant_cpu import dequant_cpu

        out = self.buffer("dequantized", weight.size * itemsize(dtype))
        values = out.view(f"u{itemsize(dtype)}").reshape(weight.shape)
        dequant_cpu(weight, scale, values, dtype=dtype)
        return out

    def dequantize_groups(self, packed: PackedWeight, dtype: str) -> Bytes:
        from weightkit.kernels.gptq_format_cpu import dequant_cpu

        out = self.buffer("dequantized", prod(packed.shape) * itemsize(dtype))
        dequant_cpu(
            packed.qweight,
            packed.qzeros,
            packed.scales,
            packed.g_idx,
            out.view(f"u{itemsize(dtype)}").reshape(packed.shape),
            bits=packed.bits,
            zero_offset=packed.zero_offset,
            dtype=dtype,
        )
        return out

    def quantize_blocks(
        self, values: Bytes, shape: tuple[int, int], dtype: str, power_of_two: bool
    ) -> tuple[Bytes, Scales]:
        from weightkit.kernels.fp8_quant_cpu import quantize_cpu

        codes, scales = quantize_cpu(values, shape, dtype, power_of_two=power_of_two)
        return codes.reshape(-1), scales

    def cast(self, values: Bytes, source: str, dtype: str) -> Bytes:
        return _cast(values, source, dtype)


class CudaEngine:
    """Triton kernels between pinned buffers, each thread on a stream of its own, so that copies of several overlap."""

    def __init__(self, device: str = "cuda") -> None:
        import torch

        if not torch.cuda.is_available():
            raise DeviceError("no CUDA device is usable", where="--device", found=device, fix="Use --device cpu.")
        self._device = torch.device(device)
        self._streams = threading.local()
        self.buffer = _Scratch(pinned=True)
        self.name = torch.cuda.get_device_name(self._device)

    def dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Bytes:
        import torch

        from weightkit.kernels.fp8_dequant import dequant

        out = self.buffer("dequantized", weight.size * itemsize(dtype))
        target = torch.from_numpy(out).view(_torch_dtype(dtype)).view(weight.shape)
        stream = self._stream()
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            codes = torch.from_numpy(weight).to(self._device, non_blocking=True)
            scales = torch.from_numpy(scale).to(self._device, non_blocking=True)
            target.copy_(dequant(codes, scales, _torch_dtype(dtype)), non_blocking=True)
            stream.synchronize()
        return out

    def dequantize_groups(self, packed: PackedWeight, dtype: str) -> Bytes:
        import torch

        from weightkit.kernels.gptq_format import dequant

        out = self.buffer("dequantized", prod(packed.shape) * itemsize(dtype))
        target = torch.from_numpy(out).view(_torch_dtype(dtype)).view(packed.shape)
        stored = (packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
        stream = self._stream()
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            qweight, qzeros, scales, g_idx = (
                torch.from_numpy(array).to(self._device, non_blocking=True) for array in stored
            )
            weight = dequant(qweight, qzeros, scales, g_idx, packed.bits, packed.zero_offset, _torch_dtype(dtype))
            target.copy_(weight, non_blocking=True)
            stream.synchronize()
        return out

    def quantize_blocks(
        self, values: Bytes, shape: tuple[int, int], dtype: str, power_of_two: bool
    ) -> tuple[Bytes, Scales]:
        import torch

        from weightkit.kernels.fp8_quant import quantize

        stream = self._stream()
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            matrix = torch.from_numpy(values).to(self._device, non_blocking=True).view(_torch_dtype(dtype)).view(shape)
            codes, scales = quantize(matrix, power_of_two=power_of_two)
            out = torch.from_numpy(self.buffer("quantized", codes.numel())).view(shape)
            out.copy_(codes, non_blocking=True)
            found = scales.cpu()
            stream.synchronize()
        return out.view(-1).numpy(), found.numpy()

    def cast(self, values: Bytes, source: str, dtype: str) -> Bytes:
        return _cast(values, source, dtype)

    def _stream(self) -> torch.cuda.Stream:
        import torch

        stream: torch.cuda.Stream | None = getattr(self._streams, "stream", None)
        if stream is None:
            stream = self._streams.stream = torch.cuda.Stream(self._device)
        return stream


def choose_engine(device: DeviceName = "auto") -> Engine:
    """The engine for ``--device``: ``auto`` takes a GPU where there is one. Raises ``DeviceError``."""
    if device == "cpu" or (device == "auto" and not _has_driver()):
        return CpuEngine()
    import torch

    if device == "auto" and not torch.cuda.is_available():
        return CpuEngine()
    return CudaEngine()


def _has_driver() -> bool:
    """Whether a GPU's driver is there. Asked before torch, whose import takes as long as casting some gigabytes."""
    if sys.platform != "linux":
        return True
    return any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def _cast(values: Bytes, source: str, dtype: str) -> Bytes:
    import torch

    tensor = torch.from_numpy(values).view(_torch_dtype(source)).to(_torch_dtype(dtype))
    return tensor.view(torch.uint8).numpy()


def _torch_dtype(dtype: str) -> torch.dtype:
    import torch

    if dtype not in TORCH_NAMES:
        raise UnsupportedError("not a float dtype that can be cast", expected=", ".join(TORCH_NAMES), found=dtype)
    result: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
    return result
