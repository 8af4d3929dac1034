"""What each command of the road reads, writes and takes. Data alone: headers and side files are a few megabytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from weightkit import manifests
from weightkit.family import Architecture, legal_mp
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
    """One command, from the source as it lies on disk.

    Attributes:
        command: as it is typed.
        reads_bytes: from files, as the command's dry run counts them, or, of ``fetch``, from the network. What ranks
            share is read by each; a disk is spared what the page cache keeps of it.
        writes_bytes: to the disk, what stays there.
        disk_bytes: most that lies on the disk at once: source, result, and what is kept for a resume.
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
class _Speeds:
    disk: int
    network: int

    def convert(self, command: str, held: int, reads: int, writes: int) -> Route:
        return Route(command, reads, writes, held + writes, (reads + writes) / self.disk, "disk")


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
    speeds = _Speeds(disk_speed, network_speed)
    made = {form.command.split()[1]: (form, weights[form.name]) for form in forms if form.command and not form.missing}
    return tuple(_routes(source, own, made, gpus, speeds))


_Made = Mapping[str, tuple[Form, Weights]]  # by the command that makes it: cast, quantize


def _routes(source: Source, own: Weights, made: _Made, gpus: int, speeds: _Speeds) -> Iterator[Route]:
    data, main = own.size_bytes(mtp=True), own.size_bytes(mtp=False)
    held, strips = source.files_bytes or data, main < data
    suffix = " --no-mtp" if strips else ""
    if source.published:
        by_network, by_disk = held / speeds.network, held / speeds.disk
        bound = "network" if by_network >= by_disk else "disk"
        yield Route("fetch", held, held, held, max(by_network, by_disk), bound)
    if strips:
        yield speeds.convert("strip", held, main, main)
    for name, (form, result) in made.items():
        command, out = form.command.removeprefix("weightkit ") + suffix, result.size_bytes(mtp=False)
        if name == "quantize":
            yield _quantize(command, source, speeds, held=held, reads=main, writes=out)
        else:
            yield speeds.convert(command, held, main, out)
    yield from _shards(source, made, held, gpus, speeds)


def _shards(source: Source, made: _Made, held: int, gpus: int, speeds: _Speeds) -> Iterator[Route]:
    arch = source.arch
    ranks = _most(legal_mp(arch, fp8=arch.is_fp8, gptq=arch.is_gptq), gpus)
    yield speeds.convert(f"shard --mp {ranks}", held, *shard_bytes(source, arch, ranks))
    if "cast" in made:
        bf16 = made["cast"][0].arch
        ranks = _most(legal_mp(bf16, fp8=False), gpus)
        yield speeds.convert(f"shard --mp {ranks} --to bf16", held, *shard_bytes(source, bf16, ranks))


def _most(legal: tuple[int, ...], gpus: int) -> int:
    return max(n for n in legal if n <= gpus)


def _quantize(command: str, source: Source, speeds: _Speeds, *, held: int, reads: int, writes: int) -> Route:
    """Two snapshots of the activations lie beside the output for a moment, before the older one goes."""
    snapshots = 2 * source.calibration_tokens * source.arch.hidden_size * _HIDDEN_BYTES
    by_disk, computing = (reads + writes) / speeds.disk, quantization_s(source.arch)
    bound = "computing" if computing >= by_disk else "disk"
    return Route(command, reads, writes, held + writes + snapshots, max(by_disk, computing), bound, projected=True)


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
