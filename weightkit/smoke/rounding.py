"""What storage formats do to weights, so that what they explain of a difference can be told from what they do not.

Two tensors of one weight differ by what their formats lose. The estimate takes the finer of the two and rounds it to
the nearest values of the coarser format: its own damage aside, what that loses is what any sound conversion loses, to a
small factor. A weight that comes from the coarser format in the first place (BF16 cast from FP8) is met by this
rounding again and loses next to nothing; then next to nothing is explained.

Where both are FP8, or codes of as many bits, rounding again would find nothing to round. Then each is taken to be off
by an error spread evenly over a step of its format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.dtypes import TORCH_NAMES
from weightkit.family import FP8, Architecture
from weightkit.transforms.cast import CODES_SUFFIX, PARTNERS, is_scale

_FP8_BLOCK = 128
_FP8_LARGEST = 448.0
_FP8_MANTISSA_BITS = 3
_FP8_SMALLEST = 2.0**-9


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Attributes:
        dtype: ``F32``, ``F16``, ``BF16``, ``F8_E4M3``; or ``I4``, ``I8`` for integer codes.
        group_size: of integer codes: input features that share a scale; -1: all.
    """

    dtype: str
    group_size: int = 0

    @property
    def coarseness(self) -> float:
        """The usual relative error of rounding to it, roughly: only their order matters."""
        return {"F32": 2**-25, "F16": 2**-12, "BF16": 2**-9, "I8": 2**-7, "F8_E4M3": 2**-5, "I4": 2**-3}[self.dtype]

    @property
    def is_scaled(self) -> bool:
        """Whether values are codes with scales."""
        return self.dtype in ("I4", "I8", "F8_E4M3")

    @property
    def is_integer(self) -> bool:
        """Whether values are integer codes with a scale a group."""
        return self.dtype in ("I4", "I8")

    def __str__(self) -> str:
        names = {"I4": "int4", "I8": "int8", "F8_E4M3": "FP8"}
        return names.get(self.dtype, self.dtype)


def stored_formats(checkpoint: Checkpoint) -> dict[str, Format]:
    """The format of every weight of an opened checkpoint that is not cast, by the name that it has once cast."""
    quantization = Architecture.from_config(checkpoint.config, where=str(checkpoint.root)).quantization or FP8
    tensors, found = checkpoint.tensors, {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            found[f"{module}.weight"] = Format(f"I{quantization.bits}", quantization.group_size)
        elif is_scale(name, tensors) or (leaf in PARTNERS and f"{module}{CODES_SUFFIX}" in tensors):
            continue
        elif tensor.dtype in TORCH_NAMES or tensor.dtype == "F8_E4M3":
            found[name] = Format(tensor.dtype)
    return found


def explained(one: torch.Tensor, other: torch.Tensor, formats: tuple[Format, Format]) -> torch.Tensor:
    """A difference such as the formats explain, of the shape of both tensors, F32. See the module's text.

    Args:
        one, other: F32, of the same shape: a matrix [out, in], of which any rows that begin at a multiple of 128, or a
            vector.
        formats: in which they are stored.
    """
    if formats[0].dtype == formats[1].dtype and formats[0].is_scaled:
        return _noise(one, formats[0], seed=0) - _noise(other, formats[1], seed=1)
    by_fineness = sorted(zip((one, other), formats, strict=True), key=lambda pair: pair[1].coarseness)
    finer, coarser = by_fineness[0][0], by_fineness[1][1]
    return round_to(finer, coarser) - finer


def round_to(weight: torch.Tensor, form: Format) -> torch.Tensor:
    """``weight``, F32, each value rounded to the nearest that ``form`` has; scales follow from the largest values."""
    if not form.is_scaled or weight.dim() != 2:
        dtype = getattr(torch, TORCH_NAMES[form.dtype]) if not form.is_scaled else torch.bfloat16
        return weight.to(dtype).float()
    scale = _scale(weight, form)
    if form.dtype == "F8_E4M3":
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale
    most = 2 ** (_bits(form) - 1)
    return (weight / scale).round().clamp(-most, most - 1) * scale


def _noise(weight: torch.Tensor, form: Format, seed: int) -> torch.Tensor:
    """What rounding to ``form`` may have done to ``weight``: drawn evenly from a step of it, the same at every call."""
    if weight.dim() != 2:
        return torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(seed)
    even = torch.rand(weight.shape, generator=generator).to(weight.device) - 0.5
    step = _scale(weight, form)
    if form.dtype == "F8_E4M3":
        exponent = (weight / step).abs().clamp_min(_FP8_SMALLEST).log2().floor() - _FP8_MANTISSA_BITS
        step = step * exponent.exp2().clamp_min(_FP8_SMALLEST)
    return even * step


def _scale(weight: torch.Tensor, form: Format) -> torch.Tensor:
    """The scale of each value, [out, in]."""
    rows, columns = weight.shape
    if form.dtype == "F8_E4M3":
        height, width, largest = _FP8_BLOCK, _FP8_BLOCK, _FP8_LARGEST
    else:
        height, width, largest = 1, columns if form.group_size == -1 else form.group_size, (2 ** _bits(form) - 1) / 2
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width).amax(dim=(1, 3))
    scale = (blocks / largest).clamp_min(torch.finfo(torch.float32).tiny)
    return scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]


def _bits(form: Format) -> int:
    return int(form.dtype.removeprefix("I"))


def format_of(formats: Mapping[str, Format], name: str) -> Format:
    """The format of a weight; BF16 for one that is made in another way."""
    return formats.get(name, Format("BF16"))
