"""The model to be planned for: known by name, or a checkpoint on disk. No tensor data is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from weightkit import manifests
from weightkit.checkpoint.remote import locate
from weightkit.checkpoint.tensors import LazyTensor
from weightkit.errors import NotACheckpointError, PlanError
from weightkit.family import Architecture, is_mtp
from weightkit.layouts import open_checkpoint
from weightkit.layouts.declare import architecture_of
from weightkit.remote.address import title_of

#: Sequences, and tokens of each, where a manifest names no others: the defaults of ``weightkit quantize``.
CALIBRATION_SAMPLES, CALIBRATION_TOKENS = 512, 4096


@dataclass(frozen=True, slots=True)
class Source:
    """A model, as published or as it lies on disk.

    Attributes:
        name: the manifest's, or the folder's.
        arch: with the MTP layers that are there.
        path: None for a model that is only known by name.
        published: whether a hub has it.
        calibration_tokens: that ``weightkit quantize`` calibrates it with.
        tensors: of a checkpoint, by published name.
        files_bytes: of its weight files, headers included.
    """

    name: str
    arch: Architecture
    path: Path | None
    published: bool
    calibration_tokens: int = CALIBRATION_SAMPLES * CALIBRATION_TOKENS
    tensors: Mapping[str, LazyTensor] = field(default_factory=dict)
    files_bytes: int = 0


def read_source(what: str | Path, *, config: str | Path | Mapping[str, object] | None = None) -> Source:
    """The model that ``what`` names: a path that exists comes first, then a manifest.

    Raises:
        NotACheckpointError: neither.
        UnsupportedError, CheckpointError, FormatError, ConfigError: as ``open_checkpoint``.
    """
    path = locate(what)
    if path.exists():
        return _on_disk(path, config)
    try:
        manifest = manifests.load(str(what))
    except PlanError as error:
        raise NotACheckpointError(
            "no such path, and no known model of this name", where=what, expected=error.expected, fix=error.fix
        ) from error
    arch = Architecture.from_config(manifest.config, where=f"the manifest of {manifest.name}")
    data = manifest.calibration
    samples = (data.samples if data is not None else None) or CALIBRATION_SAMPLES
    tokens = (data.seq_len if data is not None else None) or CALIBRATION_TOKENS
    return Source(manifest.name, arch, None, bool(manifest.hubs), samples * tokens)


def _on_disk(path: Path, config: str | Path | Mapping[str, object] | None) -> Source:
    checkpoint = open_checkpoint(path, config=config)
    arch = architecture_of(checkpoint)
    if arch.num_nextn_predict_layers and not any(is_mtp(name, arch) for name in checkpoint.tensors):
        arch = without_mtp(arch)  # rank files have none, whatever the config that was given for them says
    files_bytes = sum(stamp.size_bytes for stamp in checkpoint.stamps.values())
    name = title_of(path.resolve())
    return Source(name, arch, path, False, tensors=checkpoint.tensors, files_bytes=files_bytes)


def without_mtp(arch: Architecture) -> Architecture:
    """The same model without its MTP layers."""
    indexers = frozenset(layer for layer in arch.indexer_layers if layer < arch.num_hidden_layers)
    return replace(arch, num_nextn_predict_layers=0, indexer_layers=indexers)
