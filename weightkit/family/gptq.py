"""The ``quantization_config`` that an int4 checkpoint of the family gets: what is quantized, told by rules.

Every engine reads ``dynamic`` (GPTQModel, vLLM, SGLang): a pattern with ``-:`` keeps the modules whose name it matches
from the beginning unquantized. The patterns begin with ``.*``, since engines put names of their own before ``layers``,
and match the names under which engines fuse layers too (``gate_up_proj``, ``fused_qkv_a_proj``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from weightkit.errors import PlanError
from weightkit.family.architecture import Architecture
from weightkit.family.blueprint import quantizable_modules
from weightkit.family.quantization import GPTQ_BITS, Quantization, read_gptq, rule_matches

Scope = Literal["experts", "all"]
SCOPES: tuple[Scope, ...] = ("experts", "all")
"""``experts``: routed and shared experts. ``all``: attention and dense MLPs too."""
QUANTIZE_CONFIG_NAME = "quantize_config.json"
"""The side file that holds the same dictionary."""


def gptq_config(
    arch: Architecture, *, bits: int, group_size: int, scope: Scope, mtp: bool, meta: Mapping[str, object]
) -> dict[str, object]:
    """The dictionary for ``quantize_config.json`` and ``config.json["quantization_config"]`` of a symmetric GPTQ v1
    checkpoint without activation order.

    Embedding, head, norms, routers and ``eh_proj`` are never quantized and need no rule; the indexer and MTP layers are
    kept by rules in either scope.

    Args:
        arch: the architecture; its own quantization does not matter.
        bits: 4 or 8.
        group_size: input features that share a scale, or -1 for all of them. Engines have kernels for -1, 32, 64, 128.
        scope: ``experts`` or ``all``. SGLang reads only ``experts``.
        mtp: whether the output keeps the MTP layers (unquantized).
        meta: what to write of the tool and its settings.

    Raises:
        PlanError: bits or scope that there are not, or a group size that does not divide the input features of what is
            to be quantized.
    """
    if bits not in GPTQ_BITS:
        raise PlanError("no such width", where="--bits", expected="4 or 8", found=bits)
    if scope not in SCOPES:
        raise PlanError("no such scope", where="--scope", expected=" or ".join(SCOPES), found=repr(scope))
    if group_size != -1 and group_size < 1:
        raise PlanError(
            "no such group size", where="--group-size", expected="-1 or a positive number", found=group_size
        )
    config: dict[str, object] = {
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "dynamic": {f"-:{pattern}": {} for pattern in _kept(arch, scope, mtp=mtp)},
        "meta": dict(meta),
    }
    quantization = read_gptq(config, [], where=QUANTIZE_CONFIG_NAME)
    if quantization is not None:
        _require_divisible(replace(arch, quantization=quantization), quantization)
    return config


def _kept(arch: Architecture, scope: Scope, *, mtp: bool) -> Iterator[str]:
    """Patterns for what stays unquantized."""
    if scope == "experts":
        yield r".*self_attn.*"
        dense = [layer for layer in range(arch.num_hidden_layers) if not arch.is_moe_layer(layer)]
        yield from (rf".*layers\.({numbers})\.mlp\..*" for numbers in _numbers(dense))
    elif arch.indexer_layers:
        yield r".*indexer.*"
    if mtp:
        layers = range(arch.num_hidden_layers, arch.total_layers)
        yield from (rf".*layers\.({numbers})\..*" for numbers in _numbers(layers))


def _numbers(layers: Iterable[int]) -> Iterator[str]:
    """``0|1|2``, in pieces that a pattern has room for."""
    listed = [str(layer) for layer in layers]
    for start in range(0, len(listed), 64):
        yield "|".join(listed[start : start + 64])


def _require_divisible(arch: Architecture, quantization: Quantization) -> None:
    """Raise ``PlanError`` for the first weight of a kind that groups or words do not divide."""
    words, group = quantization.codes_per_word, quantization.group_size
    one = replace(arch, n_routed_experts=1)
    for layer in range(arch.num_hidden_layers):
        for name, (rows, columns) in quantizable_modules(one, layer).items():
            if not quantization.quantizes(name):
                continue
            if group != -1 and columns % group:
                raise PlanError(
                    f"groups of {group} do not divide the {columns} input features of {name}",
                    where="--group-size",
                    expected=f"-1 or a divisor of {columns}",
                    found=group,
                )
            if rows % words or columns % words:
                raise PlanError(
                    f"the rows or columns of {name} fill no whole words of {words} codes",
                    where="--bits",
                    found=f"{rows} rows and {columns} columns",
                )


def without_mtp_rules(raw: Mapping[str, object], arch: Architecture) -> dict[str, object]:
    """A GPTQ dictionary without the ``-:`` rules that are about MTP layers alone, which are gone."""
    dynamic = raw.get("dynamic")
    if not isinstance(dynamic, Mapping):
        return dict(raw)
    main = [name for layer in range(arch.num_hidden_layers) for name in quantizable_modules(arch, layer)]
    mtp = [
        name for layer in range(arch.num_hidden_layers, arch.total_layers) for name in quantizable_modules(arch, layer)
    ]

    def stale(rule: str) -> bool:
        return (
            rule.startswith("-:")
            and any(rule_matches(rule, name) for name in mtp)
            and not any(rule_matches(rule, name) for name in main)
        )

    return {**raw, "dynamic": {rule: value for rule, value in dynamic.items() if not stale(rule)}}
