"""Whether two checkpoints are of one model, whatever their layout and formats."""

from __future__ import annotations

from dataclasses import fields

from weightkit import manifests
from weightkit.checkpoint import Checkpoint
from weightkit.errors import PlanError
from weightkit.family import Architecture
from weightkit.manifests import Manifest

#: What a conversion changes without changing what the model computes, formats aside.
_CONVERTED = {"quantization", "num_nextn_predict_layers", "dtype", "max_position_embeddings", "mtp_repeats_embedding"}


def architecture(checkpoint: Checkpoint) -> Architecture:
    """What the config describes. Raises ``ConfigError``."""
    return Architecture.from_config(checkpoint.config, where=f"the config of {checkpoint.root}")


def known_manifest(checkpoint: Checkpoint) -> Manifest | None:
    """The manifest with expectations whose architecture is the checkpoint's."""
    own = _identity(architecture(checkpoint))
    for name in manifests.names():
        manifest = manifests.load(name)
        if manifest.smoke is not None and _identity(Architecture.from_config(manifest.config, where=name)) == own:
            return manifest
    return None


def require_one_model(reference: Checkpoint, other: Checkpoint) -> None:
    """Raise ``PlanError`` for two checkpoints of different architectures; it names every field that differs."""
    one, two = _identity(architecture(reference)), _identity(architecture(other))
    differing = [name for name in one if one[name] != two[name]]
    if differing:
        raise PlanError(
            "not checkpoints of one model: their configs differ",
            where=f"{reference.root} and {other.root}",
            expected=", ".join(f"{name} {one[name]}" for name in differing),
            found=", ".join(f"{name} {two[name]}" for name in differing),
            fix="Compare a checkpoint with its own conversion, cast or quantization.",
        )


def _identity(arch: Architecture) -> dict[str, object]:
    found = {field.name: getattr(arch, field.name) for field in fields(arch) if field.name not in _CONVERTED}
    # layers with an indexer are counted with MTP layers
    found["indexer_layers"] = frozenset(layer for layer in arch.indexer_layers if layer < arch.num_hidden_layers)
    return found
