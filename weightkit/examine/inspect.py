"""What a checkpoint is: the model, its parts, their sizes, and what can be done with it. No tensor data is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

from weightkit import manifests
from weightkit.checkpoint.dtypes import size_bytes as dtype_bytes
from weightkit.checkpoint.lock import read_lock
from weightkit.checkpoint.remote import locate
from weightkit.errors import NotACheckpointError, PlanError, WeightkitError, printable
from weightkit.examine.declared import identify
from weightkit.examine.tensors import SCALE_SUFFIX
from weightkit.family import Architecture, Expected, blueprint, is_mtp, layer_of, legal_mp
from weightkit.layouts import open_checkpoint
from weightkit.layouts.declare import without_stale_quantization
from weightkit.manifests import Expectation, Manifest
from weightkit.remote.address import title_of
from weightkit.units import counted, human_bytes

#: Rows of the table, in the order of the model; what a checkpoint lacks is left out.
COMPONENTS = (
    "embedding",
    "attention",
    "indexer",
    "dense",
    "router",
    "routed",
    "shared",
    "norm",
    "head",
    "mtp",
    "rotary",
    "other",
)
#: Names of manifests shown; members that were trained further have the same totals.
SHOWN_NAMES = 4


@dataclass(frozen=True, slots=True)
class Component:
    """A part of the model.

    Attributes:
        name: one of ``COMPONENTS``. All of the MTP layers is ``mtp``, with the embedding and head that they repeat.
        tensors: with block scales.
        parameters: weights: elements, without scales and stored ``inv_freq``; of GPTQ the codes in the words.
        size_bytes: of data, block scales included.
    """

    name: str
    tensors: int
    parameters: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DtypeTotal:
    """All elements of one dtype, block scales included; spelled as safetensors does."""

    dtype: str
    tensors: int
    elements: int
    size_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        name: the folder's name, or the manifest's.
        path: None for a manifest.
        member: the family's name for people; ``model_type`` is the config's.
        layout: ``published``, ``single file``, ``8 mp ranks``...; ``manifest`` where nothing was opened.
        files: weight files; None where a manifest does not know.
        tensors, size_bytes: of all tensors, under their published names: what is on several ranks counts once.
        components, dtypes: the same by part and by dtype.
        parameters: the weights that the tensors stand for, MTP layers included; scales are none.
        main_parameters: without MTP layers: what the model's name says, 671 billion for DeepSeek-V3.
        activated_parameters: what one token's pass through the main model multiplies by: all but the embedding, of
            which it looks one row up, and the routed experts that it does not use.
        layers: number of dense, MoE and MTP layers.
        experts: routed and shared experts a MoE layer, routed experts a token uses, groups and usable groups.
        context_length: ``max_position_embeddings``, in tokens.
        legal_mp: by form (``fp8``, ``int4``, ``bf16``), the numbers of ranks that ``shard --mp`` takes.
        quantization: of GPTQ weights, ``method``, ``bits``, ``group_size``, ``sym``, ``desc_act`` and
            ``checkpoint_format``; else empty.
        published_as: manifests whose totals are exactly these.
        differs: of a manifest, what its published totals say otherwise than the blueprint; empty where all match.
        origin: what the folder's lock says made it.
    """

    name: str
    path: Path | None
    member: str
    model_type: str
    layout: str
    files: int | None
    tensors: int
    size_bytes: int
    components: tuple[Component, ...]
    dtypes: tuple[DtypeTotal, ...]
    parameters: int
    main_parameters: int
    activated_parameters: int
    layers: Mapping[str, int]
    experts: Mapping[str, int]
    context_length: int
    legal_mp: Mapping[str, tuple[int, ...]]
    quantization: Mapping[str, object] = field(default_factory=dict)
    published_as: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    origin: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return asdict(self) | {"path": None if self.path is None else str(self.path)}

    def render(self) -> str:
        """``render_inspection`` of it."""
        return render_inspection(self)


class _Item(NamedTuple):
    """A tensor to be counted."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def inspect(what: str | Path, *, config: str | Path | Mapping[str, object] | None = None) -> Inspection:
    """Say what a checkpoint is, or what a known one will be when it is fetched.

    Args:
        what: a checkpoint's path or address, in any layout, or the name of a manifest (``deepseek-v3``). A path that
            exists comes first.
        config: as for ``open_checkpoint``.

    Raises:
        NotACheckpointError: neither.
        UnsupportedError: not a member of the family; says what was found.
        CheckpointError, FormatError, ConfigError: as ``open_checkpoint``; ``verify`` says more.
    """
    path = locate(what)
    if path.exists():
        return _inspect_path(path, config)
    try:
        manifest = manifests.load(str(what))
    except PlanError as error:
        raise NotACheckpointError(
            "no such path, and no known model of this name", where=what, expected=error.expected, fix=error.fix
        ) from error
    return _inspect_manifest(manifest)


def _inspect_path(path: Path, config: str | Path | Mapping[str, object] | None) -> Inspection:
    checkpoint = open_checkpoint(path, config=config)
    arch = identify(without_stale_quantization(checkpoint.config, checkpoint.tensors.values()), path)
    if isinstance(arch, WeightkitError):
        raise arch
    items = [_Item(name, tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()]
    found = _count(
        arch,
        items,
        blueprint(arch),
        name=title_of(path.resolve()),
        layout=checkpoint.layout,
        files=len(checkpoint.stamps),
    )
    lock = read_lock(path if path.is_dir() else path.parent)
    origin = lock.origin if lock is not None else {}
    return replace(found, path=path, published_as=_published_as(found), origin=origin)


def _inspect_manifest(manifest: Manifest) -> Inspection:
    arch = Architecture.from_config(manifest.config, where=f"the manifest of {manifest.name}")
    records = blueprint(arch)
    items = [_Item(item.name, item.dtype, item.shape) for item in records.values()]
    files = manifest.expected.files if manifest.expected is not None else None
    found = _count(arch, items, records, name=manifest.name, layout="manifest", files=files)
    return replace(found, published_as=_published_as(found), differs=_differences(manifest.expected, found))


def _count(
    arch: Architecture,
    items: Sequence[_Item],
    records: Mapping[str, Expected],
    *,
    name: str,
    layout: str,
    files: int | None,
) -> Inspection:
    components, dtypes = _by_component(arch, items, records), _by_dtype(items)
    counts = {component.name: component.parameters for component in components}
    parameters = sum(counts.values())
    mtp_layers = {layer_of(item.name) for item in items if is_mtp(item.name, arch)}
    moe = sum(arch.is_moe_layer(layer) for layer in range(arch.num_hidden_layers))
    return Inspection(
        name=name,
        path=None,
        member=arch.member,
        model_type=arch.model_type,
        layout=layout,
        files=files,
        tensors=len(items),
        size_bytes=sum(component.size_bytes for component in components),
        components=components,
        dtypes=dtypes,
        parameters=parameters,
        main_parameters=parameters - counts.get("mtp", 0),
        activated_parameters=_activated(arch, counts),
        layers={"dense": arch.num_hidden_layers - moe, "moe": moe, "mtp": len(mtp_layers)},
        experts={
            "routed": arch.n_routed_experts,
            "shared": arch.n_shared_experts,
            "per_token": arch.num_experts_per_tok,
            "groups": arch.n_group,
            "groups_per_token": arch.topk_group,
        },
        context_length=arch.max_position_embeddings,
        legal_mp=_legal_mp(arch),
        quantization=_quantization(arch),
    )


def _legal_mp(arch: Architecture) -> dict[str, tuple[int, ...]]:
    bf16 = legal_mp(arch, fp8=False)
    if arch.quantization is not None and arch.is_gptq:
        return {f"int{arch.quantization.bits}": legal_mp(arch, fp8=False, gptq=True), "bf16": bf16}
    return {"fp8": legal_mp(arch, fp8=True), "bf16": bf16}


def _quantization(arch: Architecture) -> dict[str, object]:
    found = arch.quantization
    if found is None or not found.is_gptq:
        return {}
    keys = ("method", "bits", "group_size", "sym", "desc_act", "checkpoint_format")
    return {key: getattr(found, key) for key in keys}


def _by_component(arch: Architecture, items: Iterable[_Item], records: Mapping[str, Expected]) -> tuple[Component, ...]:
    totals = {name: [0, 0, 0] for name in COMPONENTS}
    for item in items:
        record = records.get(item.name)
        part = record.component if record is not None else "other"
        total = totals["mtp" if is_mtp(item.name, arch) else part]
        total[0] += 1
        unknown = 0 if item.name.endswith(SCALE_SUFFIX) else prod(item.shape)
        total[1] += unknown if record is None else record.parameters
        total[2] += dtype_bytes(item.dtype, item.shape)
    return tuple(Component(name, *total) for name, total in totals.items() if total[0])


def _by_dtype(items: Iterable[_Item]) -> tuple[DtypeTotal, ...]:
    totals: dict[str, list[int]] = {}
    for item in items:
        total = totals.setdefault(item.dtype, [0, 0, 0])
        total[0] += 1
        total[1] += prod(item.shape)
        total[2] += dtype_bytes(item.dtype, item.shape)
    ordered = sorted(totals.items(), key=lambda pair: (-pair[1][2], pair[0]))
    return tuple(DtypeTotal(dtype, *total) for dtype, total in ordered)


def _activated(arch: Architecture, parameters: Mapping[str, int]) -> int:
    """See ``Inspection.activated_parameters``. A tied embedding is the head too, and counts."""
    left_out = {"mtp", "routed"} if arch.tie_word_embeddings else {"mtp", "routed", "embedding"}
    always = sum(count for name, count in parameters.items() if name not in left_out)
    return always + parameters.get("routed", 0) * arch.num_experts_per_tok // arch.n_routed_experts


def _differences(expected: Expectation | None, found: Inspection) -> tuple[str, ...]:
    """What a manifest's totals say otherwise."""
    if expected is None:
        return ()
    elements = {total.dtype: total.elements for total in found.dtypes}
    pairs = [
        ("tensors", expected.tensors, found.tensors),
        ("size_bytes", expected.size_bytes, found.size_bytes),
        *(
            (f"elements in {dtype}", expected.elements.get(dtype, 0), elements.get(dtype, 0))
            for dtype in sorted(expected.elements.keys() | elements.keys())
        ),
    ]
    return tuple(f"{what}: published {there:,}, computed {here:,}" for what, there, here in pairs if there != here)


def _published_as(found: Inspection) -> tuple[str, ...]:
    """The manifests of the same kind of model whose totals are these."""
    known = (manifests.load(name) for name in manifests.names())
    return tuple(
        manifest.name
        for manifest in known
        if manifest.expected is not None
        and manifest.config.get("model_type") == found.model_type
        and not _differences(manifest.expected, found)
    )


def render_inspection(found: Inspection) -> str:
    """A table for a terminal, at most 80 columns wide where names allow it."""
    facts = [*_model_facts(found), *_place_facts(found)]
    width = max(len(label) for label, _ in facts)
    lines = [f"{label:{width}}  {printable(value)}" for label, value in facts]
    total = Component("total", found.tensors, found.parameters, found.size_bytes)
    rows = [
        (part.name, f"{part.tensors:,}", f"{part.parameters:,}", human_bytes(part.size_bytes))
        for part in (*found.components, total)
    ]
    lines += ["", *_table(("component", "tensors", "parameters", "data"), rows)]
    rows = [
        (part.dtype, f"{part.tensors:,}", f"{part.elements:,}", human_bytes(part.size_bytes)) for part in found.dtypes
    ]
    return "\n".join([*lines, "", *_table(("dtype", "tensors", "elements", "data"), rows)])


def _model_facts(found: Inspection) -> list[tuple[str, str]]:
    layers, experts = found.layers, found.experts
    groups = f", {experts['groups_per_token']} of {experts['groups']} groups" if experts["groups"] > 1 else ""
    return [
        ("model", f"{found.name} ({found.member})"),
        (
            "parameters",
            f"{_billions(found.main_parameters)}, {_billions(found.activated_parameters)} activated a token"
            + (f", and {_billions(found.parameters - found.main_parameters)} in MTP" if layers["mtp"] else ""),
        ),
        ("layers", f"{layers['dense']} dense, {layers['moe']} MoE, {layers['mtp']} MTP"),
        (
            "experts",
            f"{experts['routed']} routed, {experts['shared']} shared, {experts['per_token']} routed a token{groups}",
        ),
        *_quantization_facts(found.quantization),
        ("context", f"{found.context_length:,} tokens"),
        *[(f"--mp in {dtype}", ", ".join(map(str, legal))) for dtype, legal in found.legal_mp.items()],
    ]


def _quantization_facts(found: Mapping[str, object]) -> list[tuple[str, str]]:
    if not found:
        return []
    group = found["group_size"]
    facts = [
        f"int{found['bits']} {str(found['method']).upper()}",
        "one group an output" if group == -1 else f"groups of {group}",
        "symmetric" if found["sym"] else "asymmetric",
        *(["activation order"] if found["desc_act"] else []),
        *([str(found["checkpoint_format"])] if found["checkpoint_format"] != "gptq" else []),
    ]
    return [("quantized", ", ".join(facts))]


def _place_facts(found: Inspection) -> list[tuple[str, str]]:
    files = f"{counted(found.files, 'file')}, " if found.files is not None else ""
    facts = [("layout", f"{found.layout}, {files}{found.tensors:,} tensors, {human_bytes(found.size_bytes)}")]
    if found.differs:
        facts += [("differs", difference) for difference in found.differs]
    elif found.published_as:
        more = len(found.published_as) - SHOWN_NAMES
        names = ", ".join(found.published_as[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
        facts.append(("totals", f"as published: {names}"))
    return facts + [_origin_fact(key, value) for key, value in found.origin.items()]


def _origin_fact(key: str, value: object) -> tuple[str, str]:
    """Of a fetch, where from; the lock has the checksums of its small files too."""
    if key != "fetch" or not isinstance(value, Mapping):
        return f"made by {key}", str(value)
    facts = " ".join(str(value[name]) for name in ("hub", "repo", "commit") if name in value)
    return "fetched from", facts + (", without MTP layers" if value.get("no_mtp") is True else "")


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 10_000_000 else f"{count / 1e6:.2f} M"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if number == 0 else '>'}{widths[number]}}" for number, cell in enumerate(row))
        for row in (head, *rows)
    ]
