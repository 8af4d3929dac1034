"""Whether an engine takes the same layers for FP8 as are stored so, where the config makes exceptions.

Engines read the parts of a fused layer alike. vLLM goes by whole names of modules, and leaves out all routed experts of
a layer as soon as one is named. Source: ``is_layer_skipped`` in ``vllm/model_executor/layers/quantization/utils/
quant_utils.py`` and ``sglang/srt/layers/quantization/utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightkit.errors import ConfigError, WeightkitError
from weightkit.family import Architecture
from weightkit.serving.fused import fused_layers

_EXPERTS = ".mlp.experts"


def fp8_problems(arch: Architecture, *, engine: str, mtp: bool) -> Iterator[WeightkitError]:
    """What the engine would refuse, or read wrongly.

    Args:
        arch: an FP8 architecture.
        engine: ``vllm`` or ``sglang``.
        mtp: whether the engine loads the MTP layers too.
    """
    quantization = arch.quantization
    if quantization is None or not quantization.modules_to_not_convert:
        return
    for fused, modules in fused_layers(arch, engine=engine, mtp=mtp):
        stored = {quantization.quantizes(module): module for module in reversed(modules)}
        if len(stored) > 1:
            yield ConfigError(
                "one layer to the engine, and its parts are not all alike",
                where=fused,
                expected="all in FP8, or none",
                found=f"{stored[True]} in FP8, {stored[False]} not",
                fix="Cast it to BF16, and that to FP8, which makes no exceptions: weightkit cast.",
            )
        elif (
            engine == "vllm" and False in stored and not _is_named(fused, modules, quantization.modules_to_not_convert)
        ):
            yield ConfigError(
                "vLLM takes the layer for FP8: it goes by whole names",
                where=fused,
                expected=f"{modules[0]} in modules_to_not_convert",
                found="a name that it is part of",
                fix="Name each module whole in quantization_config.",
            )


def _is_named(fused: str, modules: Sequence[str], kept: Sequence[str]) -> bool:
    if fused.endswith(_EXPERTS):
        return any(fused in name for name in kept)
    return all(module in kept for module in modules)
