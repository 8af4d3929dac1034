"""What the first GPU reaches: pinned transfers, device copies, the FP8 dequantization kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from weightkit.measure.ceilings import GpuCeilings

if TYPE_CHECKING:
    import torch

TRANSFER_BYTES = 256 << 20
COPY_BYTES = 1 << 30
#: Matrices, rows and columns of routed experts of DeepSeek-V3.
STACK = (32, 2048, 7168)
BLOCK = 128


def measure_gpu(seconds: float) -> GpuCeilings | None:
    """The first GPU's rates, each measured for about ``seconds``; None where there is none. Torch is imported only
    where a driver is."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return None
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    with torch.cuda.device(0):
        return _measure(seconds)


def _measure(seconds: float) -> GpuCeilings:
    import torch

    device = torch.device("cuda", 0)
    host = torch.empty(TRANSFER_BYTES, dtype=torch.uint8, pin_memory=True)
    here = torch.empty(TRANSFER_BYTES, dtype=torch.uint8, device=device)
    up = _rate(lambda: here.copy_(host, non_blocking=True), TRANSFER_BYTES, seconds)
    down = _rate(lambda: host.copy_(here, non_blocking=True), TRANSFER_BYTES, seconds)
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    copy = _rate(lambda: target.copy_(source), 2 * COPY_BYTES, seconds)
    return GpuCeilings(torch.cuda.get_device_name(0), up, down, copy, _dequant(device, seconds))


def _dequant(device: torch.device, seconds: float) -> float:
    import torch

    from weightkit.kernels.fp8_dequant import dequant

    count, rows, cols = STACK
    weight = torch.randint(0, 127, STACK, dtype=torch.uint8, device=device)
    scale = torch.full((count, -(-rows // BLOCK), -(-cols // BLOCK)), 0.01, device=device)
    out = torch.empty(STACK, dtype=torch.bfloat16, device=device)
    return _rate(lambda: dequant(weight, scale, out=out), 3 * weight.numel(), seconds)


def _rate(step: Callable[[], object], count: int, seconds: float) -> float:
    """Bytes a second of ``step``, which queues work on ``count`` bytes."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(rounds: int) -> float:
        start.record()
        for _ in range(rounds):
            step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    timed(2)  # compiles, and wakes the clocks
    rounds = max(3, min(1000, int(seconds / max(timed(3) / 3, 1e-6))))
    return count * rounds / timed(rounds)
