"""Whether an engine finds the int4 tensors where the rules of ``dynamic`` send it.

Engines ask ``dynamic`` about the name of a fused layer and read all its parts alike. Sources:
``vllm/model_executor/layers/quantization/utils/gptq_utils.py`` and ``auto_gptq.py`` (``get_moe_quant_method``),
``sglang/srt/layers/quantization/utils.py`` (``get_linear_quant_method``).
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from weightkit.errors import TensorError, UnsupportedError, WeightkitError
from weightkit.family import Architecture, Quantization
from weightkit.family.quantization import rule_matches
from weightkit.serving.fused import fused_layers

GROUP_SIZES = (-1, 32, 64, 128)
"""``MARLIN_SUPPORTED_GROUP_SIZES`` of ``marlin_utils.py`` in both engines."""
HIDDEN_UNIT = 128
"""``check_moe_marlin_supports_layer``: the experts' kernel takes the hidden size in tiles of this."""
_PLAIN = frozenset(("BF16", "F16", "F32"))
_LEAVES = (".qweight", ".qzeros", ".g_idx")
_RULES = "quantization_config.dynamic"


def gptq_problems(arch: Architecture, dtypes: dict[str, str], *, engine: str, mtp: bool) -> Iterator[WeightkitError]:
    """What the engine would refuse, or read wrongly.

    Args:
        arch: a GPTQ architecture.
        dtypes: published name to dtype, of every tensor there is.
        engine: ``vllm`` or ``sglang``.
        mtp: whether the engine loads the MTP layers too.
    """
    quantization = arch.quantization
    if quantization is None:
        return
    yield from _kernel_problems(arch, quantization)
    yield from _stray_dtypes(dtypes)
    yield from _rule_problems(arch, quantization, dtypes.keys(), engine=engine, mtp=mtp)


def _kernel_problems(arch: Architecture, quantization: Quantization) -> Iterator[WeightkitError]:
    where = "quantization_config"
    if not quantization.sym:
        yield UnsupportedError("the Marlin kernels read only symmetric weights", where=f"{where}.sym", found="false")
    if quantization.group_size not in GROUP_SIZES:
        yield UnsupportedError(
            "no kernel for this group size",
            where=f"{where}.group_size",
            expected=", ".join(map(str, GROUP_SIZES)),
            found=quantization.group_size,
            fix="Quantize with one of these: weightkit quantize --group-size.",
        )
    if arch.hidden_size % HIDDEN_UNIT:
        yield UnsupportedError(
            "the experts' kernel takes the hidden size in tiles",
            where="hidden_size",
            expected=f"a multiple of {HIDDEN_UNIT}",
            found=arch.hidden_size,
        )


def _stray_dtypes(dtypes: dict[str, str]) -> Iterator[WeightkitError]:
    """vLLM takes each layer with a tensor of any other dtype for a quantized one (``maybe_update_config``)."""
    for name, dtype in dtypes.items():
        if dtype not in _PLAIN and not name.endswith(_LEAVES):
            yield TensorError(
                "left beside GPTQ weights, where engines take it for one of them",
                where=name,
                expected=", ".join(sorted(_PLAIN)),
                found=dtype,
                fix="Quantize from the whole source: weightkit quantize leaves nothing in FP8.",
            )


def _rule_problems(
    arch: Architecture, quantization: Quantization, names: Set[str], *, engine: str, mtp: bool
) -> Iterator[WeightkitError]:
    for fused, modules in fused_layers(arch, engine=engine, mtp=mtp):
        stored = {f"{module}.qweight" in names: module for module in reversed(modules)}
        yield from _fused_problems(fused, stored, quantization, engine)


def _fused_problems(
    fused: str, stored: dict[bool, str], quantization: Quantization, engine: str
) -> Iterator[WeightkitError]:
    """Args: stored: whether quantized, to one of the fused layer's parts that is so."""
    if len(stored) > 1:
        yield TensorError(
            "one layer to the engine, and its parts are not all alike",
            where=fused,
            expected="all quantized, or none",
            found=f"{stored[True]} quantized, {stored[False]} not",
        )
        return
    (quantized,) = stored
    if quantized and engine == "sglang" and ".self_attn." in fused:
        yield UnsupportedError(
            "SGLang reads no GPTQ in the attention of this family",
            where=fused,
            fix="Quantize with --scope experts, or use vLLM.",
        )
    if engine == "sglang" and fused.endswith(".experts"):
        if not quantized:  # GPTQMarlinConfig.get_quant_method asks dynamic about linear layers alone
            yield UnsupportedError(
                "SGLang takes the routed experts of every layer for quantized, whatever dynamic says",
                where=fused,
                expected="quantized",
                found="not quantized",
                fix="Leave --mtp out, or use vLLM.",
            )
        return
    by_rules = _by_rules(quantization, fused)
    # vLLM looks at what is stored too, but not for routed experts
    if by_rules != quantized and (quantized or engine != "vllm" or fused.endswith(".experts")):
        yield TensorError(
            f"{_RULES} tells the engine otherwise than what is stored",
            where=fused,
            expected="quantized" if by_rules else "not quantized",
            found="quantized" if quantized else "not quantized",
            fix=f"Correct the patterns in {_RULES}: engines match them with this name, from its beginning.",
        )


def _by_rules(quantization: Quantization, name: str) -> bool:
    """What ``dynamic`` alone says: the first rule that matches counts."""
    return next((not rule.startswith("-:") for rule in quantization.rules if rule_matches(rule, name)), True)
