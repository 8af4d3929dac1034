"""The weights of an opened checkpoint, whatever its layout and dtypes, read when the model asks for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from weightkit.checkpoint import Checkpoint, Reader
from weightkit.checkpoint.dtypes import FLOAT_DTYPES
from weightkit.checkpoint.tensors import narrow
from weightkit.compute import choose_engine
from weightkit.compute.engines import DeviceName
from weightkit.errors import GenerationError
from weightkit.family import Architecture
from weightkit.machine import default_jobs
from weightkit.model.loading import Loader, torch_dtype
from weightkit.model.memory import FREE_SHARE, Kept, free_memory_bytes
from weightkit.transforms import cast

_ROUTER = (".mlp.gate.weight", ".mlp.gate.e_score_correction_bias")


class CheckpointWeights:
    """Weights by published name from a checkpoint: read, dequantized, moved to the device, kept while there is room.

    An FP8 or GPTQ weight first becomes what ``cast --to bf16`` makes of it (F16, F32 if the config says so), then the
    compute dtype, so that such a checkpoint and its cast generate the same tokens. Routers' tensors are F32.

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
        ScaleError: FP8 or GPTQ weights and scales that do not fit each other; all of them at once.
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
        engine = choose_engine(device)
        self.device = torch.device("cpu" if engine.name == "cpu" else "cuda")
        stored = {name: short for short, name in FLOAT_DTYPES.items()}[self.arch.dtype]
        self.dtype = torch_dtype(FLOAT_DTYPES[dtype or ("f32" if self.device.type == "cpu" else stored)])
        self._checkpoint = cast(checkpoint, stored)
        self._loader = Loader(Reader(checkpoint.stamps), engine, self.device)
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
        self._loader.reader.close()

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return self._loader.reader.bytes_read

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
        read = [self._loader.load(narrow(lazy, 0, row, 1), self._dtype_of(name)) for row in different.tolist()]
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
        return self._loader.load(self._checkpoint[name], self._dtype_of(name))

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(_ROUTER) else self.dtype
