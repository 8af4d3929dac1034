"""Whether a model fits on some GPUs, in each format; what it would take; and what the road there costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path

from weightkit.errors import PlanError, SpaceError, WeightkitError, raise_all
from weightkit.family import Architecture, legal_tp, tp_problems
from weightkit.sizing.engines import ENGINES, obstacles
from weightkit.sizing.forms import GROUP_SIZE, Form, forms_of, quantized
from weightkit.sizing.memory import Load, activation_bytes, kv_cache_token_bytes
from weightkit.sizing.routes import Route, routes_of
from weightkit.sizing.source import Source, read_source
from weightkit.sizing.weights import Weights, weigh
from weightkit.units import counted, human_binary_bytes

#: Groups that engines have kernels for, to be named where larger ones do not divide.
SMALLER_GROUPS = (64, 32)


@dataclass(frozen=True)
class Machine:
    """The GPUs and the disk that there are.

    Attributes:
        gpus: number of them, all alike.
        gpu_memory: bytes of each; None where nothing is known of it.
        utilization: of it, what an engine may use: vLLM's ``gpu_memory_utilization``, 0.9 by default until it became
            0.92. The rest is for what is not counted here: CUDA's context, graphs, NCCL, fragments.
        disk_speed: bytes a second, read and written together. 2 GB/s is an assumption: a local NVMe disk.
        network_speed: bytes a second from a hub. 100 MB/s is an assumption.
    """

    gpus: int = 8
    gpu_memory: int | None = None
    utilization: float = 0.9
    disk_speed: int = 2_000_000_000
    network_speed: int = 100_000_000

    def __post_init__(self) -> None:
        raise_all("no such machine", list(self._problems()))

    def _problems(self) -> Iterator[WeightkitError]:
        for option, value in (
            ("--gpus", self.gpus),
            ("--gpu-memory", self.gpu_memory),
            ("--disk-speed", self.disk_speed),
            ("--network-speed", self.network_speed),
        ):
            if value is not None and value < 1:
                yield PlanError("nothing can be planned with that", where=option, expected="at least 1", found=value)
        if not 0 < self.utilization <= 1:
            yield PlanError(
                "not a part of the memory",
                where="--gpu-memory-utilization",
                expected="over 0, at most 1",
                found=self.utilization,
            )

    @property
    def usable_bytes(self) -> int | None:
        """Of each GPU."""
        return None if self.gpu_memory is None else int(self.gpu_memory * self.utilization)


@dataclass(frozen=True, slots=True)
class Placement:
    """A model on some GPUs: bytes on the one with most.

    Attributes:
        gpus: tensor-parallel ranks.
        experts: ``cut``, as everything else, or ``whole``, dealt out (expert parallelism).
        parts: weights by part.
        absorbed_bytes: the copy of ``kv_b_proj`` in BF16; see ``Weights.absorbed_on_rank``.
        kv_cache_bytes: latent cache of all sequences.
        activation_bytes: an estimate; see ``memory.activation_bytes``.
    """

    gpus: int
    experts: str
    parts: Mapping[str, int]
    absorbed_bytes: int
    kv_cache_bytes: int
    activation_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Weights as stored."""
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.absorbed_bytes + self.kv_cache_bytes + self.activation_bytes

    def to_json(self) -> dict[str, object]:
        """Plain values, sums included."""
        return asdict(self) | {"weight_bytes": self.weight_bytes, "needed_bytes": self.needed_bytes}


@dataclass(frozen=True)
class FormatPlan:
    """A model in one format.

    Attributes:
        name: ``fp8``, ``bf16``, ``int4``.
        command: what makes it of the source; empty where the source is it.
        disk_bytes: of its tensors, MTP layers included.
        main_bytes: without them.
        loaded_bytes: what the engine loads: with MTP layers only where the load says so.
        token_cache_bytes: of cache, a token, on every rank.
        legal: numbers of GPUs for ``cut`` and for ``whole`` experts.
        placements: on the GPUs asked for; none of those that are not legal.
        problems: what forbids each of the others.
        smaller_groups: a group size with which experts could be cut; None where they can be, or where there is none.
        smallest: the fewest GPUs of this memory; None where no number does, or nothing is known of the memory.
        usable_bytes: of each GPU.
        resident_bytes: weights that every token multiplies by.
        routed_token_bytes: of the routed experts that one token uses.
        streamed_token_s: to read these from the disk, the rest resident.
        obstacles: by engine, what else forbids it.
    """

    name: str
    command: str
    disk_bytes: int
    main_bytes: int
    loaded_bytes: int
    token_cache_bytes: int
    legal: Mapping[str, tuple[int, ...]]
    placements: Mapping[str, Placement]
    problems: Mapping[str, tuple[str, ...]]
    smaller_groups: int | None
    smallest: Placement | None
    usable_bytes: int | None
    resident_bytes: int
    routed_token_bytes: int
    streamed_token_s: float
    obstacles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def placement(self) -> Placement | None:
        """With experts cut, as engines do by default; whole where only that is legal, or only that fits."""
        cut, whole = self.placements.get("cut"), self.placements.get("whole")
        if cut is None or whole is None or self.usable_bytes is None:
            return cut or whole
        return whole if whole.needed_bytes <= self.usable_bytes < cut.needed_bytes else cut

    @property
    def left_bytes(self) -> int | None:
        """Of each GPU's usable memory; negative where it does not fit. None where that is not known or not legal."""
        if self.placement is None or self.usable_bytes is None:
            return None
        return self.usable_bytes - self.placement.needed_bytes

    @property
    def fits(self) -> bool | None:
        """On the GPUs asked for; None where nothing is known of their memory."""
        if self.usable_bytes is None:
            return None
        return self.left_bytes is not None and self.left_bytes >= 0

    @property
    def cache_tokens(self) -> int | None:
        """Tokens of cache that there is room for, those of the load included; of all sequences together."""
        if self.placement is None or self.left_bytes is None:
            return None
        return max(0, self.left_bytes + self.placement.kv_cache_bytes) // self.token_cache_bytes

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        placements = {name: found.to_json() for name, found in self.placements.items()}
        plain = asdict(self) | {"placements": placements, "fits": self.fits, "left_bytes": self.left_bytes}
        smallest = None if self.smallest is None else self.smallest.to_json()
        return plain | {"smallest": smallest, "cache_tokens": self.cache_tokens}


@dataclass(frozen=True)
class SizingPlan:
    """The answer.

    Attributes:
        model: the manifest's name, or the folder's.
        member: the family's name for people.
        path: None for a model known by name.
        machine, load: what was asked.
        context_length: ``max_position_embeddings``.
        formats: those that can be had.
        missing: why others cannot, by name.
        routes: commands from the source as it is.
    """

    model: str
    member: str
    path: Path | None
    machine: Machine
    load: Load
    context_length: int
    formats: tuple[FormatPlan, ...]
    missing: Mapping[str, str]
    routes: tuple[Route, ...]

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        plain = asdict(self) | {"path": None if self.path is None else str(self.path)}
        return plain | {"formats": [found.to_json() for found in self.formats]}

    def render(self) -> str:
        """``render_plan`` of it."""
        from weightkit.sizing.render import render_plan

        return render_plan(self)


def plan(
    what: str | Path,
    machine: Machine | None = None,
    load: Load | None = None,
    *,
    formats: Sequence[str] = (),
    group_size: int = GROUP_SIZE,
    config: str | Path | Mapping[str, object] | None = None,
) -> SizingPlan:
    """What a model takes: GPU memory by rank and format, disk, time. Fetches nothing, reads no tensor data.

    Args:
        what: the name of a known model (``deepseek-v3``), or a checkpoint's path in any layout.
        machine: the GPUs and the disk; the default is eight GPUs of unknown memory.
        load: sequences to be served.
        formats: of ``fp8``, ``bf16``, ``int4``; empty for all that can be had of the source.
        group_size: of int4.
        config: as for ``open_checkpoint``.

    Raises:
        NotACheckpointError: no such path, and no such model.
        PlanError: a format that cannot be had, a context longer than the model's.
        SpaceError: GPUs on which no format fits, whatever their number; says the least that would do.
        UnsupportedError, CheckpointError, FormatError, ConfigError: as ``open_checkpoint``.
    """
    machine, load = machine or Machine(), load or Load()
    source = read_source(what, config=config)
    _require_context(source.arch, load)
    forms = forms_of(source, group_size=group_size)
    chosen = _chosen(source, forms, formats)
    weights = {
        form.name: weigh(form.arch, alike=source.path is None or bool(form.command))
        for form in forms
        if not form.missing
    }
    own = next((weights[form.name] for form in forms if form.name in weights and not form.command), None)
    plans = tuple(
        _plan_form(form, weights[form.name], machine, load, group_size) for form in chosen if not form.missing
    )
    _require_some_fit(plans, {form.name: form.arch for form in chosen}, weights, machine, load)
    return SizingPlan(
        model=source.name,
        member=source.arch.member,
        path=source.path,
        machine=machine,
        load=load,
        context_length=source.arch.max_position_embeddings,
        formats=plans,
        missing={form.name: form.missing for form in chosen if form.missing},
        routes=routes_of(
            source,
            own or weigh(source.arch, alike=False),
            forms,
            weights,
            gpus=machine.gpus,
            disk_speed=machine.disk_speed,
            network_speed=machine.network_speed,
        ),
    )


def _require_context(arch: Architecture, load: Load) -> None:
    if load.context > arch.max_position_embeddings:
        raise PlanError(
            "more than the model's context",
            where="--context",
            expected=f"at most {arch.max_position_embeddings:,} (max_position_embeddings)",
            found=f"{load.context:,}",
            fix="Use a smaller --context.",
        )


def _chosen(source: Source, forms: tuple[Form, ...], names: Sequence[str]) -> tuple[Form, ...]:
    """The forms that were asked for. Raises ``PlanError`` for one that cannot be had."""
    if not names:
        return forms
    known = {form.name: form for form in forms}
    problems: list[WeightkitError] = []
    for name in names:
        if name not in known or known[name].missing:
            why = known[name].missing if name in known else f"it is {forms[-1].name} already"
            had = ", ".join(form.name for form in forms if not form.missing)
            problems.append(PlanError(f"{source.name} cannot be had in {name}: {why}", where="--format", expected=had))
    raise_all("these formats cannot be planned", problems)
    return tuple(form for form in forms if form.name in names)


def _plan_form(form: Form, weights: Weights, machine: Machine, load: Load, group_size: int) -> FormatPlan:
    legal = {"cut": legal_tp(form.arch), "whole": legal_tp(form.arch, whole_experts=True)}
    placements = {
        experts: _place(form.arch, weights, machine.gpus, experts, load)
        for experts, numbers in legal.items()
        if machine.gpus in numbers
    }
    return FormatPlan(
        name=form.name,
        command=form.command,
        disk_bytes=weights.size_bytes(mtp=True),
        main_bytes=weights.size_bytes(mtp=False),
        loaded_bytes=weights.size_bytes(mtp=load.mtp),
        token_cache_bytes=kv_cache_token_bytes(form.arch, mtp=load.mtp),
        legal=legal,
        placements=placements,
        problems=_problems(form, machine.gpus, legal),
        smaller_groups=None if machine.gpus in legal["cut"] else _smaller_groups(form, machine.gpus, group_size),
        smallest=_smallest(form.arch, weights, legal, machine.usable_bytes, load),
        usable_bytes=machine.usable_bytes,
        resident_bytes=weights.resident,
        routed_token_bytes=weights.routed_a_token,
        streamed_token_s=weights.routed_a_token / machine.disk_speed,
        obstacles={engine: found for engine in ENGINES if (found := obstacles(form.arch, engine))},
    )


def _place(arch: Architecture, weights: Weights, n: int, experts: str, load: Load) -> Placement:
    whole = experts == "whole"
    return Placement(
        gpus=n,
        experts=experts,
        parts=weights.on_rank(n, whole_experts=whole, mtp=load.mtp),
        absorbed_bytes=weights.absorbed_on_rank(n),
        kv_cache_bytes=kv_cache_token_bytes(arch, mtp=load.mtp) * load.tokens,
        activation_bytes=activation_bytes(arch, n, load, whole_experts=whole),
    )


def _places(arch: Architecture, weights: Weights, legal: Mapping[str, tuple[int, ...]], load: Load) -> list[Placement]:
    """All legal ones, those on few GPUs first, and of one number those with cut experts."""
    pairs = sorted((n, experts) for experts, numbers in legal.items() for n in numbers)
    return [_place(arch, weights, n, experts, load) for n, experts in pairs]


def _smallest(
    arch: Architecture, weights: Weights, legal: Mapping[str, tuple[int, ...]], usable: int | None, load: Load
) -> Placement | None:
    if usable is None:
        return None
    return next((found for found in _places(arch, weights, legal, load) if found.needed_bytes <= usable), None)


def _problems(form: Form, gpus: int, legal: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Why the GPUs asked for are no degree of these."""
    return {
        experts: tuple(map(str, tp_problems(form.arch, gpus, whole_experts=experts == "whole")))
        for experts, numbers in legal.items()
        if gpus not in numbers
    }


def _smaller_groups(form: Form, gpus: int, group_size: int) -> int | None:
    """The largest groups, smaller than these, that so many GPUs divide; of an int4 that is yet to be made."""
    if not (form.arch.is_gptq and form.command):
        return None
    smaller = (size for size in SMALLER_GROUPS if group_size == -1 or size < group_size)
    return next((size for size in smaller if _would_do(form.arch, gpus, size)), None)


def _would_do(arch: Architecture, gpus: int, group_size: int) -> bool:
    try:
        return gpus in legal_tp(quantized(arch, group_size))
    except PlanError:
        return False


def _require_some_fit(
    plans: Sequence[FormatPlan],
    archs: Mapping[str, Architecture],
    weights: Mapping[str, Weights],
    machine: Machine,
    load: Load,
) -> None:
    """Raise ``SpaceError`` where no format fits on any number of GPUs."""
    if machine.gpu_memory is None or not plans or any(found.smallest is not None for found in plans):
        return
    places = [
        (place, found.name)
        for found in plans
        for place in _places(archs[found.name], weights[found.name], found.legal, load)
    ]
    least, name = min(places, key=lambda pair: pair[0].needed_bytes)
    needed = ceil(least.needed_bytes / machine.utilization)
    raise SpaceError(
        "too little GPU memory for any format on any number of GPUs",
        where="--gpu-memory",
        expected=f"{human_binary_bytes(needed)} at least, on {counted(least.gpus, 'GPU')} in {name}",
        found=human_binary_bytes(machine.gpu_memory),
        fix="Use GPUs with more memory, or a smaller --context or --batch.",
    )
