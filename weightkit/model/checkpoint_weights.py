"""The weights of an opened checkpoint, whatever its layout and dtypes, read when the model asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from weightkit.checkpoint import Checkpoint, LazyTensor, Reader
from weightkit.checkpoint.direct import DirectReader
from weightkit.checkpoint.dtypes import FLOAT_DTYPES
from weightkit.checkpoint.tensors import elements, narrow, size_bytes
from weightkit.compute import open_engine
from weightkit.compute.engines import DeviceName
from weightkit.errors import GenerationError, SpaceError
from weightkit.family import Architecture, expert_of, is_mtp, layer_of
from weightkit.machine import JOBS, available_memory_bytes
from weightkit.model.checked_products import CheckedProducts
from weightkit.model.loading import Loader, torch_dtype
from weightkit.model.memory import FREE_SHARE, aligned, free_memory_bytes
from weightkit.model.packed import Packed
from weightkit.model.stores import UNIT_BYTES, CacheUse, Resident, Source, Store, packed_units
from weightkit.model.streamed import Streamed
from weightkit.model.weights import Product
from weightkit.transforms import cast
from weightkit.units import human_bytes

ROUTER = (".mlp.gate.weight", ".mlp.gate.e_score_correction_bias")
_UNUSED = (".indexer.", "rotary_emb.inv_freq")
_EMBEDDING = "model.embed_tokens.weight"

"""Fewest readers where weights are streamed: they wait for the disk, not for cores."""


@dataclass(frozen=True)
class WeightSizes:
    """What the weights take that generation needs: no MTP layers, no indexers; of an untied embedding only rows.

    Attributes:
        always: bytes, as they are stored, of what every token needs.
        experts: bytes of all routed experts, as they are stored.
        dense: bytes of both in the compute dtype.
        expert_layers: layers with routed experts.
        largest_expert: bytes of the largest of an expert's matrices, as it is stored.
        largest: bytes of the largest unit that is kept as one, as it is stored.
        largest_dense: bytes of such a unit in the compute dtype.
        attention: bytes of the attention of one layer in the compute dtype, the most of all layers.
        row: bytes of an embedding's row, as it is stored.
    """

    always: int
    experts: int
    dense: int
    expert_layers: int
    largest_expert: int
    largest: int
    largest_dense: int
    attention: int
    row: int

    @property
    def total(self) -> int:
        """Bytes of all, as they are stored."""
        return self.always + self.experts


class CheckpointWeights:
    """Weights by published name from a checkpoint: read, on the device, multiplied with, kept while there is room.

    An FP8 or GPTQ weight first becomes what ``cast --to bf16`` makes of it (F16, F32 if the config says so), then the
    compute dtype. Routers' tensors are F32.

    The compute dtype is the config's on a GPU and F32 on a CPU. There a product with one token took 3.0 ms in F32 and
    7.8 in BF16 (2048 x 7168, two cores with AVX-512 BF16); with 64 tokens BF16 takes half the time, and always half the
    memory, so that it may be the better choice for a model that fills the memory.

    A GPU that multiplies BF16 (compute capability 8.0 and later) multiplies with FP8 and GPTQ weights as they are
    stored (``Products``): the same BF16 values, made in registers, summed in another order than a matrix library's. So
    they are kept as they are stored however much memory there is (``Streamed``), first on the device, then in host
    memory beside it; what does not fit in either is read from the files again, past the page cache. Attention's
    ``kv_b_proj``, where it is absorbed, and GPTQ weights with activation order or zeros that differ are dequantized at
    each use.

    Elsewhere, and where nothing is quantized, all weights are kept in the compute dtype if they fit so (``Resident``),
    and otherwise as they are stored and dequantized at each use: the same values and products. Thus an FP8 or GPTQ
    checkpoint and its cast generate the same tokens where weights are dequantized, and tokens never depend on memory.

    Args:
        checkpoint: opened in any layout.
        device: ``auto`` takes a GPU where there is one.
        dtype: ``bf16``, ``f16`` or ``f32``; None for the default above.
        memory_bytes: most that kept weights may take on the device; None for four fifths of what is free.
        host_bytes: most that they may take in host memory beside a GPU; None for four fifths of what is available. On a
            CPU there is no memory beside the device's, and None is 0.
        stream: whether weights are read as they are needed although all would fit, or must not be where they do not;
            None: only if they do not fit.
        jobs: weights read at once.
        dequantize: multiply with dequantized weights on a GPU too.
        share: of the tensors, dequantized but not read, those and those parts that this process needs, such as
            ``rank_share`` cuts; None for all.

    Attributes:
        arch: the architecture that the config describes.
        device, dtype: where and in what the model computes.
        products: what multiplies with weights as they are stored. May be set to None, before a first weight is asked
            for, to dequantize all of them.

    Raises:
        ConfigError: not a config of the family.
        ScaleError: FP8 or GPTQ weights and scales that do not fit each other; all of them at once.
        DeviceError: no such device, or a GPU that dequantizes otherwise than the CPU; at a weight's first product, one
            that multiplies otherwise.
        SpaceError: at the first use, or by ``limit``: ``stream`` is False and they do not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: DeviceName = "auto",
        dtype: str | None = None,
        memory_bytes: int | None = None,
        host_bytes: int | None = None,
        stream: bool | None = None,
        jobs: int | None = None,
        dequantize: bool = False,
        share: Callable[[Checkpoint], Checkpoint] | None = None,
    ) -> None:
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise GenerationError("unknown dtype", where="dtype", expected=", ".join(FLOAT_DTYPES), found=repr(dtype))
        self.arch = Architecture.from_config(checkpoint.config, where=f"the config of {checkpoint.root}")
        stored = {name: short for short, name in FLOAT_DTYPES.items()}[self.arch.dtype]
        whole = cast(checkpoint, stored)
        self._checkpoint = whole if share is None else share(whole)
        self._engine = open_engine(device, (tensor for _, tensor in self._needed()))
        on_cpu = self._engine.name == "cpu"
        # the index is named, because readers' threads have a current device of theirs
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        self.dtype = torch_dtype(FLOAT_DTYPES[dtype or ("f32" if self.device.type == "cpu" else stored)])
        self._memory_bytes, self._host_bytes, self._stream = memory_bytes, host_bytes, stream
        self._jobs = jobs
        self.products = None if dequantize else CheckedProducts.of(self.device, self.dtype)

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead and close the files. Weights that were handed out stay valid."""
        if self.is_open:
            self._store.close()
            self._loader.reader.close()

    @property
    def is_open(self) -> bool:
        """Whether a weight was asked for already."""
        return "_store" in self.__dict__

    def limit(self, memory_bytes: int, host_bytes: int) -> None:
        """Set the two budgets anew, before the first weight is asked for.

        Raises:
            GenerationError: a weight was asked for already.
            SpaceError: ``stream`` is False and the weights do not fit.
        """
        if self.is_open:
            raise GenerationError("the memory for weights is in use already", where=self._checkpoint.root)
        self._memory_bytes, self._host_bytes = memory_bytes, host_bytes
        self._require_fit()

    @cached_property
    def sizes(self) -> WeightSizes:
        """What the weights take."""
        units = {name: sum(sizes) for name, sizes in self._unit_sizes.items()}
        routed = {name: size for name, size in units.items() if expert_of(name) is not None}
        dense = {name: elements(tensor) * self._dtype_of(name).itemsize for name, tensor in self._needed()}
        attention: dict[int | None, int] = {}
        for name, size in dense.items():
            if ".self_attn." in name:
                attention[layer_of(name)] = attention.get(layer_of(name), 0) + size
        widened = self.dtype.itemsize / torch_dtype(self.arch.dtype).itemsize
        embedding = self._checkpoint[_EMBEDDING]
        return WeightSizes(
            always=sum(units.values()) - sum(routed.values()),
            experts=sum(routed.values()),
            dense=sum(dense.values()),
            expert_layers=sum(map(self.arch.is_moe_layer, range(self.arch.num_hidden_layers))),
            largest_expert=max(routed.values(), default=0),
            largest=max((size for sizes in self._unit_sizes.values() for size in sizes), default=0),
            largest_dense=int(max((min(size, UNIT_BYTES * widened) for size in dense.values()), default=0)),
            attention=max(attention.values(), default=0),
            row=size_bytes(embedding) // embedding.shape[0],
        )

    @property
    def memory_bytes(self) -> int:
        """Most that kept weights may take on the device."""
        if self._memory_bytes is None:
            self._memory_bytes = int(free_memory_bytes(self.device) * FREE_SHARE)
        return self._memory_bytes

    @property
    def host_memory_bytes(self) -> int:
        """Most that they may take in host memory beside it."""
        if self._host_bytes is None:
            on_cpu = self.device.type == "cpu"
            self._host_bytes = 0 if on_cpu else int(available_memory_bytes() * FREE_SHARE)
        return self._host_bytes

    @cached_property
    def packed_bytes(self) -> int:
        """What all weights take as they are stored, to the byte: each unit begins at a multiple of ``ALIGNMENT``."""
        return sum(aligned(size) for sizes in self._unit_sizes.values() for size in sizes)

    @property
    def may_stream(self) -> bool | None:
        """The argument ``stream``."""
        return self._stream

    @property
    def multiplies_stored(self) -> bool:
        """Whether there are weights that are multiplied with as they are stored."""
        return self.products is not None and self._has_forms

    @property
    def fitting_bytes(self) -> int:
        """The least memory on the device in which all weights fit, so that none is read twice."""
        return self.packed_bytes if self.multiplies_stored else min(self.sizes.dense, self.packed_bytes)

    @property
    def is_resident(self) -> bool:
        """Whether all weights stay on the device in the compute dtype."""
        return not self._stream and not self.multiplies_stored and self.sizes.dense <= self.memory_bytes

    @property
    def is_streamed(self) -> bool:
        """Whether files are read again while generating, or may be."""
        return bool(self._stream) or (not self.is_resident and self.packed_bytes > self.memory_bytes)

    @property
    def files(self) -> dict[str, int]:
        """The files that weights come from: path to size in bytes."""
        return {path: stamp.size_bytes for path, stamp in self._checkpoint.stamps.items()}

    @property
    def jobs(self) -> int:
        """Weights read at once."""
        return self._jobs or JOBS

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return self._loader.reader.bytes_read if self.is_open else 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of weights kept on the device."""
        return self._store.device_bytes if self.is_open else 0

    @property
    def host_kept_bytes(self) -> int:
        """Bytes of weights kept in host memory beside it."""
        return self._store.host_bytes if self.is_open else 0

    @property
    def cache_use(self) -> CacheUse:
        """How often routed experts were found where; a copy."""
        return self._store.use.copy() if self.is_open else CacheUse()

    def get(self, name: str) -> torch.Tensor:
        """The weight, in the compute dtype on the device. See ``Weights.get``."""
        return self._store.get(name)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in] times the transpose of the weight ``name`` [out, in]: [..., out], in ``x``'s dtype."""
        return self._store.linear(name, x)

    def held_product(self, name: str) -> Product | None:
        """The product with a weight that is multiplied with as it is stored, read once and held; None for any other.
        See ``Holds.held_product``."""
        return self._store.held_product(name)

    def takes_groups(self, names: Sequence[str]) -> bool:
        """Whether ``grouped`` serves these: all stored as kernels take them. See ``Groups.takes_groups``."""
        return self.products is not None and self._store.takes_groups(names)

    def grouped(
        self, names: Sequence[str], x: torch.Tensor, counts: Sequence[int], starts: Sequence[int]
    ) -> torch.Tensor:
        """Products of several weights, each with some rows of ``x``. See ``Groups.grouped``."""
        return self._store.grouped(names, x, counts, starts)

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix, each read by itself unless the whole is kept. See ``Weights.rows``."""
        whole = self._store.kept(name)
        if whole is not None:
            return whole[ids.to(whole.device)]
        different, places = torch.unique(ids.cpu(), return_inverse=True)
        lazy = self._checkpoint[name]
        read = [self._loader.load(narrow(lazy, 0, row, 1), self._dtype_of(name)) for row in different.tolist()]
        found: torch.Tensor = torch.cat(read)[places.to(self.device)]
        return found

    def prefetch(self, names: Sequence[str]) -> None:
        """Start to read what is asked for next, a few weights at a time. What was wanted before is dropped."""
        self._store.prefetch(names)

    def upcoming(self, names: Sequence[str]) -> None:
        """What is asked for later: read when nothing that ``prefetch`` names is left to read. Replaces the last call's
        names."""
        self._store.upcoming(names)

    def _needed(self) -> Iterator[tuple[str, LazyTensor]]:
        for name, tensor in self._checkpoint.tensors.items():
            rows_only = name == _EMBEDDING and not self.arch.tie_word_embeddings
            if not rows_only and not is_mtp(name, self.arch) and not any(part in name for part in _UNUSED):
                yield name, tensor

    @cached_property
    def _unit_sizes(self) -> dict[str, list[int]]:
        """Bytes of each weight's units, as they are stored. A strip of a GPTQ weight repeats its group numbers."""
        return {name: [unit.size_bytes for unit in packed_units(tensor)] for name, tensor in self._needed()}

    @cached_property
    def _has_forms(self) -> bool:
        return any(Packed(tensor).form is not None for _, tensor in self._needed())

    def _require_fit(self) -> None:
        if self._stream is not False or self.is_resident or self.packed_bytes <= self.memory_bytes:
            return
        raise SpaceError(
            "the weights do not fit in memory, and are not to be streamed",
            where=self._checkpoint.root,
            expected=f"room for {human_bytes(self.packed_bytes)} of weights",
            found=human_bytes(self.memory_bytes),
            fix="Leave out --no-stream, or give more memory.",
        )

    @cached_property
    def _loader(self) -> Loader:
        reader = DirectReader if self.is_streamed else Reader
        return Loader(reader(self._checkpoint.stamps), self._engine, self.device)

    @cached_property
    def _store(self) -> Store:
        self._require_fit()
        source = Source(self._checkpoint.__getitem__, self._dtype_of, self._loader, self.products)
        if self.is_resident:
            return Resident(source, self.jobs)
        most = self.packed_bytes
        return Streamed(
            source,
            device_bytes=min(self.memory_bytes, most),
            host_bytes=min(self.host_memory_bytes, most) if self.is_streamed else 0,
            largest_bytes=self.sizes.largest_expert,
            jobs=self.jobs,
        )

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(ROUTER) else self.dtype
