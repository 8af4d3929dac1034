"""MTP layers out."""

from __future__ import annotations

from dataclasses import replace

from weightkit.checkpoint import Checkpoint
from weightkit.family import Architecture, is_mtp

MTP_FIELD = "num_nextn_predict_layers"


def strip_mtp(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without its multi-token-prediction layers: those from ``num_hidden_layers`` on.

    The config's ``num_nextn_predict_layers`` becomes 0. A checkpoint without such layers comes back with equal tensors.
    """
    arch = Architecture.from_config(checkpoint.config)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_mtp(name, arch)}
    config = dict(checkpoint.config)
    if MTP_FIELD in config:
        config[MTP_FIELD] = 0
    return replace(checkpoint, tensors=tensors, config=config)
