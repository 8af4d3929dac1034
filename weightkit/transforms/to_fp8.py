"""Float weights to FP8 with block scales, for those who trained on in BF16: the way back from ``cast``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.tensors import LazyTensor, quantize_blocks
from weightkit.errors import PlanError
from weightkit.family import Architecture, blueprint
from weightkit.layouts.declare import QUANTIZATION_FIELD, architecture_of
from weightkit.transforms.cast import cast

SCALE_FORMATS = ("f32", "ue8m0")


def cast_to_fp8(checkpoint: Checkpoint, *, scale_fmt: str = "f32") -> Checkpoint:
    """The checkpoint with the weights in F8_E4M3 that the published FP8 members have so, the rest in BF16.

    Blocks of 128 x 128 share a scale (see ``weightkit.kernels.fp8_quant``); weights that came from FP8 keep the values
    that they were dequantized to. The config declares it as the published ones do.

    Args:
        checkpoint: BF16, F16 or F32, or GPTQ.
        scale_fmt: ``f32``, or ``ue8m0``: scales that are powers of two, stored in F32 as in V3.1.

    Raises:
        PlanError: an FP8 checkpoint, or another scale format.
        Others as ``cast``.
    """
    if scale_fmt not in SCALE_FORMATS:
        choices = " or ".join(SCALE_FORMATS)
        raise PlanError("unknown scale format", where="--scale-fmt", expected=choices, found=repr(scale_fmt))
    if architecture_of(checkpoint).is_fp8:
        raise PlanError(
            "FP8 already", where=checkpoint.root, fix="Cast it to bf16 first, if its scales are to be made anew."
        )
    rest = cast(checkpoint, "bf16")
    config = {**rest.config, QUANTIZATION_FIELD: _declaration(scale_fmt)}
    expected = blueprint(Architecture.from_config(config, where=f"the config of {checkpoint.root}"))
    tensors: dict[str, LazyTensor] = {}
    placement = dict(rest.placement)
    for name, tensor in rest.tensors.items():
        item = expected.get(name)
        if item is None or item.scale_name is None:
            tensors[name] = tensor
            continue
        source = checkpoint.tensors.get(name, tensor)  # unrounded, where it is wider than BF16
        codes, scales = quantize_blocks(source, power_of_two=scale_fmt == "ue8m0", name=name)
        tensors[name], tensors[item.scale_name] = codes, scales
        if name in placement:
            placement[item.scale_name] = placement[name]
    return replace(rest, tensors=tensors, config=config, placement=placement)


def _declaration(scale_fmt: str) -> Mapping[str, object]:
    """``quantization_config`` as the published members have it."""
    declared: dict[str, object] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    return declared | ({"scale_fmt": "ue8m0"} if scale_fmt == "ue8m0" else {})
