"""What each command of the road reads, writes and takes. Data alone: headers and side files are a few megabytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from weightkit import manifests
from weightkit.family import Architecture, legal_mp
from weightkit.remote.path import is_remote
from weightkit.sizing.forms import Form
from weightkit.sizing.sharding import shard_bytes
from weightkit.sizing.source import Source
from weightkit.sizing.weights import Weights

#: Seconds of one H200 for a MoE layer of ``MEASURED_ON``, from FP8 to int4, calibrated with 512 x 4096 tokens.
MOE_LAYER_S = 23.3
MEASURED_ON = "deepseek-v3"
_HIDDEN_BYTES = 2


@dataclass(frozen=True, slots=True)
class Route:
    """One command, from the source as it lies on disk or at its address.

    Attributes:
        command: as it is typed.
        reads_bytes: from files, as the command's dry run counts them, or, of ``fetch`` and from an address, from the
            network. What ranks share is read by each; a disk is spared what the page cache keeps of it.
        writes_bytes: to the disk, what stays there.
        disk_bytes: most that lies on the disk at once: source, result, and what is kept for a resume. Not files of a
            source at an address, a few of which pass through the disk at a time (``--spool``).
        wall_s: at the speeds that were assumed. A disk's speed is shared by what is read and what is written.
        bound_by: ``network``, ``disk`` or ``computing``, whichever takes longest; they go on side by side.
        projected: whether the time follows from a measurement on another model, not from the speeds alone.
    """

    command: str
    reads_bytes: int
    writes_bytes: int
    disk_bytes: int
    wall_s: float
    bound_by: str
    projected: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    """Where bytes come from, and how fast: ``held`` of them lie on the disk, none of an address."""

    held: int
    disk: int
    network: int
    is_remote: bool

    def convert(self, command: str, reads: int, writes: int) -> Route:
        return Route(command, reads, writes, self.held + writes, *self.time(reads, writes))

    def time(self, reads: int, writes: int) -> tuple[float, str]:
        """Seconds of moving bytes, and what bounds it."""
        return self.fetch(reads, writes) if self.is_remote else ((reads + writes) / self.disk, "disk")

    def fetch(self, reads: int, writes: int) -> tuple[float, str]:
        """The same, over the network."""
        return max((reads / self.network, "network"), (writes / self.disk, "disk"), key=lambda each: each[0])


def routes_of(
    source: Source,
    own: Weights,
    forms: Sequence[Form],
    weights: Mapping[str, Weights],
    *,
    gpus: int,
    disk_speed: int,
    network_speed: int,
) -> tuple[Route, ...]:
    """Every command that makes something of the source.

    Args:
        source: whose routes.
        own: its weights as they are.
        forms: from ``forms_of``.
        weights: of those that can be had, by name.
        gpus: ranks to shard for, where that is legal; else the most that are and are not more.
        disk_speed, network_speed: bytes a second.
    """
    remote = source.path is not None and is_remote(source.path)
    held = 0 if remote else source.files_bytes or own.size_bytes(mtp=True)
    place = _Place(held, disk_speed, network_speed, remote)
    made = {form.command.split()[1]: (form, weights[form.name]) for form in forms if form.command and not form.missing}
    return tuple(_routes(source, own, made, gpus, place))


_Made = Mapping[str, tuple[Form, Weights]]  # by the command that makes it: cast, quantize


def _routes(source: Source, own: Weights, made: _Made, gpus: int, place: _Place) -> Iterator[Route]:
    data, main = own.size_bytes(mtp=True), own.size_bytes(mtp=False)
    strips = main < data
    suffix = " --no-mtp" if strips else ""
    if source.published:
        yield Route("fetch", place.held, place.held, place.held, *place.fetch(place.held, place.held))
    if strips:
        yield place.convert("strip", main, main)
    for name, (form, result) in made.items():
        command, out = form.command.removeprefix("weightkit ") + suffix, result.size_bytes(mtp=False)
        if name == "quantize":
            yield _quantize(command, source, place, reads=main, writes=out)
        else:
            yield place.convert(command, main, out)
    yield from _shards(source, made, gpus, place)


def _shards(source: Source, made: _Made, gpus: int, place: _Place) -> Iterator[Route]:
    arch = source.arch
    ranks = _most(legal_mp(arch, fp8=arch.is_fp8, gptq=arch.is_gptq), gpus)
    yield place.convert(f"shard --mp {ranks}", *shard_bytes(source, arch, ranks))
    if "cast" in made:
        bf16 = made["cast"][0].arch
        ranks = _most(legal_mp(bf16, fp8=False), gpus)
        yield place.convert(f"shard --mp {ranks} --to bf16", *shard_bytes(source, bf16, ranks))


def _most(legal: tuple[int, ...], gpus: int) -> int:
    return max(n for n in legal if n <= gpus)


def _quantize(command: str, source: Source, place: _Place, *, reads: int, writes: int) -> Route:
    """Two snapshots of the activations lie beside the output for a moment, before the older one goes."""
    snapshots = 2 * source.calibration_tokens * source.arch.hidden_size * _HIDDEN_BYTES
    moving = place.time(reads, writes)
    computing = (quantization_s(source.arch), "computing")
    slowest = max(computing, moving, key=lambda each: each[0])
    return Route(command, reads, writes, place.held + writes + snapshots, *slowest, projected=True)


def quantization_s(arch: Architecture) -> float:
    """Seconds that one H200 would compute, projected from DeepSeek-V3: in proportion to experts, their width and the
    hidden size. Solving and the forward pass both grow with these; the number of calibration tokens is taken as there.
    """
    measured = Architecture.from_config(manifests.load(MEASURED_ON).config)
    return MOE_LAYER_S * _moe_layers(arch) * _layer_elements(arch) / _layer_elements(measured)


def _moe_layers(arch: Architecture) -> int:
    return sum(arch.is_moe_layer(layer) for layer in range(arch.num_hidden_layers))


def _layer_elements(arch: Architecture) -> int:
    return (arch.n_routed_experts + arch.n_shared_experts) * arch.moe_intermediate_size * arch.hidden_size
