"""Where lazy tensors are computed: on the CPU, or on CUDA devices. Both give the same bits.

An engine owns scratch buffers, one set a thread, so that strips of many megabytes cost no page faults. Threads may
share it. ``weightkit.compute.starting`` has one that is the CPU until the GPU is ready.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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


class Started(Protocol):
    """A strip that is being computed, or was.

    Attributes:
        is_here: whether it lies in scratch of the thread's that the next call overwrites. Else it may wait, one such
            strip of a thread while it starts the next.
    """

    is_here: bool

    def bytes(self) -> Bytes:
        """All of it, flat, in scratch that the same thread's next call may overwrite; waits for it."""
        ...

    def copy_to(self, start: int, out: Bytes) -> None:
        """Bytes from ``start`` on into ``out``; waits for them."""
        ...

    def pin(self, memory: Bytes) -> Callable[[], None]:
        """Lock the pages of ``memory``, so that ``copy_to`` into them is the device's work alone. Returns what undoes
        it, once nothing is copied any more."""
        ...


class EngineSupply(Protocol):
    """Who says where to compute next: every engine itself, or one that is about to have another."""

    def now(self) -> Engine:
        """The engine for the next strip. Raises ``DeviceError`` where the device that was asked for has failed."""
        ...


class Engine(Protocol):
    """What evaluation needs. The arrays returned may be scratch: the same thread's next call overwrites them."""

    name: str

    def now(self) -> Engine:
        """Itself. See ``EngineSupply``."""
        ...

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

    def start_dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Started:
        """As ``dequantize``, begun. The buffers that the arguments lie in may be asked for again at once."""
        ...

    def start_dequantize_groups(self, packed: PackedWeight, dtype: str) -> Started:
        """As ``dequantize_groups``, begun."""
        ...

    def start_quantize_blocks(
        self, values: Bytes, shape: tuple[int, int], dtype: str, power_of_two: bool
    ) -> tuple[Started, Started]:
        """As ``quantize_blocks``, begun: codes and scales."""
        ...


class _Buffers:
    """Buffers by purpose, which grow to the largest size asked for."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._held: dict[str, Bytes] = {}

    def __call__(self, purpose: str, count: int) -> Bytes:
        buffer = self._held.get(purpose)
        if buffer is None or len(buffer) < count:
            buffer = self._held[purpose] = self._allocate(count)
        return buffer[:count]

    def _allocate(self, count: int) -> Bytes:
        if not self._pinned:
            return np.empty(count, np.uint8)
        import torch

        return torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()


class Here:
    """A strip that is computed: its bytes are in host memory. See ``Started``."""

    is_here = True

    def __init__(self, data: Bytes) -> None:
        self._data = data

    def bytes(self) -> Bytes:
        return self._data

    def copy_to(self, start: int, out: Bytes) -> None:
        np.copyto(out, self._data[start : start + len(out)])

    def pin(self, memory: Bytes) -> Callable[[], None]:
        return lambda: None


class CpuEngine:
    """Compiled loops for FP8 and GPTQ, torch for plain casts."""

    name = "cpu"

    def __init__(self) -> None:
        self._threads = threading.local()

    def now(self) -> CpuEngine:
        return self

    def buffer(self, purpose: str, count: int) -> Bytes:
        buffers: _Buffers | None = getattr(self._threads, "buffers", None)
        if buffers is None:
            buffers = self._threads.buffers = _Buffers()
        return buffers(purpose, count)

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

        out = self.buffer("quantized", prod(shape)).reshape(shape)
        codes, scales = quantize_cpu(values, shape, dtype, power_of_two=power_of_two, out=out)
        return codes.reshape(-1), scales

    def cast(self, values: Bytes, source: str, dtype: str) -> Bytes:
        return _cast(values, source, dtype)

    def start_dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Started:
        return Here(self.dequantize(weight, scale, dtype))

    def start_dequantize_groups(self, packed: PackedWeight, dtype: str) -> Started:
        return Here(self.dequantize_groups(packed, dtype))

    def start_quantize_blocks(
        self, values: Bytes, shape: tuple[int, int], dtype: str, power_of_two: bool
    ) -> tuple[Started, Started]:
        codes, scales = self.quantize_blocks(values, shape, dtype, power_of_two)
        return Here(codes), Here(scales.reshape(-1).view(np.uint8))


#: Sets of pinned buffers a thread, used in turn: one is read into while the device reads the other.
SLOTS = 2


class _Slot:
    """Pinned buffers, and the event after which the device needs them no more."""

    def __init__(self) -> None:
        self.buffer = _Buffers(pinned=True)
        self.passed: torch.cuda.Event | None = None


class _Lane:
    """A thread's way to its device: a stream for what goes there and is computed, one for what comes back, and slots.

    With two streams the results of one strip come back while the codes of the next go up.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        with torch.cuda.device(device):
            self.compute, self.down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.result = _Buffers(pinned=True)
        self._slots = itertools.cycle([_Slot() for _ in range(SLOTS)])
        self.slot = next(self._slots)

    def turn(self, passed: torch.cuda.Event) -> None:
        """The current slot is in use until ``passed``; go to the next, once that is free."""
        self.slot.passed = passed
        self.slot = next(self._slots)
        if self.slot.passed is not None:
            self.slot.passed.synchronize()
            self.slot.passed = None

    @contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Queue on one of its streams. Says as a ``DeviceError`` what CUDA says."""
        import torch

        with cuda_errors(self.device), torch.cuda.device(self.device), torch.cuda.stream(stream):
            yield


class _OnDevice:
    """A strip in a device's memory, or on its way there. See ``Started``."""

    is_here = False

    def __init__(self, lane: _Lane, values: torch.Tensor, ready: torch.cuda.Event) -> None:
        import torch

        self._lane, self._values, self._ready = lane, values.view(-1).view(torch.uint8), ready

    def bytes(self) -> Bytes:
        with cuda_errors(self._lane.device):
            out = self._lane.result("result", self._values.numel())
        self.copy_to(0, out)
        return out

    def copy_to(self, start: int, out: Bytes) -> None:
        import torch

        with self._lane.on(self._lane.down):
            self._lane.down.wait_event(self._ready)
            torch.from_numpy(out).copy_(self._values[start : start + len(out)], non_blocking=True)
            done = _event(self._lane.down)
            done.synchronize()

    def pin(self, memory: Bytes) -> Callable[[], None]:
        import torch

        address, device, runtime = memory.ctypes.data, self._lane.device, torch.cuda.cudart()
        with cuda_errors(device), torch.cuda.device(device):
            if int(runtime.cudaHostRegister(address, memory.nbytes, 0)) != 0:
                _forget_error(device)
                return lambda: None  # the driver then copies by way of pinned memory of its own

        def undo() -> None:
            # on the device that knows the memory; one that has failed since is told of elsewhere
            with suppress(RuntimeError), torch.cuda.device(device):
                runtime.cudaHostUnregister(address)

        return undo


class CudaEngine:
    """Triton kernels on one device or several, which threads are dealt out to in turn, each with streams of its own.

    Args:
        devices: their numbers among those that CUDA shows; default the calling thread's current one.

    Raises ``DeviceError`` where there is none, or the first of them cannot be opened.
    """

    def __init__(self, devices: Sequence[int] | None = None) -> None:
        import torch

        if not torch.cuda.is_available():
            raise no_device(f"torch {torch.__version__}")
        with cuda_errors("cuda" if devices is None else f"cuda:{devices[0]}"):
            self.devices = [torch.cuda.current_device()] if devices is None else list(devices)
            self.name = torch.cuda.get_device_name(self.devices[0])
        self._deal = itertools.cycle([torch.device("cuda", number) for number in self.devices])
        self._threads = threading.local()
        self._dealing = threading.Lock()

    def now(self) -> CudaEngine:
        return self

    def buffer(self, purpose: str, count: int) -> Bytes:
        lane = self._lane()
        with cuda_errors(lane.device):
            return lane.slot.buffer(purpose, count)

    def dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Bytes:
        return self.start_dequantize(weight, scale, dtype).bytes()

    def start_dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Started:
        from weightkit.kernels.fp8_dequant import dequant

        lane = self._lane()
        with lane.on(lane.compute):
            made = dequant(_upload(weight, lane), _upload(scale, lane), _torch_dtype(dtype))
            return _started(lane, made)[0]

    def dequantize_groups(self, packed: PackedWeight, dtype: str) -> Bytes:
        return self.start_dequantize_groups(packed, dtype).bytes()

    def start_dequantize_groups(self, packed: PackedWeight, dtype: str) -> Started:
        from weightkit.kernels.gptq_format import dequant

        lane, stored = self._lane(), (packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
        with lane.on(lane.compute):
            qweight, qzeros, scales, g_idx = (_upload(array, lane) for array in stored)
            made = dequant(qweight, qzeros, scales, g_idx, packed.bits, packed.zero_offset, _torch_dtype(dtype))
            return _started(lane, made)[0]

    def quantize_blocks(
        self, values: Bytes, shape: tuple[int, int], dtype: str, power_of_two: bool
    ) -> tuple[Bytes, Scales]:
        codes, scales = self.start_quantize_blocks(values, shape, dtype, power_of_two)
        found = scales.bytes().view(np.float32).reshape(-(-shape[0] // 128), -(-shape[1] // 128)).copy()
        return codes.bytes(), found

    def start_quantize_blocks(
        self, values: Bytes, shape: tuple[int, int], dtype: str, power_of_two: bool
    ) -> tuple[Started, Started]:
        from weightkit.kernels.fp8_quant import quantize

        lane = self._lane()
        with lane.on(lane.compute):
            matrix = _upload(values, lane).view(_torch_dtype(dtype)).view(shape)
            codes, scales = _started(lane, *quantize(matrix, power_of_two=power_of_two))
        return codes, scales

    def cast(self, values: Bytes, source: str, dtype: str) -> Bytes:
        return _cast(values, source, dtype)

    def _lane(self) -> _Lane:
        lane: _Lane | None = getattr(self._threads, "lane", None)
        if lane is None:
            with self._dealing:
                device = next(self._deal)
            with cuda_errors(device):
                lane = self._threads.lane = _Lane(device)
        return lane


def _forget_error(device: torch.device) -> None:
    """Clear CUDA's last error of this thread, which the next kernel of torch's would be blamed for. torch has no call
    for it, and asks for the error, which clears it, after each launch."""
    import torch

    with suppress(RuntimeError):
        torch.empty(1, device=device).fill_(1)


def _upload(array: npt.NDArray[np.generic], lane: _Lane) -> torch.Tensor:
    """On the current stream. Pinned memory, the slot's, is read until the slot's event; any other, such as scales out
    of a reader's array, is the caller's again when this returns, since it is waited for."""
    import torch

    here = torch.from_numpy(array)
    return here.to(lane.device, non_blocking=here.is_pinned())


def _started(lane: _Lane, *made: torch.Tensor) -> list[Started]:
    """What the current stream, the lane's, will have made of the slot's buffers."""
    ready = _event(lane.compute)
    started: list[Started] = [_OnDevice(lane, values, ready) for values in made]
    lane.turn(ready)
    return started


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """What the stream has to do until now. Waiting for it costs no processor time."""
    import torch

    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


@contextmanager
def cuda_errors(device: object, fix: str = "Use --device cpu.") -> Iterator[None]:
    """Say as a ``DeviceError`` what CUDA or Triton says of a device."""
    try:
        yield
    except Exception as exc:
        if not _is_devices(exc):
            raise
        first = str(exc).partition("\n")[0].rstrip(".")
        raise DeviceError("the GPU failed", where=device, found=first, fix=fix) from exc


#: What stands in the message of a device's failure: of CUDA, of AMD's HIP, of Triton, of the libraries that factorize.
_SPEAKERS = ("CUDA", "HIP error", "Triton", "cusolver error", "hipsolver error")


def _is_devices(error: Exception) -> bool:
    """Whether a device's failure: torch has classes for some, which older ones lack; Triton launches by code of its
    own, which raises plain ``RuntimeError``, and refuses what a device has no room for by classes of its own."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))):
        return True
    named = isinstance(error, RuntimeError) and any(name in str(error) for name in _SPEAKERS)
    return named or type(error).__name__ == "OutOfResources"


UNUSABLE = "the GPU cannot be used"


def reason(failure: BaseException) -> str:
    """Why a GPU cannot be used, in a few words."""
    if not isinstance(failure, DeviceError):
        return f"{type(failure).__name__}: {failure}".partition("\n")[0]
    if failure.found is None or failure.what == UNUSABLE:
        return str(failure.found or failure.what)
    return f"{failure.what}: {failure.found}"


def no_device(found: str = "cuda") -> DeviceError:
    """What to raise where there is no GPU. ``found`` is what shows that."""
    return DeviceError("no CUDA device is usable", where="--device", found=found, fix="Use --device cpu.")


def choose_engine(device: DeviceName = "auto") -> Engine:
    """The engine for ``--device``, ready: ``auto`` takes a GPU where there is one, the current one of several.

    For who must know which it is, before any work: whoever then computes asks ``open_engine``, and who need not know,
    and would lose the seconds that a GPU takes to start, ``start_engine``. Raises ``DeviceError``.
    """
    if device == "cpu" or (device == "auto" and not has_driver()):
        return CpuEngine()
    import torch

    if device == "auto" and not torch.cuda.is_available():
        return CpuEngine()
    return CudaEngine()


def has_driver() -> bool:
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
