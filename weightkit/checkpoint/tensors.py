"""Lazy tensors: what a tensor is and how to come by its bytes. Building one reads nothing.

    Stored            bytes of a file
    Narrow            a range of one dimension of another
    Concat            several, joined along a dimension
    Dequantized       an FP8 weight times its block scales, in a float dtype
    GroupDequantized  a GPTQ weight of 4 or 8 bits, from its four tensors, in a float dtype
    Cast              another, in another float dtype
    BlockQuantized    a float weight in FP8: its codes, or their block scales
    Promised          what is made elsewhere while it is written

``narrow``, ``concat``, ``dequantize``, ``dequantize_groups`` and ``cast_to`` build them in a normal form, so that equal
contents compare equal: a narrow along dimension 0 of a stored tensor is a shorter stored tensor; neighbours join again;
a dequantized tensor is narrowed by narrowing what it is made from. A tensor with nothing to compute inside is *plain*:
it is only bytes, and ``weightkit.checkpoint.copies`` says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

from weightkit.checkpoint import dtypes
from weightkit.errors import ScaleError

#: Rows and columns of an FP8 weight that share a scale, in every member of the family.
FP8_BLOCK = 128
#: Widths of a GPTQ code that pack into words of 32 bits without crossing from one to the next, and are in use.
GROUP_BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class Stored:
    """``shape`` elements of ``dtype``, row-major, at byte ``offset`` of the file ``path``."""

    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Narrow:
    """``source[start : start + length]`` along dimension ``dim``."""

    source: LazyTensor
    dim: int
    start: int
    length: int

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return _resized(self.source.shape, self.dim, self.length)


@dataclass(frozen=True, slots=True)
class Concat:
    """``parts`` joined along dimension ``dim``."""

    parts: tuple[LazyTensor, ...]
    dim: int

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return _resized(self.parts[0].shape, self.dim, sum(part.shape[self.dim] for part in self.parts))


@dataclass(frozen=True, slots=True)
class Dequantized:
    """``float32(weight) * scale[row // 128, column // 128]``, rounded once to ``dtype``.

    ``weight`` is F8_E4M3 [rows, columns]; ``scale`` is F32 [ceil(rows / 128), ceil(columns / 128)].
    """

    weight: LazyTensor
    scale: LazyTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape


@dataclass(frozen=True, slots=True)
class GroupDequantized:
    """A GPTQ weight [N, K] = [out, in]: ``(code - zero) * float32(scales[g_idx[k], n])``, rounded once to ``dtype``.

    GPTQ stores the transpose. A word of 32 bits holds ``32 // bits`` codes, the first in its lowest bits: ``qweight``
    packs neighbours along K, ``qzeros`` along N, so N and K are multiples of that. A zero is the stored one plus
    ``zero_offset``, modulo ``2**bits``. ``g_idx`` calls the first group that ``scales`` holds ``first_group``.

    Attributes:
        qweight: I32 [K * bits / 32, N].
        qzeros: I32 [groups, N * bits / 32].
        scales: F16 [groups, N].
        g_idx: I32 [K], the group of each input.
        bits: 4 or 8.
        zero_offset: 1 where ``checkpoint_format`` is ``gptq`` (what AutoGPTQ writes), 0 for ``gptq_v2``.
        first_group: above 0 where groups were left out before those that ``scales`` and ``qzeros`` hold.
    """

    qweight: LazyTensor
    qzeros: LazyTensor
    scales: LazyTensor
    g_idx: LazyTensor
    bits: int
    zero_offset: int
    dtype: str
    first_group: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.scales.shape[1], self.g_idx.shape[0])

    @property
    def codes_per_word(self) -> int:
        return 32 // self.bits


@dataclass(frozen=True, slots=True)
class Cast:
    """``source`` rounded to nearest even in ``dtype``."""

    source: LazyTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True, slots=True)
class BlockQuantized:
    """The F8_E4M3 codes of the float matrix ``source``, or, ``scales``, its F32 scales: what ``Dequantized`` takes.

    See ``weightkit.kernels.fp8_quant`` for how scales are chosen.
    """

    source: LazyTensor
    scales: bool
    power_of_two: bool

    @property
    def dtype(self) -> str:
        return "F32" if self.scales else "F8_E4M3"

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.source.shape
        return tuple(-(-size // FP8_BLOCK) for size in shape) if self.scales else shape


@dataclass(frozen=True, slots=True)
class Promised:
    """Bytes that whoever asked for the write delivers while it runs, such as the result of a quantization.

    ``recipe`` says how they are made, settings and calibration included: equal recipes make equal bytes.
    """

    recipe: str
    dtype: str
    shape: tuple[int, ...]


LazyTensor: TypeAlias = Stored | Narrow | Concat | Dequantized | GroupDequantized | Cast | BlockQuantized | Promised


def size_bytes(tensor: LazyTensor) -> int:
    """Bytes of the dense tensor."""
    return dtypes.size_bytes(tensor.dtype, tensor.shape)


def is_plain(tensor: LazyTensor) -> bool:
    """Whether the tensor is only bytes of files, in some order."""
    match tensor:
        case Stored():
            return True
        case Narrow(source=source):
            return is_plain(source)
        case Concat(parts=parts):
            return all(is_plain(part) for part in parts)
        case _:
            return False


def made_from(tensor: LazyTensor) -> tuple[LazyTensor, ...]:
    """The tensors that it is made from, in reading order; none of one that is stored or promised."""
    match tensor:
        case Narrow(source=source) | Cast(source=source) | BlockQuantized(source=source):
            return (source,)
        case Concat(parts=parts):
            return parts
        case Dequantized(weight=weight, scale=scale):
            return weight, scale
        case GroupDequantized(qweight, qzeros, scales, g_idx):
            return qweight, qzeros, scales, g_idx
    return ()


def stored_parts(tensor: LazyTensor) -> Iterator[Stored]:
    """Every stored tensor that the tensor is made from, in reading order."""
    if isinstance(tensor, Stored):
        yield tensor
    for part in made_from(tensor):
        yield from stored_parts(part)


def narrow(tensor: LazyTensor, dim: int, start: int, length: int) -> LazyTensor:
    """``tensor[start : start + length]`` along ``dim``. Raises ``ValueError`` outside the tensor."""
    size = tensor.shape[dim]
    if start < 0 or length < 0 or start + length > size:
        raise ValueError(f"[{start}:{start + length}] is outside dimension {dim} of {tensor.shape}")
    if length == size:
        return tensor
    match tensor:
        case Stored(path, offset, dtype, shape) if dim == 0:
            row_bytes = dtypes.row_bytes(dtype, shape[1:])
            return Stored(path, offset + start * row_bytes, dtype, (length, *shape[1:]))
        case Narrow(source, inner, begin, _) if inner == dim:
            return narrow(source, dim, begin + start, length)
        case Narrow(source, inner, begin, count) if dim == 0:
            return narrow(narrow(source, dim, start, length), inner, begin, count)
        case Concat(parts, inner):
            return _narrow_concat(parts, inner, dim, start, length)
        case Dequantized():
            return _narrow_dequantized(tensor, dim, start, length)
        case GroupDequantized():
            return _narrow_groups(tensor, dim, start, length)
        case Cast(source, dtype):
            return Cast(narrow(source, dim, start, length), dtype)
        case BlockQuantized():
            return _narrow_quantized(tensor, dim, start, length)
    return Narrow(tensor, dim, start, length)


def _narrow_dequantized(tensor: Dequantized, dim: int, start: int, length: int) -> LazyTensor:
    """Whole blocks by narrowing weight and scale; what begins inside a block is cut from the blocks that cover it."""
    size = tensor.shape[dim]
    low, high = start // FP8_BLOCK * FP8_BLOCK, start + length
    if low != start:
        high = min(-(-high // FP8_BLOCK) * FP8_BLOCK, size)
    if (low, high) == (0, size):
        return Narrow(tensor, dim, start, length)
    blocks = -(-high // FP8_BLOCK) - low // FP8_BLOCK
    weight, scale = narrow(tensor.weight, dim, low, high - low), narrow(tensor.scale, dim, low // FP8_BLOCK, blocks)
    covering = Dequantized(weight, scale, tensor.dtype)
    return covering if low == start else Narrow(covering, dim, start - low, length)


def _narrow_groups(tensor: GroupDequantized, dim: int, start: int, length: int) -> LazyTensor:
    """Whole words by narrowing what they lie in; what begins or ends inside a word is cut from the words that cover it.

    Along K scales and zeros stay whole, since ``g_idx`` may name any group.
    """
    per_word, size = tensor.codes_per_word, tensor.shape[dim]
    first, last = start // per_word, -(-(start + length) // per_word)
    low, count = first * per_word, (last - first) * per_word
    if (low, count) != (start, length):
        covering = tensor if count == size else _narrow_groups(tensor, dim, low, count)
        return Narrow(covering, dim, start - low, length)
    if dim == 0:
        return replace(
            tensor,
            qweight=narrow(tensor.qweight, 1, low, count),
            qzeros=narrow(tensor.qzeros, 1, first, last - first),
            scales=narrow(tensor.scales, 1, low, count),
        )
    return replace(
        tensor, qweight=narrow(tensor.qweight, 0, first, last - first), g_idx=narrow(tensor.g_idx, 0, low, count)
    )


def narrow_with_groups(tensor: GroupDequantized, start: int, length: int) -> LazyTensor:
    """``tensor[:, start : start + length]`` from those groups alone that hold these inputs, where groups are of
    neighbours and begin and end with the part; else as ``narrow``.

    Reading it raises ``ScaleError`` where groups are of other inputs after all.
    """
    part, groups = narrow(tensor, 1, start, length), tensor.scales.shape[0]
    size, rest = divmod(tensor.shape[1], groups)
    if not isinstance(part, GroupDequantized) or groups == 1 or rest or start % size or length % size:
        return part
    first, count = start // size, length // size
    qzeros, scales = narrow(part.qzeros, 0, first, count), narrow(part.scales, 0, first, count)
    return replace(part, qzeros=qzeros, scales=scales, first_group=part.first_group + first)


def _narrow_quantized(tensor: BlockQuantized, dim: int, start: int, length: int) -> LazyTensor:
    """Whole blocks by narrowing the source; what cuts one is cut from the blocks that cover it."""
    source, size = tensor.source, tensor.source.shape[dim]
    unit = FP8_BLOCK if tensor.scales else 1
    low, high = start * unit // FP8_BLOCK * FP8_BLOCK, min((start + length) * unit, size)
    high = min(-(-high // FP8_BLOCK) * FP8_BLOCK, size)
    covering = BlockQuantized(narrow(source, dim, low, high - low), tensor.scales, tensor.power_of_two)
    first = start - low // unit
    if (first, length) == (0, covering.shape[dim]):
        return covering
    return Narrow(covering if (low, high) != (0, size) else tensor, dim, first, length)


def _narrow_concat(parts: tuple[LazyTensor, ...], joined: int, dim: int, start: int, length: int) -> LazyTensor:
    if joined != dim:
        return concat([narrow(part, dim, start, length) for part in parts], joined)
    kept, position = [], 0
    for part in parts:
        size = part.shape[dim]
        low, high = max(start, position), min(start + length, position + size)
        if low < high:
            kept.append(narrow(part, dim, low - position, high - low))
        position += size
    return concat(kept, dim) if kept else Narrow(parts[0], dim, 0, 0)


def concat(parts: Sequence[LazyTensor], dim: int) -> LazyTensor:
    """The parts joined along ``dim``. Raises ``ValueError`` where dtypes or the other dimensions differ."""
    if not parts:
        raise ValueError("nothing to join")
    first = parts[0]
    for part in parts:
        like_first = part.dtype == first.dtype and len(part.shape) == len(first.shape) > dim
        if not like_first or _resized(part.shape, dim, 0) != _resized(first.shape, dim, 0):
            raise ValueError(
                f"{part.dtype} {part.shape} does not join {first.dtype} {first.shape} along dimension {dim}"
            )
    joined: list[LazyTensor] = []
    for part in parts:
        for piece in part.parts if isinstance(part, Concat) and part.dim == dim else (part,):
            merged = _join(joined[-1], piece, dim) if joined else None
            if merged is None:
                joined.append(piece)
            else:
                joined[-1] = merged
    return joined[0] if len(joined) == 1 else Concat(tuple(joined), dim)


def _join(left: LazyTensor, right: LazyTensor, dim: int) -> LazyTensor | None:
    """The two neighbours as one tensor simpler than a Concat of them, or None."""
    match left, right:
        case Stored(), Stored() if (
            dim == 0 and left.path == right.path and left.offset + size_bytes(left) == right.offset
        ):
            return Stored(left.path, left.offset, left.dtype, _resized(left.shape, 0, left.shape[0] + right.shape[0]))
        case Narrow(), Narrow() if (
            left.source == right.source and left.dim == right.dim == dim and left.start + left.length == right.start
        ):
            return narrow(left.source, dim, left.start, left.length + right.length)
        case Narrow(), Narrow() if left.dim == right.dim != dim and (left.start, left.length) == (
            right.start,
            right.length,
        ):
            whole = _join(left.source, right.source, dim)
            return None if whole is None else narrow(whole, left.dim, left.start, left.length)
        case Dequantized(), Dequantized() if left.dtype == right.dtype and left.shape[dim] % FP8_BLOCK == 0:
            weight = concat([left.weight, right.weight], dim)
            return Dequantized(weight, concat([left.scale, right.scale], dim), left.dtype)
        case GroupDequantized() | Narrow(), GroupDequantized() | Narrow():
            return _join_groups(left, right, dim)
        case Cast(), Cast() if left.dtype == right.dtype and left.source.dtype == right.source.dtype:
            return Cast(concat([left.source, right.source], dim), left.dtype)
    return None


def _join_groups(left: LazyTensor, right: LazyTensor, dim: int) -> LazyTensor | None:
    """Neighbours may meet between words, or inside a word that both were cut from."""
    before, after = _cut_from_groups(left, dim), _cut_from_groups(right, dim)
    if before is None or after is None:
        return None
    (source, start, length), (rest, skipped, more) = before, after
    forms = [(side.bits, side.zero_offset, side.dtype, side.first_group) for side in (source, rest)]
    if forms[0] != forms[1]:
        return None
    size, per_word, following = source.shape[dim], source.codes_per_word, rest.shape[dim]
    unused = size - start - length + skipped
    if unused == per_word:
        if narrow(source, dim, size - per_word, per_word) != narrow(rest, dim, 0, per_word):
            return None
        tail = narrow(rest, dim, per_word, following - per_word)
    elif unused == 0:
        tail = rest
    else:
        return None
    whole = source if tail.shape[dim] == 0 else _join_words(source, tail, dim)
    return None if whole is None else narrow(whole, dim, start, length + more)


def _cut_from_groups(tensor: LazyTensor, dim: int) -> tuple[GroupDequantized, int, int] | None:
    """The whole words, and which part of them along ``dim`` the tensor is."""
    match tensor:
        case GroupDequantized():
            return tensor, 0, tensor.shape[dim]
        case Narrow(GroupDequantized() as source, inner, start, length) if inner == dim:
            return source, start, length
    return None


def _join_words(left: GroupDequantized, right: LazyTensor, dim: int) -> LazyTensor | None:
    """Outputs of modules with one ``g_idx``, or inputs of modules with the same scales and zeros."""
    if not isinstance(right, GroupDequantized):
        return None
    if dim == 0 and left.g_idx == right.g_idx and left.scales.shape[0] == right.scales.shape[0]:
        return replace(
            left,
            qweight=concat([left.qweight, right.qweight], 1),
            qzeros=concat([left.qzeros, right.qzeros], 1),
            scales=concat([left.scales, right.scales], 1),
        )
    if dim == 1 and (left.scales, left.qzeros) == (right.scales, right.qzeros):
        return replace(
            left, qweight=concat([left.qweight, right.qweight], 0), g_idx=concat([left.g_idx, right.g_idx], 0)
        )
    return None


def dequantize(weight: LazyTensor, scale: LazyTensor, dtype: str, *, name: str) -> LazyTensor:
    """The weight in ``dtype``. Raises ``ScaleError``, naming the weight ``name``, where the scale does not fit it."""
    expected = tuple(-(-size // FP8_BLOCK) for size in weight.shape)
    if len(weight.shape) != 2 or scale.dtype != "F32" or scale.shape != expected:
        raise ScaleError(
            f"the scale does not fit the weight {list(weight.shape)}",
            where=name,
            expected=f"F32 {list(expected)}",
            found=f"{scale.dtype} {list(scale.shape)}",
        )
    return Dequantized(weight, scale, dtype)


def dequantize_groups(
    qweight: LazyTensor,
    qzeros: LazyTensor,
    scales: LazyTensor,
    g_idx: LazyTensor,
    *,
    bits: int,
    zero_offset: int,
    dtype: str,
    name: str,
) -> LazyTensor:
    """The weight of the GPTQ module ``name`` in ``dtype``; see :class:`GroupDequantized`.

    Raises:
        ScaleError: naming the module, where the four tensors do not fit each other.
    """
    if bits not in GROUP_BITS or zero_offset not in (0, 1):
        raise ScaleError(
            "no such GPTQ format",
            where=name,
            expected="4 or 8 bits, zeros stored plain or less one",
            found=f"{bits} bits, zeros less {zero_offset}",
        )
    words, columns = qweight.shape if len(qweight.shape) == 2 else (0, 0)
    per_word = 32 // bits
    groups = scales.shape[0] if scales.shape else 0
    expected = {
        "qweight": ("I32", (words, columns // per_word * per_word)),
        "scales": ("F16", (max(1, groups), columns)),
        "qzeros": ("I32", (max(1, groups), columns // per_word)),
        "g_idx": ("I32", (words * per_word,)),
    }
    for part, tensor in (("qweight", qweight), ("scales", scales), ("qzeros", qzeros), ("g_idx", g_idx)):
        if (tensor.dtype, tensor.shape) != expected[part]:
            raise ScaleError(
                f"{part} does not fit a GPTQ weight of {words * per_word} inputs, {columns} outputs and {bits} bits",
                where=name,
                expected=f"{expected[part][0]} {list(expected[part][1])}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )
    return GroupDequantized(qweight, qzeros, scales, g_idx, bits, zero_offset, dtype)


def quantize_blocks(tensor: LazyTensor, *, power_of_two: bool, name: str) -> tuple[LazyTensor, LazyTensor]:
    """The float matrix in FP8: codes and block scales. Raises ``ScaleError``, naming it, for what is no matrix."""
    if len(tensor.shape) != 2:
        raise ScaleError("only a matrix is quantized in blocks", where=name, found=f"{list(tensor.shape)}")
    return BlockQuantized(tensor, False, power_of_two), BlockQuantized(tensor, True, power_of_two)


def cast_to(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """The tensor in another float dtype; itself where it has it already."""
    return tensor if tensor.dtype == dtype else Cast(tensor, dtype)


def elements(tensor: LazyTensor) -> int:
    """How many elements the tensor has."""
    return prod(tensor.shape)


def _resized(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
