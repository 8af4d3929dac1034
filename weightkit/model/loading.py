"""Lazy tensors to tensors on the device that computes: read, dequantized there, in strips."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from weightkit.checkpoint import Dequantized, GroupDequantized, LazyTensor, Reader
from weightkit.checkpoint.dtypes import TORCH_NAMES
from weightkit.checkpoint.reading import Bytes
from weightkit.checkpoint.tensors import size_bytes
from weightkit.compute import Engine, PackedWeight, evaluate, read_packed, strips
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
        self._scratch = torch.empty(0, dtype=torch.uint8)

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

    def evaluate(self, lazy: LazyTensor) -> Bytes:
        """The bytes of the dense tensor, in host memory; the same thread's next call may overwrite them."""
        return evaluate(lazy, self.reader, self.engine)

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory for a dequantized weight, which the next call hands out again; for the computing thread alone.

        None on a GPU, where memory costs nothing. On a CPU the pages of a fresh matrix cost more than filling it.
        """
        if self.device.type == "cuda":
            return None
        count = prod(shape) * dtype.itemsize
        if self._scratch.numel() < count:
            with torch.inference_mode(False):
                self._scratch = torch.empty(count, dtype=torch.uint8)
        return self._scratch[:count].view(dtype).view(*shape)

    def dequantize(
        self,
        lazy: Dequantized,
        codes: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """An FP8 weight in ``dtype``, in memory of its own, from its ``codes`` and ``scale``: flat U8, on one device.

        Args:
            lazy: says its shapes, and the dtype that it is rounded to first.
            out: where to put it, on a CPU; None for new memory.
        """
        if codes.is_cuda:
            from weightkit.kernels.fp8_dequant import dequant

            scales = scale.view(torch.float32).view(lazy.scale.shape)
            return dequant(codes.view(lazy.weight.shape), scales, torch_dtype(lazy.dtype)).to(dtype)
        scales_array = scale.numpy().view(np.float32).reshape(lazy.scale.shape)
        values = self.engine.dequantize(codes.numpy().reshape(lazy.weight.shape), scales_array, lazy.dtype)
        return self._own(values, lazy, dtype, out)

    def dequantize_groups(
        self,
        lazy: GroupDequantized,
        stored: Sequence[torch.Tensor],
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A GPTQ weight from ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` in memory; as ``dequantize``."""
        kinds = (torch.int32, torch.int32, torch.float16, torch.int32)
        shapes = (lazy.qweight.shape, lazy.qzeros.shape, lazy.scales.shape, lazy.g_idx.shape)
        qweight, qzeros, scales, g_idx = (
            part.view(kind).view(shape) for part, kind, shape in zip(stored, kinds, shapes, strict=True)
        )
        if qweight.is_cuda:
            from weightkit.kernels.gptq_format import dequant

            kind = torch_dtype(lazy.dtype)
            return dequant(qweight, qzeros, scales, g_idx, lazy.bits, lazy.zero_offset, kind).to(dtype)
        packed = PackedWeight(
            qweight.numpy(), qzeros.numpy(), scales.numpy(), g_idx.numpy(), lazy.bits, lazy.zero_offset
        )
        return self._own(self.engine.dequantize_groups(packed, lazy.dtype), lazy, dtype, out)

    def _evaluate(self, lazy: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own memory on the device."""
        if isinstance(lazy, Dequantized) and self.device.type == "cuda":
            return self._dequantize_on_gpu(lazy, dtype)
        if isinstance(lazy, GroupDequantized) and self.device.type == "cuda":
            return self._dequantize_groups_on_gpu(lazy, dtype)
        return self._own(evaluate(lazy, self.reader, self.engine), lazy, dtype)

    def _own(
        self, values: Bytes, lazy: LazyTensor, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scratch bytes of the dense tensor as a tensor of its own memory on the device."""
        held = torch.from_numpy(values).view(torch_dtype(lazy.dtype)).view(lazy.shape)
        return held.to(self.device, dtype, copy=True) if out is None else out.copy_(held)

    def _dequantize_on_gpu(self, lazy: Dequantized, dtype: torch.dtype) -> torch.Tensor:
        """FP8 codes cross the bus, not the wider result."""

        def upload(part: LazyTensor, purpose: str) -> torch.Tensor:
            pinned = self.engine.buffer(purpose, size_bytes(part))
            return torch.from_numpy(self.reader.read(part, pinned)).to(self.device)  # done when it returns

        return self.dequantize(lazy, upload(lazy.weight, "weight"), upload(lazy.scale, "scale"), dtype)

    def _dequantize_groups_on_gpu(self, lazy: GroupDequantized, dtype: torch.dtype) -> torch.Tensor:
        """Packed codes cross the bus."""
        packed = read_packed(lazy, self.reader, self.engine)
        stored = [
            torch.from_numpy(array.reshape(-1).view(np.uint8)).to(self.device)  # done when it returns
            for array in (packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
        ]
        return self.dequantize_groups(lazy, stored, dtype)


def torch_dtype(dtype: str) -> torch.dtype:
    """The float dtype that safetensors spells so. Raises ``UnsupportedError`` for what cannot be computed with."""
    if dtype not in TORCH_NAMES:
        raise UnsupportedError(
            "no weights can be computed with in this dtype", expected=", ".join(TORCH_NAMES), found=dtype
        )
    found: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
    return found
