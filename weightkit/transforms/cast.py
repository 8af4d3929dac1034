"""Float weights in another dtype: FP8 with its block scales, and GPTQ of 4 or 8 bits, become BF16, F16 or F32."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.dtypes import FLOAT_DTYPES
from weightkit.checkpoint.tensors import LazyTensor, cast_to, dequantize, dequantize_groups
from weightkit.errors import PlanError, ScaleError, UnsupportedError, WeightkitError, raise_all
from weightkit.family import Architecture, Quantization, blueprint
from weightkit.layouts.declare import architecture_of, declare_dtype, declare_in_side_files
from weightkit.layouts.fit import require_fit

SCALE_SUFFIX = "_scale_inv"
CODES_SUFFIX = ".qweight"
#: What a GPTQ weight has beside its ``qweight``.
PARTNERS = ("qzeros", "scales", "g_idx")
#: Cast wherever they are found. F32 is cast where the published model has weights that are not F32: router biases are
#: meant to stay so. No member has integers: where there are some, they are codes of a quantization.
WEIGHT_DTYPES = frozenset(("BF16", "F16"))


def cast(checkpoint: Checkpoint, to: str) -> Checkpoint:
    """The checkpoint with its weights in ``to``: ``bf16``, ``f16`` or ``f32``.

    An FP8 weight becomes ``float32(weight) * scale_inv`` rounded once to nearest even, and its scale tensor goes. The
    four tensors of a GPTQ weight become the one that it was made from, ``NAME.weight`` [out, in], each value
    ``(code - zero) * float32(scale)`` rounded once. BF16 and F16 weights are cast, and F32 ones that an earlier cast
    made; what is published in F32 stays F32. The config then declares what the tensors are.

    Raises:
        PlanError: an unknown dtype.
        ConfigError: not a member of the family.
        ScaleError: an FP8 weight without a scale, a scale without a weight, or one that does not fit; a GPTQ weight
            that lacks one of its tensors, or one of them without its weight; all of them at once.
        MissingTensorError, TensorError: a tensor that the config calls for is not there, or has another shape.
        UnsupportedError: a dtype that no cast is defined for, such as packed FP4 in I8, or another quantization.
    """
    if to not in FLOAT_DTYPES:
        raise PlanError("unknown dtype", where="--to", expected=", ".join(FLOAT_DTYPES), found=repr(to))
    dtype = FLOAT_DTYPES[to]
    arch = _architecture(checkpoint)
    widened = _weights_not_published_in_f32(arch)
    tensors: dict[str, LazyTensor] = {}
    problems: list[WeightkitError] = []
    for name, tensor in checkpoint.tensors.items():
        if is_scale(name, checkpoint.tensors) or (arch.is_gptq and _is_partner(name, checkpoint.tensors)):
            continue
        try:
            if arch.quantization is not None and arch.is_gptq and _is_gptq(name):
                weight = name.removesuffix(CODES_SUFFIX) + ".weight"
                tensors[weight] = _dequantized(name, checkpoint.tensors, arch.quantization, dtype)
            else:
                tensors[name] = _cast_tensor(name, tensor, checkpoint.tensors, dtype, widened)
        except WeightkitError as problem:
            problems.append(problem)
    raise_all(f"cannot be cast to {to}", problems, where=checkpoint.root)
    require_fit(checkpoint, arch, f"cannot be cast to {to}")
    config = declare_dtype(checkpoint.config, dtype)
    sides = declare_in_side_files(config, checkpoint.side_files)
    return replace(checkpoint, tensors=tensors, config=config, side_files=sides)


def _architecture(checkpoint: Checkpoint) -> Architecture:
    arch = architecture_of(checkpoint)
    if arch.quantization is not None and not (arch.is_fp8 or arch.is_gptq):
        raise UnsupportedError(
            "no cast is defined for this quantization",
            where=f"{checkpoint.root}: quantization_config",
            expected="fp8, gptq, or none",
            found=arch.quantization.method,
            fix="Cast the FP8 or BF16 repository of this model.",
        )
    return arch


def _is_gptq(name: str) -> bool:
    """Whether ``name`` is one of the four tensors of a GPTQ weight."""
    return name.endswith(CODES_SUFFIX) or name.rpartition(".")[2] in PARTNERS


def _is_partner(name: str, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether ``name`` belongs to a ``qweight`` among ``tensors``."""
    module, _, leaf = name.rpartition(".")
    return leaf in PARTNERS and module + CODES_SUFFIX in tensors


def _dequantized(name: str, tensors: Mapping[str, LazyTensor], quantization: Quantization, dtype: str) -> LazyTensor:
    """The weight that the ``qweight`` ``name`` and its partners stand for."""
    module = name.rpartition(".")[0]
    if not name.endswith(CODES_SUFFIX):
        raise ScaleError("a part of a GPTQ weight without its codes", where=name, expected=module + CODES_SUFFIX)
    missing = [f"{module}.{leaf}" for leaf in PARTNERS if f"{module}.{leaf}" not in tensors]
    if missing:
        raise ScaleError(
            "a GPTQ weight that lacks a part", where=name, expected=", ".join(missing), found="no such tensor"
        )
    qzeros, scales, g_idx = (tensors[f"{module}.{leaf}"] for leaf in PARTNERS)
    return dequantize_groups(
        tensors[name],
        qzeros,
        scales,
        g_idx,
        bits=quantization.bits,
        zero_offset=quantization.zero_offset,
        dtype=dtype,
        name=module,
    )


def _weights_not_published_in_f32(arch: Architecture) -> frozenset[str]:
    """What is F32 only if it was cast to it."""
    records = blueprint(replace(arch, dtype="BF16", quantization=None))
    return frozenset(name for name, record in records.items() if not record.allows("F32"))


def is_scale(name: str, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether ``name`` is the block scale of an FP8 weight among ``tensors``."""
    weight = tensors.get(name.removesuffix(SCALE_SUFFIX)) if name.endswith(SCALE_SUFFIX) else None
    return weight is not None and weight.dtype == "F8_E4M3"


def _cast_tensor(
    name: str, tensor: LazyTensor, tensors: Mapping[str, LazyTensor], dtype: str, widened: Set[str]
) -> LazyTensor:
    if tensor.dtype == "F8_E4M3":
        scale = tensors.get(name + SCALE_SUFFIX)
        if scale is None:
            raise ScaleError(
                "an FP8 weight without its scale",
                where=name,
                expected=name + SCALE_SUFFIX,
                found="no such tensor",
                fix="Fetch the file that holds the scale: without it the weight has no meaning.",
            )
        return dequantize(tensor, scale, dtype, name=name)
    if name.endswith(SCALE_SUFFIX):
        raise ScaleError(
            "a scale without an FP8 weight", where=name, expected=f"F8_E4M3 {name.removesuffix(SCALE_SUFFIX)}"
        )
    if tensor.dtype == "F32" and name not in widened:
        return tensor
    if tensor.dtype == "F32" or tensor.dtype in WEIGHT_DTYPES:
        return cast_to(tensor, dtype)
    raise UnsupportedError(
        "no cast is defined for this dtype", where=name, expected="F8_E4M3, BF16, F16 or F32", found=tensor.dtype
    )
