"""What the members of the DeepSeek-V3 family are made of: configs, tensor names, roles, split dimensions."""

from weightkit.family.architecture import SUPPORTED, Architecture, rope_type
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
    quantizable_modules,
    totals,
)
from weightkit.family.degrees import (
    DegreeProblem,
    expert_ranges,
    legal_expert_counts,
    legal_mp,
    legal_tp,
    mp_problems,
    require_mp,
    tp_problems,
)
from weightkit.family.demo import DEMO_DTYPES, demo_arguments, demo_limits, in_demo
from weightkit.family.gptq import QUANTIZE_CONFIG_NAME, SCOPES, Scope, gptq_config, without_mtp_rules
from weightkit.family.names import rename_expert, to_demo, to_published
from weightkit.family.quantization import FP8, Quantization, read_gptq

__all__ = [
    "DEMO_DTYPES",
    "DTYPE_SIZE_BYTES",
    "FP8",
    "QUANTIZE_CONFIG_NAME",
    "SCOPES",
    "SUPPORTED",
    "Architecture",
    "DegreeProblem",
    "Expected",
    "Quantization",
    "Role",
    "Scope",
    "Totals",
    "blueprint",
    "demo_arguments",
    "demo_limits",
    "expert_of",
    "expert_ranges",
    "gptq_config",
    "in_demo",
    "is_mtp",
    "layer_of",
    "layer_records",
    "legal_expert_counts",
    "legal_mp",
    "legal_tp",
    "mp_problems",
    "outer_records",
    "quantizable_modules",
    "read_gptq",
    "rename_expert",
    "require_mp",
    "rope_type",
    "to_demo",
    "to_published",
    "totals",
    "tp_problems",
    "without_mtp_rules",
]
