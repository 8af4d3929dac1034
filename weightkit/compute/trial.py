"""A GPU's first strips, held against the CPU's bit for bit: kernels are loaded, and a GPU that computes wrongly, or a
compiler that translates wrongly for it, is found before a byte of it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np

from weightkit.checkpoint.reading import Bytes, Reader
from weightkit.checkpoint.tensors import LazyTensor, size_bytes
from weightkit.compute.engines import UNUSABLE, CpuEngine, Engine, reason
from weightkit.compute.evaluate import evaluate
from weightkit.errors import DeviceError, ScaleError

#: What to do about a GPU that computes otherwise than the CPU.
LEAVE_OUT = (
    "Leave it out with CUDA_VISIBLE_DEVICES, or use --device cpu. Report the GPU and the versions of torch and triton."
)
#: Of a pattern that what is read repeats; odd in parts, so that rows differ.
PATTERN = 251 * 256


class Trial:
    """The samples' bytes, as the CPU computes them of made-up contents.

    Args:
        samples: strips of each kind of tensor that is to be computed.
        step: called before each of them, to end early.
    """

    def __init__(self, samples: Sequence[LazyTensor], step: Callable[[], None] = lambda: None) -> None:
        self._step, reader, cpu = step, MadeUp(), CpuEngine()
        self._expected: list[tuple[LazyTensor, Bytes]] = []
        for sample in samples:
            step()
            try:
                self._expected.append((sample, evaluate(sample, reader, cpu).copy()))
            except ScaleError:  # of a GPTQ strip whose groups the made-up order does not name
                continue

    def require(self, engine: Engine, name: str) -> None:
        """Raise ``DeviceError`` where the engine fails, in whatever way, or gives other bits."""
        reader = MadeUp()
        for sample, expected in self._expected:
            self._step()
            with first_use(name):
                wrong = np.count_nonzero(evaluate(sample, reader, engine) != expected)
            if wrong:
                raise DeviceError(
                    "the GPU computes other bits than the CPU",
                    where=name,
                    found=f"{wrong:,} of {len(expected):,} bytes differ of {type(sample).__name__} {sample.dtype}",
                    fix=LEAVE_OUT,
                )


@contextmanager
def first_use(name: object) -> Iterator[None]:
    """Say as a ``DeviceError`` what the GPU ``name`` fails with: a driver, torch, Triton or the compilers that it calls
    may do so in any way."""
    try:
        yield
    except DeviceError:
        raise
    except Exception as exc:
        raise DeviceError(UNUSABLE, where=name, found=reason(exc), fix="Use --device cpu.") from exc


class MadeUp(Reader):
    """Reads contents that no file has: all FP8 codes, scales of usual size, floats of which the first half of the rows
    came from FP8, words of random codes, groups in order of the first."""

    def read(self, tensor: LazyTensor, out: Bytes | None = None) -> Bytes:
        out = np.empty(size_bytes(tensor), np.uint8) if out is None else out
        if tensor.dtype == "I32" and len(tensor.shape) == 1:
            out[:] = 0  # g_idx
        elif tensor.dtype == "BF16":
            columns = tensor.shape[-1] if tensor.shape else 1
            rows = len(out) // (4 * columns)
            half = rows * columns * 2
            out[:half] = _came_from_fp8(rows, columns)
            out[half:] = np.resize(_floats("BF16"), len(out) - half)
        else:
            out[:] = np.resize(_floats(tensor.dtype), len(out))
        return out


@lru_cache(maxsize=16)
def _floats(dtype: str) -> Bytes:
    """Numbers around 1 of a float dtype, both signs but for F32 and F16, which scales are; any bytes of another."""
    random = np.random.default_rng(0)
    sizes = 2.0 ** random.uniform(-12, 2, PATTERN)
    if dtype == "F32":
        return sizes.astype(np.float32).view(np.uint8)
    if dtype == "F16":
        return sizes.astype(np.float16).view(np.uint8)
    if dtype == "BF16":
        signed = (sizes * random.choice([-1, 1], PATTERN)).astype(np.float32).view(np.uint32)
        brain: Bytes = (signed >> 16).astype(np.uint16).view(np.uint8)
        return brain
    return np.frombuffer(random.bytes(PATTERN), np.uint8)


def _came_from_fp8(rows: int, columns: int) -> Bytes:
    """BF16 of FP8 codes, with a scale a block, and another largest code, 448 to 240, in each of eight side by side.

    A kernel that is translated wrongly may be right about some scales: so no two blocks are alike.
    """
    random = np.random.default_rng(1)
    codes = np.resize(random.permutation(np.arange(PATTERN) % 256).astype(np.uint8), (rows, columns))
    limits = np.repeat(0x7E - np.arange(-(-columns // 128)) % 8, 128)[:columns].astype(np.uint8)
    codes = np.minimum(codes & 0x7F, limits) | codes & 0x80
    scales = (2.0 ** random.uniform(-14, -2, (-(-rows // 128), -(-columns // 128)))).astype(np.float32)
    values: Bytes = CpuEngine().dequantize(codes, scales, "BF16").copy()
    return values
