"""What the members of the DeepSeek-V3 family are made of: configs, tensor names, roles, split dimensions."""

from weightkit.family.architecture import FP8, Architecture, Quantization
from weightkit.family.blueprint import (
    Expected,
    Role,
    Totals,
    blueprint,
    expert_of,
    is_mtp,
    layer_of,
    totals,
)
from weightkit.family.names import to_demo, to_published

__all__ = [
    "FP8",
    "Architecture",
    "Expected",
    "Quantization",
    "Role",
    "Totals",
    "blueprint",
    "expert_of",
    "is_mtp",
    "layer_of",
    "to_demo",
    "to_published",
    "totals",
]
