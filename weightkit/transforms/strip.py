"""MTP layers out."""

from __future__ import annotations

from dataclasses import replace

from weightkit.checkpoint import Checkpoint
from weightkit.family import is_mtp, without_mtp_rules
from weightkit.layouts.declare import QUANTIZATION_FIELD, architecture_of, declare_no_mtp
from weightkit.layouts.fit import require_fit


def strip_mtp(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without its multi-token-prediction layers: those from ``num_hidden_layers`` on.

    The config's ``num_nextn_predict_layers`` becomes 0, and GPTQ's rules about these layers alone go. A checkpoint
    without such layers comes back with equal tensors.

    Raises:
        ConfigError: not a member of the family.
        MissingTensorError, TensorError: a tensor that the config calls for is not there, or has another shape; all of
            them at once.
    """
    arch = architecture_of(checkpoint)
    require_fit(checkpoint, arch, "cannot be stripped")
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_mtp(name, arch)}
    config = declare_no_mtp(checkpoint.config)
    if arch.is_gptq and arch.quantization is not None:
        config[QUANTIZATION_FIELD] = without_mtp_rules(arch.quantization.raw, arch)
    return replace(checkpoint, tensors=tensors, config=config)
