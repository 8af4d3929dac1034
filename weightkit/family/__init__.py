"""What the members of the DeepSeek-V3 family are made of: configs, tensor names, roles, split dimensions."""

from weightkit.family.architecture import FP8, SUPPORTED, Architecture, Quantization
from weightkit.family.blueprint import (
    DTYPE_SIZE_BYTES,
    Expected,
    Role,
    Totals,
    blueprint,
    expert_of,
    is_mtp,
    layer_of,
    layer_records,
    outer_records,
    totals,
)
from weightkit.family.degrees import (
    DegreeProblem,
    expert_ranges,
    legal_expert_counts,
    legal_mp,
    mp_problems,
    require_mp,
)
from weightkit.family.demo import DEMO_DTYPES, demo_arguments, demo_limits, in_demo
from weightkit.family.names import rename_expert, to_demo, to_published

__all__ = [
    "DEMO_DTYPES",
    "DTYPE_SIZE_BYTES",
    "FP8",
    "SUPPORTED",
    "Architecture",
    "DegreeProblem",
    "Expected",
    "Quantization",
    "Role",
    "Totals",
    "blueprint",
    "demo_arguments",
    "demo_limits",
    "expert_of",
    "expert_ranges",
    "in_demo",
    "is_mtp",
    "layer_of",
    "layer_records",
    "legal_expert_counts",
    "legal_mp",
    "mp_problems",
    "outer_records",
    "rename_expert",
    "require_mp",
    "to_demo",
    "to_published",
    "totals",
]
