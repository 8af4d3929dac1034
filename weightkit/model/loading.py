"""Lazy tensors to tensors on the device that computes: read, dequantized there, in strips."""

from __future__ import annotations

import torch

from weightkit.checkpoint import Dequantized, GroupDequantized, LazyTensor, Reader
from weightkit.checkpoint.dtypes import TORCH_NAMES
from weightkit.checkpoint.tensors import size_bytes
from weightkit.compute import Engine, evaluate, read_packed, strips
from weightkit.errors import UnsupportedError

STRIP_BYTES = 64 << 20
"""A tensor is read in strips of about this size, so that scratch memory does not grow with the largest one."""

_INTEGERS = {"I32": torch.int32, "I64": torch.int64, "U8": torch.uint8}


class Loader:
    """Loads tensors to one device. Threads may share it; each loads on its own current queue.

    Args:
        reader: of the checkpoint's files.
        engine: what computes where the device does not.
        device: where the tensors go.
    """

    def __init__(self, reader: Reader, engine: Engine, device: torch.device) -> None:
        self.reader = reader
        self.engine = engine
        self.device = device

    def load(self, lazy: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in a float ``dtype``, in memory of its own on the device."""
        parts = list(strips(lazy, STRIP_BYTES))
        if len(parts) == 1:
            return self._evaluate(lazy, dtype)
        whole, row = torch.empty(lazy.shape, dtype=dtype, device=self.device), 0
        for part in parts:
            whole[row : row + part.shape[0]] = self._evaluate(part, dtype)
            row += part.shape[0]
        return whole

    def raw(self, lazy: LazyTensor) -> torch.Tensor:
        """A plain tensor as it is stored, on the device."""
        dtype = _INTEGERS[lazy.dtype] if lazy.dtype in _INTEGERS else torch_dtype(lazy.dtype)
        return torch.from_numpy(self.reader.read(lazy)).view(dtype).view(lazy.shape).to(self.device)

    def _evaluate(self, lazy: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own memory on the device."""
        if isinstance(lazy, Dequantized) and self.device.type == "cuda":
            return self._dequantize_on_gpu(lazy).to(dtype)
        if isinstance(lazy, GroupDequantized) and self.device.type == "cuda":
            return self._dequantize_groups_on_gpu(lazy).to(dtype)
        values = torch.from_numpy(evaluate(lazy, self.reader, self.engine))
        return values.view(torch_dtype(lazy.dtype)).view(lazy.shape).to(self.device, dtype, copy=True)

    def _dequantize_on_gpu(self, lazy: Dequantized) -> torch.Tensor:
        """FP8 codes cross the bus, not the wider result."""
        from weightkit.kernels.fp8_dequant import dequant

        def upload(part: LazyTensor, purpose: str) -> torch.Tensor:
            pinned = self.engine.buffer(purpose, size_bytes(part))
            return torch.from_numpy(self.reader.read(part, pinned)).to(self.device)  # done when it returns

        codes = upload(lazy.weight, "weight").view(lazy.weight.shape)
        scale = upload(lazy.scale, "scale").view(torch.float32).view(lazy.scale.shape)
        return dequant(codes, scale, torch_dtype(lazy.dtype))

    def _dequantize_groups_on_gpu(self, lazy: GroupDequantized) -> torch.Tensor:
        """Packed codes cross the bus."""
        from weightkit.kernels.gptq_format import dequant

        packed = read_packed(lazy, self.reader, self.engine)
        qweight, qzeros, scales, g_idx = (
            torch.from_numpy(array).to(self.device)  # done when it returns
            for array in (packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
        )
        return dequant(qweight, qzeros, scales, g_idx, lazy.bits, lazy.zero_offset, torch_dtype(lazy.dtype))


def torch_dtype(dtype: str) -> torch.dtype:
    """The float dtype that safetensors spells so. Raises ``UnsupportedError`` for what cannot be computed with."""
    if dtype not in TORCH_NAMES:
        raise UnsupportedError(
            "no weights can be computed with in this dtype", expected=", ".join(TORCH_NAMES), found=dtype
        )
    found: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
    return found
