"""Which degrees of parallelism, and which numbers of experts, a checkpoint of the family can have.

Model parallelism (``--mp``) divides the dimension that the blueprint names; what has no such dimension is whole on
every rank, and routed experts go whole to one rank each. In FP8 a rank's slice must begin on a block, or its scales
would cover rows of its neighbour: 18432 rows are 144 blocks, so 32 ranks would cut one in half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from weightkit.errors import PlanError
from weightkit.family.architecture import FP8, Architecture
from weightkit.family.blueprint import Expected, layer_records, outer_records


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


def mp_problems(arch: Architecture, n: int, *, fp8: bool) -> list[DegreeProblem]:
    """What forbids model parallelism over ``n`` ranks; empty where it is legal.

    Args:
        arch: the architecture; its own quantization does not matter.
        n: number of ranks, at least 1. One rank is always legal: nothing is cut.
        fp8: whether the output keeps F8_E4M3 weights with block scales.

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
    return [*problems, *_split_problems(arch, n, fp8=fp8)]


def legal_mp(arch: Architecture, *, fp8: bool) -> tuple[int, ...]:
    """Every legal number of ranks, ascending. For DeepSeek-V3: 1 to 16 in FP8, 1 to 128 in BF16, powers of two."""
    heads = arch.num_attention_heads
    candidates = (n for n in range(1, heads + 1) if heads % n == 0)
    return tuple(n for n in candidates if not mp_problems(arch, n, fp8=fp8))


def require_mp(arch: Architecture, n: int, *, fp8: bool) -> None:
    """Refuse an illegal number of ranks.

    Raises:
        PlanError: with every reason and the legal numbers.
    """
    problems = mp_problems(arch, n, fp8=fp8)
    if not problems:
        return
    legal = legal_mp(arch, fp8=fp8)
    listing = ", ".join(map(str, legal))
    fix = f"Legal --mp for this {'FP8' if fp8 else 'BF16'} checkpoint: {listing}. Use one of them"
    if fp8 and n in legal_mp(arch, fp8=False):
        fix += ", or add --to bf16"
    what = "\n".join(str(problem) for problem in problems)
    raise PlanError(what, fix=f"{fix}.")


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
    grouped = arch.topk_method != "greedy"
    groups, usable = (arch.n_group, arch.topk_group) if grouped else (1, 1)
    fewest = 2 if arch.has_router_bias else 1
    per_group = range(fewest, arch.n_routed_experts // groups + 1)
    return tuple(groups * kept for kept in per_group if usable * kept >= arch.num_experts_per_tok)


def _uneven(where: str, things: str, n: int) -> DegreeProblem:
    return DegreeProblem(where, f"{things} cannot be split over {n} ranks")


def _split_problems(arch: Architecture, n: int, *, fp8: bool) -> Iterator[DegreeProblem]:
    block = FP8.block_size or (1, 1)
    seen = set()
    for record in _representatives(arch, fp8=fp8):
        if record.split_dim is None or record.weight_name is not None:
            continue
        size = record.shape[record.split_dim]
        kind = (record.role, size)
        problem = _problem(record.name, size, n, block[record.split_dim] if record.scale_name else None)
        if problem is not None and kind not in seen:
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


def _representatives(arch: Architecture, *, fp8: bool) -> Iterator[Expected]:
    """The tensors outside the layers, of the first dense layer and of the first MoE layer: all kinds there are."""
    arch = replace(arch, quantization=FP8 if fp8 else None)
    yield from outer_records(arch)
    kinds = {arch.is_moe_layer(layer): layer for layer in reversed(range(arch.num_hidden_layers))}
    for layer in sorted(kinds.values()):
        yield from layer_records(arch, layer)
