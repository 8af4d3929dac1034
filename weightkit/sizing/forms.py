"""The formats that a model can be had in, each as the architecture from which its tensors follow."""

from __future__ import annotations

from dataclasses import dataclass, replace

from weightkit.errors import PlanError
from weightkit.family import Architecture, gptq_config, read_gptq
from weightkit.sizing.source import Source

FORMATS = ("fp8", "bf16", "int4")
GROUP_SIZE = 128
_BITS = 4


@dataclass(frozen=True, slots=True)
class Form:
    """A format of a model.

    Attributes:
        name: ``fp8``, ``bf16``, ``int4``; a GPTQ checkpoint of another width has that one's name.
        arch: as ``family.blueprint`` takes it, MTP layers included.
        command: what makes it of the source; empty where the source is it.
        missing: why the source cannot be had in this format; else empty.
    """

    name: str
    arch: Architecture
    command: str = ""
    missing: str = ""


def forms_of(source: Source, *, group_size: int = GROUP_SIZE) -> tuple[Form, ...]:
    """The source in FP8, BF16 and int4, in this order, where it can be had so; and why not, where not.

    int4 is what ``weightkit quantize`` writes: routed and shared experts by GPTQ, symmetric, groups of ``group_size``,
    the rest BF16.
    """
    return _fp8(source.arch), _bf16(source.arch), _integers(source.arch, group_size)


def _fp8(arch: Architecture) -> Form:
    missing = "" if arch.is_fp8 else "its weights are not FP8: plan what weightkit cast --to fp8 makes of them"
    return Form("fp8", arch, missing=missing)


def _bf16(arch: Architecture) -> Form:
    same = arch.quantization is None and arch.dtype == "BF16"
    return Form(
        "bf16", replace(arch, quantization=None, dtype="BF16"), command="" if same else "weightkit cast --to bf16"
    )


def _integers(arch: Architecture, group_size: int) -> Form:
    if arch.quantization is not None and arch.is_gptq:
        return Form(f"int{arch.quantization.bits}", arch)
    command = "weightkit quantize" + (f" --group-size {group_size}" if group_size != GROUP_SIZE else "")
    try:
        return Form(f"int{_BITS}", quantized(arch, group_size), command)
    except PlanError as error:
        return Form(f"int{_BITS}", arch, missing=error.message.rstrip("."))


def quantized(arch: Architecture, group_size: int) -> Architecture:
    """The architecture of what ``weightkit quantize`` writes. Raises ``PlanError`` for groups that do not divide."""
    config = gptq_config(
        arch, bits=_BITS, group_size=group_size, scope="experts", mtp=arch.num_nextn_predict_layers > 0, meta={}
    )
    return replace(arch, dtype="BF16", quantization=read_gptq(config, [], where="the planned quantization"))
