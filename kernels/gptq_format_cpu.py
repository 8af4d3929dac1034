"""GPTQ dequantization on a CPU: the bits of ``gptq_format``, for machines without a GPU.

The compiled loop releases the GIL and runs on the caller's thread: callers run one tensor a thread. numba compiles it
once for a machine and keeps the result beside this file, or in the user's cache directory where that is read-only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightkit.errors import PlanError, ScaleError

_KINDS = {"BF16": 0, "F16": 1, "F32": 2}
_OUTPUTS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}

#: Inputs in a row that share a group, on average, from which they are worth a loop of their own.
_LONG_RUN = 16

I32 = npt.NDArray[np.int32]


def dequant_cpu(
    qweight: I32,
    qzeros: I32,
    scales: npt.NDArray[np.float16],
    g_idx: I32,
    out: npt.NDArray[Any],
    *,
    bits: int,
    zero_offset: int,
    dtype: str,
) -> None:
    """Write ``(code - zero) * float32(scale)``, rounded once to nearest even, into ``out``.

    Args:
        qweight: int32 [K * bits / 32, N].
        qzeros: int32 [groups, N * bits / 32].
        scales: float16 [groups, N].
        g_idx: int32 [K], each from 0 to groups - 1, in any order.
        out: [N, K] uint16 (BF16, F16) or uint32 (F32), contiguous: the bits of the result.
        bits: 4 or 8.
        zero_offset: 1 for ``checkpoint_format`` ``gptq``, 0 for ``gptq_v2``.
        dtype: ``BF16``, ``F16`` or ``F32``.

    Raises:
        ScaleError: operands that do not fit each other, or a ``g_idx`` that names no group.
        PlanError: another width, offset, dtype or output.
    """
    _check(qweight, qzeros, scales, g_idx, out, bits, zero_offset, dtype)
    if out.size == 0:
        return
    require_groups(g_idx, len(scales))
    from weightkit.kernels._gptq_numba import dequant_columns

    factors = np.ascontiguousarray(scales.T).astype(np.float32)
    dequant_columns(
        np.ascontiguousarray(qweight).view(np.uint32),
        factors,
        _zeros(qzeros, bits, zero_offset),
        np.ascontiguousarray(g_idx).view(np.uint32),
        _runs(g_idx),
        out,
        bits,
        _KINDS[dtype],
    )


def require_groups(g_idx: I32, groups: int, *, where: object = None) -> None:
    """Raise ``ScaleError`` where ``g_idx`` names a group that there is not; ``where`` is for the message."""
    if g_idx.size and not (int(g_idx.min()) >= 0 and int(g_idx.max()) < groups):
        raise ScaleError(
            "g_idx names groups that have no scale",
            where=where,
            expected=f"from 0 to {groups - 1}",
            found=f"{int(g_idx.min())} to {int(g_idx.max())}",
        )


def _zeros(qzeros: I32, bits: int, zero_offset: int) -> npt.NDArray[np.float32]:
    """The zeros of words [groups, N * bits / 32], as F32 [N, groups]."""
    largest = (1 << bits) - 1
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = np.ascontiguousarray(qzeros).view(np.uint32).T
    zeros = ((words[:, None, :] >> shifts[:, None]) + np.uint32(zero_offset)) & np.uint32(largest)
    return zeros.reshape(-1, words.shape[1]).astype(np.float32)


def _runs(g_idx: I32) -> npt.NDArray[np.int64]:
    """[R, 3]: first input, end and group of each run of inputs that share one. None where runs are short."""
    edges = np.flatnonzero(np.diff(g_idx)) + 1
    starts = np.concatenate([[0], edges])
    if len(starts) * _LONG_RUN > len(g_idx):
        return np.empty((0, 3), np.int64)
    ends = np.concatenate([edges, [len(g_idx)]])
    return np.stack([starts, ends, g_idx[starts]], axis=1).astype(np.int64)


def _check(
    qweight: I32,
    qzeros: I32,
    scales: npt.NDArray[np.float16],
    g_idx: I32,
    out: npt.NDArray[Any],
    bits: int,
    zero_offset: int,
    dtype: str,
) -> None:
    if bits not in (4, 8) or zero_offset not in (0, 1):
        raise PlanError(
            "no such GPTQ format", expected="4 or 8 bits, offset 0 or 1", found=f"{bits} bits, offset {zero_offset}"
        )
    if dtype not in _KINDS:
        raise PlanError("no such output of a dequantization", expected=", ".join(_KINDS), found=dtype)
    per_word = 32 // bits
    words, n = qweight.shape if qweight.ndim == 2 else (0, 0)
    groups = max(1, len(scales) if scales.ndim else 0)
    operands: dict[str, tuple[npt.NDArray[Any], npt.DTypeLike, tuple[int, ...]]] = {
        "qweight": (qweight, np.int32, (words, n // per_word * per_word)),
        "scales": (scales, np.float16, (groups, n)),
        "qzeros": (qzeros, np.int32, (groups, n // per_word)),
        "g_idx": (g_idx, np.int32, (words * per_word,)),
    }
    for name, (array, kind, shape) in operands.items():
        if array.dtype != kind or array.shape != shape:
            raise ScaleError(
                f"{name} does not fit a GPTQ weight [{n}, {words * per_word}] of {bits} bits",
                expected=f"{np.dtype(kind)} {list(shape)}",
                found=f"{array.dtype} {list(array.shape)}",
            )
    fits = out.dtype == _OUTPUTS[dtype] and out.shape == (n, words * per_word)
    if not (fits and out.flags.c_contiguous and out.flags.writeable):
        raise PlanError(
            f"output of a dequantization to {dtype} does not fit its weight",
            expected=f"writable, contiguous {np.dtype(_OUTPUTS[dtype])} {[n, words * per_word]}",
            found=f"{out.dtype} {list(out.shape)}",
        )
