"""Which degrees of parallelism, and which numbers of experts, a checkpoint of the family can have.

Model parallelism (``--mp``) divides the dimension that the blueprint names; what has no such dimension is whole on
every rank, and routed experts go whole to one rank each. In FP8 a rank's slice must begin on a block, or its scales
would cover rows of its neighbour: 18432 rows are 144 blocks, so 32 ranks would cut one in half. In GPTQ it must begin
on a word of codes along the rows, and on a group along the columns; the numbers in its part of ``g_idx`` stay those of
the whole, so that split and merge only move bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise

from weightkit.errors import PlanError
from weightkit.family.architecture import Architecture
from weightkit.family.blueprint import Expected, Role, layer_records, outer_records
from weightkit.family.quantization import FP8, Quantization

MARLIN_COLUMNS = 64
"""Columns of an expert that vLLM's Marlin kernel takes together; see ``tp_problems``."""


@dataclass(frozen=True, slots=True)
class DegreeProblem:
    """Why a checkpoint cannot be split over a number of ranks.

    Attributes:
        where: the first tensor, or the config's field, that cannot be split.
        what: the reason, without its place.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}."


def mp_problems(arch: Architecture, n: int, *, fp8: bool, gptq: bool = False) -> list[DegreeProblem]:
    """What forbids model parallelism over ``n`` ranks; empty where it is legal.

    Args:
        arch: the architecture; its own quantization matters only for ``gptq``.
        n: number of ranks, at least 1. One rank is always legal: nothing is cut.
        fp8: whether the output keeps F8_E4M3 weights with block scales.
        gptq: whether the output keeps the GPTQ tensors that the architecture's quantization describes.

    Returns:
        One problem for each kind of tensor and width, in the model's order, not one for each of its 91,991 tensors.
    """
    if n < 1:
        return [DegreeProblem("--mp", f"{n} is not a number of ranks")]
    if n == 1:
        return []
    problems = []
    if arch.num_attention_heads % n:
        problems.append(_uneven("num_attention_heads", f"{arch.num_attention_heads} attention heads", n))
    if arch.n_routed_experts % n:
        problems.append(_uneven("n_routed_experts", f"{arch.n_routed_experts} routed experts", n))
    return [*problems, *_split_problems(_in_form(arch, fp8=fp8, gptq=gptq), n)]


def legal_mp(arch: Architecture, *, fp8: bool, gptq: bool = False) -> tuple[int, ...]:
    """Every legal number of ranks, ascending. For DeepSeek-V3: 1 to 16 in FP8 and in int4 with groups of 128, 1 to 128
    in BF16, powers of two."""
    heads = arch.num_attention_heads
    candidates = (n for n in range(1, heads + 1) if heads % n == 0)
    return tuple(n for n in candidates if not mp_problems(arch, n, fp8=fp8, gptq=gptq))


def require_mp(arch: Architecture, n: int, *, fp8: bool, gptq: bool = False) -> None:
    """Refuse an illegal number of ranks.

    Raises:
        PlanError: with every reason and the legal numbers.
    """
    problems = mp_problems(arch, n, fp8=fp8, gptq=gptq)
    if not problems:
        return
    form = "FP8" if fp8 else f"int{arch.quantization.bits}" if gptq and arch.quantization is not None else "BF16"
    listing = ", ".join(map(str, legal_mp(arch, fp8=fp8, gptq=gptq)))
    fix = f"Legal --mp for this {form} checkpoint: {listing}. Use one of them"
    if form != "BF16" and n in legal_mp(arch, fp8=False):
        fix += ", or add --to bf16"
    what = "\n".join(str(problem) for problem in problems)
    raise PlanError(what, fix=f"{fix}.")


def tp_problems(arch: Architecture, n: int, *, whole_experts: bool = False) -> list[DegreeProblem]:
    """What keeps an engine from loading a checkpoint with tensor parallelism over ``n`` GPUs.

    Engines cut routed experts too, which ``shard --mp`` does not; embedding and head they pad. Of a weight in FP8 each
    GPU's part must be whole blocks (vLLM: ``validate_fp8_block_shape``, and "not divisible by weight quantization
    block_n" for experts; SGLang says the same). Of GPTQ it must be whole groups, and of an expert whole tiles of 64
    columns for vLLM's Marlin kernel (its 0.25.1: ``(moe_intermediate_size / tp) % max(64, group_size) == 0``).

    Args:
        arch: the architecture, in the form that the engine loads.
        n: number of GPUs.
        whole_experts: expert parallelism (``--enable-expert-parallel``): routed experts stay whole and are dealt out,
            all else is cut as before.
    """
    if n < 1:
        return [DegreeProblem("--tp", f"{n} is not a number of GPUs")]
    problems = []
    if arch.num_attention_heads % n:
        problems.append(_uneven("num_attention_heads", f"{arch.num_attention_heads} attention heads", n))
    if n == 1:
        return problems
    if whole_experts and n > arch.n_routed_experts:
        problems.append(DegreeProblem("n_routed_experts", f"{arch.n_routed_experts} experts are fewer than {n} GPUs"))
    problems += _split_problems(arch, n, padded=(Role.EMBEDDING, Role.HEAD))
    return problems if whole_experts else [*problems, *_expert_problems(arch, n)]


def legal_tp(arch: Architecture, *, whole_experts: bool = False) -> tuple[int, ...]:
    """Every number of GPUs without ``tp_problems``, ascending. For DeepSeek-V3: 1 to 16 in FP8 and in int4 with groups
    of 128, 1 to 128 in BF16."""
    heads = arch.num_attention_heads
    candidates = (n for n in range(1, heads + 1) if heads % n == 0)
    return tuple(n for n in candidates if not tp_problems(arch, n, whole_experts=whole_experts))


def _expert_problems(arch: Architecture, n: int) -> Iterator[DegreeProblem]:
    """Why a routed expert's columns do not divide among ``n`` GPUs; the first layer where it is so."""
    quantization, size = arch.quantization, arch.moe_intermediate_size
    for layer in range(arch.num_hidden_layers):
        name = f"model.layers.{layer}.mlp.experts.0.down_proj"
        if not arch.is_moe_layer(layer):
            continue
        unit, leaf, kind = 1, "weight", ""
        if quantization is not None and quantization.quantizes(name):
            if quantization.is_gptq:
                unit, leaf = max(MARLIN_COLUMNS, quantization.group_size), "qweight"
                kind = f" (group size {quantization.group_size})"
            elif quantization.block_size is not None:
                unit, kind = quantization.block_size[1], " (in scale blocks)"
        if size % (unit * n):
            whole = f"whole {unit}s" if unit > 1 else "as many"
            what = f"{size} columns of an expert{kind} are not {n} times {whole}"
            yield DegreeProblem(f"{name}.{leaf}", what)
            return


def expert_ranges(n_experts: int, ranks: int) -> tuple[range, ...]:
    """The routed experts of each rank under expert parallelism: consecutive, the first ranks one more where uneven.

    Raises:
        PlanError: fewer than one rank, or more ranks than experts.
    """
    if not 1 <= ranks <= n_experts:
        raise PlanError(
            f"{n_experts} routed experts cannot be spread over {ranks} ranks",
            where="--ep",
            expected=f"1 to {n_experts}",
            found=ranks,
            fix=f"Use --ep with a number from 1 to {n_experts}.",
        )
    each, rest = divmod(n_experts, ranks)
    starts = [rank * each + min(rank, rest) for rank in range(ranks + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def legal_expert_counts(arch: Architecture) -> tuple[int, ...]:
    """How many routed experts a layer can keep, ascending; the last is what it has.

    Each of the ``n_group`` groups keeps as many as the others, and at least two where a group's score is the sum of its
    two best (``noaux_tc``, V3 on; V2 takes the best alone); the ``topk_group`` groups that a token may use must hold
    ``num_experts_per_tok`` experts.
    """
    groups = arch.n_group  # a config that names groups must divide into them, although ``greedy`` looks past them
    usable = groups if arch.topk_method == "greedy" else arch.topk_group
    fewest = 2 if arch.has_router_bias else 1
    per_group = range(fewest, arch.n_routed_experts // groups + 1)
    return tuple(groups * kept for kept in per_group if usable * kept >= arch.num_experts_per_tok)


def _uneven(where: str, things: str, n: int) -> DegreeProblem:
    return DegreeProblem(where, f"{things} cannot be split over {n} ranks")


def _in_form(arch: Architecture, *, fp8: bool, gptq: bool) -> Architecture:
    """The architecture as FP8, as the GPTQ that it is, or unquantized."""
    if fp8:
        return replace(arch, quantization=FP8)
    return arch if gptq and arch.is_gptq else replace(arch, quantization=None)


def _split_problems(arch: Architecture, n: int, *, padded: tuple[Role, ...] = ()) -> Iterator[DegreeProblem]:
    """Of all that is cut but what ``padded`` names, which may be cut anywhere."""
    block = arch.block_size or (1, 1)
    seen = set()
    for record in _representatives(arch):
        if record.split_dim is None or record.role in padded:  # the first is for the type checker
            continue
        size = record.shape[record.split_dim]
        kind = (record.role, size, record.codes_per_word > 1 and record.split_dim)
        if kind in seen:
            continue
        if record.codes_per_word > 1 and arch.quantization is not None:
            problem = _gptq_problem(record, record.split_dim, n, arch.quantization)
        else:
            problem = _problem(record.name, size, n, block[record.split_dim] if record.scale_name else None)
        if problem is not None:
            seen.add(kind)
            yield problem


def _problem(name: str, size: int, n: int, block: int | None) -> DegreeProblem | None:
    """Why ``size`` rows or columns do not divide among ``n`` ranks, whole blocks each where there are blocks."""
    if block is None:
        return _uneven(name, f"dimension {size}", n) if size % n else None
    if size % (block * n) == 0:
        return None
    if size % block:
        return _uneven(name, f"dimension {size}, which ends within a scale block,", n)
    return _uneven(name, f"{size // block} scale blocks", n)


def _gptq_problem(record: Expected, dim: int, n: int, quantization: Quantization) -> DegreeProblem | None:
    """Why a ``qweight`` [words of columns, rows] does not divide among ``n`` ranks."""
    words, group = quantization.codes_per_word, quantization.group_size
    if dim == 1:
        rows = record.shape[1]
        return _uneven(record.name, f"{rows} rows in words of {words}", n) if rows % (words * n) else None
    columns = record.shape[0] * words
    if group == -1:
        return _uneven(record.name, f"{columns} columns in words of {words}", n) if columns % (words * n) else None
    if quantization.desc_act:
        return _uneven(record.name, f"groups of {group} columns from anywhere (desc_act)", n)
    if columns % group:
        return _uneven(record.name, f"{columns} columns, which end within a group of {group},", n)
    if columns % (group * n):
        return _uneven(record.name, f"{columns // group} groups of {group} columns", n)
    return _uneven(record.name, f"{columns} columns in words of {words}", n) if columns % (words * n) else None


@lru_cache(maxsize=16)
def _representatives(arch: Architecture) -> tuple[Expected, ...]:
    """Weights that are cut, outside the layers and of layers of all kinds there are: the first dense one and the first
    MoE one; every layer where rules may quantize some and not others. Of routed experts one, since they are not cut."""
    one = replace(arch, n_routed_experts=1)
    layers = range(arch.num_hidden_layers)
    if not arch.is_gptq:
        kinds = {arch.is_moe_layer(layer): layer for layer in reversed(layers)}
        layers_of_kinds = sorted(kinds.values())
    else:
        layers_of_kinds = list(layers)
    records = chain(outer_records(arch), *(layer_records(one, layer) for layer in layers_of_kinds))
    return tuple(record for record in records if record.split_dim is not None and record.weight_name is None)
