"""Weights in memory as they are stored: FP8 codes with scales, integers with theirs, or floats.

One flat buffer a weight, so that it is read, moved and evicted as one. FP8 takes half of what BF16 does, 4 bits a
quarter. Kernels multiply with codes and scales as they lie (see ``products``); where there are none, and where a whole
weight is asked for, it is dequantized at each use, in some 20 microseconds for a matrix of an expert of DeepSeek-V3 on
a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from weightkit.checkpoint import Dequantized, GroupDequantized, LazyTensor
from weightkit.checkpoint.reading import Bytes
from weightkit.checkpoint.tensors import is_plain, size_bytes, stored_parts
from weightkit.compute import strips
from weightkit.kernels.gptq_format_cpu import require_groups
from weightkit.model.loading import STRIP_BYTES, Loader, torch_dtype
from weightkit.model.products import Form, Groups, Operands, groups_of

PART_ALIGNMENT = 16
"""Parts begin at multiples of so many bytes: kernels load 16 at once."""


@dataclass(frozen=True)
class Packed:
    """How one weight lies in a flat buffer.

    Attributes:
        lazy: the weight, in the dtype that the config names.
        parts: the plain tensors that it is made from, and where in the buffer each begins. A weight that cannot be cut
            into them, such as a part of an FP8 matrix that begins inside a block, is one part, already dequantized.
        size_bytes: of the buffer.
        form: what kernels make of the buffer, by what is known before it is read; None if nothing.
        groups: of a GPTQ weight with a form, once it was read; None where its values are not what the kernels take.
    """

    lazy: LazyTensor
    parts: tuple[LazyTensor, ...] = field(init=False)
    starts: tuple[int, ...] = field(init=False)
    size_bytes: int = field(init=False)
    form: Form | None = field(init=False)
    groups: Groups | None = field(init=False, default=None, compare=False)

    def __post_init__(self) -> None:
        parts = _parts(self.lazy)
        starts, end = [], 0
        for part in parts:
            starts.append(-(-end // PART_ALIGNMENT) * PART_ALIGNMENT)
            end = starts[-1] + size_bytes(part)
        form = Form.of(self.lazy) if len(parts) > 1 else None
        for name, value in (("parts", parts), ("starts", tuple(starts)), ("size_bytes", end), ("form", form)):
            object.__setattr__(self, name, value)

    def read(self, out: Bytes, loader: Loader) -> None:
        """Read the weight into ``out`` [size_bytes]. Any thread may.

        Raises:
            FormatError, ScaleError: files that end early; a group number outside the scales.
        """
        for part, start in zip(self.parts, self.starts, strict=True):
            target = out[start : start + size_bytes(part)]
            if is_plain(part):
                loader.reader.read(part, target)
                continue
            done = 0
            for strip in strips(part, STRIP_BYTES):
                count = size_bytes(strip)
                target[done : done + count] = loader.evaluate(strip)
                done += count
        if isinstance(self.lazy, GroupDequantized) and len(self.parts) == 4:
            self._see_groups(out, self.lazy)

    def _see_groups(self, read: Bytes, lazy: GroupDequantized) -> None:
        """Count groups from 0, check them, and note whether the kernels know them. All reads note the same."""
        qzeros, g_idx = (
            read[self.starts[i] : self.starts[i] + size_bytes(self.parts[i])].view(np.int32) for i in (1, 3)
        )
        g_idx -= np.int32(lazy.first_group)
        require_groups(g_idx, lazy.scales.shape[0], where=next(stored_parts(lazy.g_idx)).path)
        if self.form is not None:
            object.__setattr__(self, "groups", groups_of(qzeros, g_idx, lazy))

    def operands(self, buffer: torch.Tensor) -> Operands | None:
        """Codes and scales in the ``buffer`` [size_bytes] U8 of a weight that was read, for the kernels; None for a
        weight that they do not take."""
        form = self.form
        if form is None:
            return None
        stored = self.stored(buffer)
        if form.bits is None:
            codes, scale = self.parts
            return Operands(form, stored[0].view(codes.shape), stored[1].view(torch.float32).view(scale.shape))
        if self.groups is None:
            return None
        qweight, _, scales, _ = self.parts
        words, factors = stored[0].view(torch.int32), stored[2].view(torch.float16)
        return Operands(form, words.view(qweight.shape), factors.view(scales.shape), self.groups)

    def linear(self, buffer: torch.Tensor, x: torch.Tensor, loader: Loader) -> torch.Tensor:
        """``x`` [..., in] times the transpose of the weight, dequantized: [..., out], in ``x``'s dtype."""
        scratch = loader.scratch(self.lazy.shape, x.dtype)
        return torch.nn.functional.linear(x, self.dense(buffer, x.dtype, loader, scratch))

    def own(self, buffer: torch.Tensor, dtype: torch.dtype, loader: Loader) -> torch.Tensor:
        """As ``dense``, in memory of its own in any case."""
        found = self.dense(buffer, dtype, loader)
        return found.clone() if found.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() else found

    def dense(
        self, buffer: torch.Tensor, dtype: torch.dtype, loader: Loader, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The weight in a float ``dtype``, on the device of ``buffer`` [size_bytes] U8. It may be a view of the buffer.

        An FP8 or GPTQ weight is rounded once to the dtype that the config names, then cast. ``out``: where to put it,
        on a CPU, if it is no such view.
        """
        stored = self.stored(buffer)
        if isinstance(self.lazy, Dequantized) and len(stored) == 2:
            return loader.dequantize(self.lazy, stored[0], stored[1], dtype, out)
        if isinstance(self.lazy, GroupDequantized) and len(stored) == 4:
            return loader.dequantize_groups(self.lazy, stored, dtype, out)
        values = stored[0].view(torch_dtype(self.lazy.dtype)).view(self.lazy.shape)
        return values.to(dtype) if out is None or values.dtype == dtype else out.copy_(values)

    def stored(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The parts, flat U8 views of the buffer: weight and scale; qweight, qzeros, scales, g_idx; or values."""
        return [buffer[start : start + size_bytes(part)] for part, start in zip(self.parts, self.starts, strict=True)]


def _parts(lazy: LazyTensor) -> tuple[LazyTensor, ...]:
    match lazy:
        case Dequantized(weight, scale) if is_plain(weight) and is_plain(scale):
            return (weight, scale)
        case GroupDequantized(qweight, qzeros, scales, g_idx) if all(map(is_plain, (qweight, qzeros, scales, g_idx))):
            return (qweight, qzeros, scales, g_idx)
    return (lazy,)
