"""The weights of an opened checkpoint, whatever its layout and dtypes, read when the model asks for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from weightkit.checkpoint import Checkpoint, Dequantized, LazyTensor, Reader
from weightkit.checkpoint.dtypes import FLOAT_DTYPES, TORCH_NAMES
from weightkit.checkpoint.tensors import narrow, size_bytes
from weightkit.compute import choose_engine, evaluate, strips
from weightkit.compute.engines import DeviceName
from weightkit.errors import GenerationError, UnsupportedError
from weightkit.family import Architecture
from weightkit.machine import default_jobs
from weightkit.model.memory import FREE_SHARE, Kept, free_memory_bytes
from weightkit.transforms import cast

STRIP_BYTES = 64 << 20
"""A weight is read in strips of about this size, so that scratch memory does not grow with the largest weight."""

_ROUTER = (".mlp.gate.weight", ".mlp.gate.e_score_correction_bias")


class CheckpointWeights:
    """Weights by published name from a checkpoint: read, dequantized, moved to the device, kept while there is room.

    An FP8 weight first becomes what ``cast --to bf16`` makes of it (F16, F32 if the config says so), then the compute
    dtype, so that an FP8 checkpoint and its cast generate the same tokens. Routers' tensors are F32.

    The compute dtype is the config's on a GPU and F32 on a CPU. There a product with one token took 3.0 ms in F32 and
    7.8 in BF16 (2048 x 7168, two cores with AVX-512 BF16); with 64 tokens BF16 takes half the time, and always half the
    memory, so that it may be the better choice for a model that fills the memory.

    Args:
        checkpoint: opened in any layout.
        device: ``auto`` takes a GPU where there is one.
        dtype: ``bf16``, ``f16`` or ``f32``; None for the default above.
        memory_bytes: most that kept weights may take; None for four fifths of what is free.
        jobs: weights read ahead at once.

    Attributes:
        arch: the architecture that the config describes.
        device, dtype: where and in what the model computes.

    Raises:
        ConfigError: not a config of the family.
        ScaleError: FP8 weights and scales that do not fit each other; all of them at once.
        DeviceError: no such device.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: DeviceName = "auto",
        dtype: str | None = None,
        memory_bytes: int | None = None,
        jobs: int | None = None,
    ) -> None:
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise GenerationError("unknown dtype", where="dtype", expected=", ".join(FLOAT_DTYPES), found=repr(dtype))
        self.arch = Architecture.from_config(checkpoint.config, where=f"the config of {checkpoint.root}")
        self._engine = choose_engine(device)
        self.device = torch.device("cpu" if self._engine.name == "cpu" else "cuda")
        stored = {name: short for short, name in FLOAT_DTYPES.items()}[self.arch.dtype]
        self.dtype = _torch_dtype(FLOAT_DTYPES[dtype or ("f32" if self.device.type == "cpu" else stored)])
        self._checkpoint = cast(checkpoint, stored)
        self._reader = Reader(checkpoint.stamps)
        budget = int(free_memory_bytes(self.device) * FREE_SHARE) if memory_bytes is None else memory_bytes
        self._kept = Kept(budget)
        self._jobs = jobs or default_jobs()
        self._pool = ThreadPoolExecutor(self._jobs, thread_name_prefix="weights")
        self._ahead: dict[str, Future[torch.Tensor]] = {}
        self._wanted: deque[str] = deque()

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead and close the files. Weights that were handed out stay valid."""
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return self._reader.bytes_read

    @property
    def kept_bytes(self) -> int:
        """Bytes of weights kept in memory."""
        return self._kept.size_bytes

    def get(self, name: str) -> torch.Tensor:
        """The weight, in the compute dtype on the device. See ``Weights.get``."""
        tensor = self._kept.get(name)
        if tensor is None:
            ahead = self._ahead.pop(name, None)
            self._read_ahead()
            tensor = self._load(name) if ahead is None else ahead.result()
            self._kept.put(name, tensor)
        return tensor

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix, each read by itself unless the whole is kept. See ``Weights.rows``."""
        whole = self._kept.get(name)
        if whole is not None:
            return whole[ids.to(whole.device)]
        different, places = torch.unique(ids.cpu(), return_inverse=True)
        lazy = self._checkpoint[name]
        read = [self._evaluate(narrow(lazy, 0, row, 1), self._dtype_of(name)) for row in different.tolist()]
        found: torch.Tensor = torch.cat(read)[places.to(self.device)]
        return found

    def prefetch(self, names: Sequence[str]) -> None:
        """Start to read what is asked for next, a few weights at a time. What was wanted before is dropped."""
        self._wanted = deque(name for name in names if name not in self._kept)
        self._ahead = {name: self._ahead[name] for name in self._wanted if name in self._ahead}
        self._read_ahead()

    def _read_ahead(self) -> None:
        while self._wanted and len(self._ahead) < self._jobs:
            name = self._wanted.popleft()
            if name not in self._ahead:
                self._ahead[name] = self._pool.submit(self._load, name)

    def _load(self, name: str) -> torch.Tensor:
        """Read a weight whole. Runs in any thread."""
        lazy = self._checkpoint[name]
        dtype = self._dtype_of(name)
        parts = list(strips(lazy, STRIP_BYTES))
        if len(parts) == 1:
            return self._evaluate(lazy, dtype)
        whole, row = torch.empty(lazy.shape, dtype=dtype, device=self.device), 0
        for part in parts:
            whole[row : row + part.shape[0]] = self._evaluate(part, dtype)
            row += part.shape[0]
        return whole

    def _evaluate(self, lazy: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own memory on the device."""
        if isinstance(lazy, Dequantized) and self.device.type == "cuda":
            return self._dequantize_on_gpu(lazy).to(dtype)
        raw = torch.from_numpy(evaluate(lazy, self._reader, self._engine))
        return raw.view(_torch_dtype(lazy.dtype)).view(lazy.shape).to(self.device, dtype, copy=True)

    def _dequantize_on_gpu(self, lazy: Dequantized) -> torch.Tensor:
        """FP8 codes cross the bus, not the wider result."""
        from weightkit.kernels.fp8_dequant import dequant

        def upload(part: LazyTensor, purpose: str) -> torch.Tensor:
            pinned = self._engine.buffer(purpose, size_bytes(part))
            return torch.from_numpy(self._reader.read(part, pinned)).to(self.device)  # done when it returns

        codes = upload(lazy.weight, "weight").view(lazy.weight.shape)
        scale = upload(lazy.scale, "scale").view(torch.float32).view(lazy.scale.shape)
        return dequant(codes, scale, _torch_dtype(lazy.dtype))

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(_ROUTER) else self.dtype


def _torch_dtype(dtype: str) -> torch.dtype:
    if dtype not in TORCH_NAMES:
        raise UnsupportedError(
            "no weights can be computed with in this dtype", expected=", ".join(TORCH_NAMES), found=dtype
        )
    found: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
    return found
