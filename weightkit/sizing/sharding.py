"""What ``shard --mp`` reads and writes, of tensors cut as it cuts them; one layer stands for all like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from weightkit.checkpoint.tensors import LazyTensor, Stored, cast_to, dequantize, dequantize_groups, size_bytes
from weightkit.family import Architecture, Expected, expert_ranges, in_demo, layer_records, outer_records
from weightkit.layouts.ranks import share_of_rank
from weightkit.sizing.source import Source
from weightkit.sizing.weights import alike_layers
from weightkit.writer.plan import read_bytes

Tensors = dict[str, LazyTensor]


def shard_bytes(source: Source, arch: Architecture, mp: int) -> tuple[int, int]:
    """Bytes of data that are read and written, as the command's dry run counts them.

    Args:
        source: what is sharded.
        arch: of the result: the source's own, or the source's in BF16, which it is cast to on the way.
        mp: a legal number of ranks.
    """
    owned = expert_ranges(arch.n_routed_experts, mp)
    reads = writes = 0
    for made, stored, count in _layers(source, arch):
        for record in filter(in_demo, made):
            tensor = _tensor(record, stored, source.arch)
            for rank in range(mp):
                share = share_of_rank(tensor, record, rank, mp, owned[rank])
                if share is not None:
                    reads += count * read_bytes(share)
                    writes += count * size_bytes(share)
    return reads, writes


def _layers(source: Source, arch: Architecture) -> Iterator[tuple[list[Expected], Tensors, int]]:
    """What is outside the layers, then one layer of each kind: its tensors in the result, those of the source, and how
    many layers are like it."""
    yield list(outer_records(arch)), _stored(outer_records(source.arch), source.tensors), 1
    for layer, count in alike_layers(source.arch, alike=source.path is None or not source.arch.is_gptq):
        yield list(layer_records(arch, layer)), _stored(layer_records(source.arch, layer), source.tensors), count


def _stored(records: Iterator[Expected], tensors: Mapping[str, LazyTensor]) -> Tensors:
    """The source's tensors; of one that is not there, or not as it should be, what should be there."""
    found: Tensors = {}
    for record in records:
        tensor = tensors.get(record.name)
        fits = tensor is not None and tensor.shape == record.shape and record.allows(tensor.dtype)
        found[record.name] = tensor if tensor is not None and fits else Stored("", 0, record.dtype, record.shape)
    return found


def _tensor(record: Expected, stored: Tensors, arch: Architecture) -> LazyTensor:
    """A tensor of the result, made of the source's as ``transforms.cast`` makes it."""
    name, module = record.name, record.name.removesuffix(".weight")
    if name not in stored and arch.quantization is not None:
        return dequantize_groups(
            *(stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")),
            bits=arch.quantization.bits,
            zero_offset=arch.quantization.zero_offset,
            dtype=record.dtype,
            name=module,
        )
    tensor = stored[name]
    if tensor.dtype == "F8_E4M3" and record.dtype != tensor.dtype:
        return dequantize(tensor, stored[f"{name}_scale_inv"], record.dtype, name=name)
    return tensor if record.allows(tensor.dtype) else cast_to(tensor, record.dtype)
