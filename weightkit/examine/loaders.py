"""What loaders ask of the small JSON files that no tensor tells: without it, a whole checkpoint does not load."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from weightkit.checkpoint.json_file import read_json_object, strings
from weightkit.errors import ConfigError, WeightkitError
from weightkit.examine.rope import rope_problems
from weightkit.examine.sides import GENERATION_NAME
from weightkit.examine.survey import attempt
from weightkit.family import Architecture, demo_arguments, quantizable_modules
from weightkit.layouts.ranks import DEMO_CONFIG_NAME

#: By ``model_type``, what ``architectures`` names in the published configs: engines choose their model's code by it.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "deepseek_v2": ("DeepseekV2ForCausalLM",),
    "deepseek_v3": ("DeepseekV3ForCausalLM",),
    "kimi_k2": ("DeepseekV3ForCausalLM", "KimiK2ForCausalLM"),
    "deepseek_v32": ("DeepseekV32ForCausalLM",),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM",),
}
#: Of the demo's arguments, what whoever runs it may choose.
FREE_ARGUMENTS = frozenset(("max_seq_len", "original_seq_len"))
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MODULE = re.compile(r"[\w-]+(\.[\w-]+)*")
_FIX = "Take config.json from the published repository."


def config_problems(config: Mapping[str, object], arch: Architecture, where: Path) -> Iterator[WeightkitError]:
    """A folder's own config: the class that engines load it with, and fields that contradict each other."""
    yield from _class_problems(config, arch, where)
    heads = config.get("num_key_value_heads")
    if heads not in (None, arch.num_attention_heads):
        yield ConfigError(
            "num_key_value_heads is not num_attention_heads, and latent attention has a key for every head",
            where=where,
            expected=arch.num_attention_heads,
            found=heads,
            fix=_FIX,
        )
    names = [config.get(field) for field in ("torch_dtype", "dtype")]
    if None not in names and names[0] != names[1]:
        yield ConfigError(
            "torch_dtype and dtype differ, and loaders read either",
            where=where,
            found=f"{names[0]} and {names[1]}",
            fix="Set both to what the tensors are, or remove one.",
        )
    yield from _fp8_problems(config.get("quantization_config"), arch, where)
    yield from rope_problems(config, where)
    yield from _routing_problems(arch, where)
    yield from _token_problems(config, arch, where)


def _fp8_problems(declared: object, arch: Architecture, where: Path) -> Iterator[WeightkitError]:
    """What the config declares of FP8 and no tensor shows: how inputs are quantized, names that engines read
    differently."""
    if not isinstance(declared, Mapping) or declared.get("quant_method") != "fp8":
        return
    if declared.get("activation_scheme") != "dynamic":
        yield ConfigError(
            "activation_scheme is not dynamic, the only one that engines have for block scales",
            where=f"{where}: quantization_config",
            expected="dynamic",
            found=declared.get("activation_scheme", "none"),
            fix=_FIX,
        )
    kept = arch.quantization.modules_to_not_convert if arch.quantization is not None else ()
    ambiguous = [name for name in kept if not _MODULE.fullmatch(name)] + _ends_of_names(kept, arch)
    if ambiguous:
        yield ConfigError(
            "modules that stay unquantized are named by patterns or by ends of names, which vLLM takes for whole names "
            "and transformers does not",
            where=f"{where}: quantization_config",
            expected="whole names, such as model.layers.0.self_attn.o_proj",
            found=", ".join(repr(name)[:60] for name in ambiguous[:5]),
            fix="Name each module whole.",
        )


def _ends_of_names(kept: Sequence[str], arch: Architecture) -> list[str]:
    """Of the exceptions those that end a linear layer's name and are not all of it. Others than these, such as
    ``lm_head``, concern what is never quantized."""
    parts = [name for name in kept if _MODULE.fullmatch(name) and not name.startswith("model.")]
    if not parts:
        return []
    modules = [module for layer in range(arch.total_layers) for module in quantizable_modules(arch, layer)]
    return [name for name in parts if any(module.endswith(name) for module in modules)]


def _routing_problems(arch: Architecture, where: Path) -> Iterator[WeightkitError]:
    """A token would get experts of groups that were ruled out for it, or a group has no two best."""
    if arch.topk_method == "greedy":
        return
    size = arch.n_routed_experts // arch.n_group
    if arch.topk_group * size < arch.num_experts_per_tok:
        yield ConfigError(
            "the groups that a token may use hold fewer experts than it gets",
            where=where,
            expected=f"num_experts_per_tok of at most {arch.topk_group * size}, topk_group {arch.topk_group} of {size}",
            found=arch.num_experts_per_tok,
            fix=_FIX,
        )
    if arch.has_router_bias and arch.n_group > 1 and size < 2:
        yield ConfigError(
            "groups of one expert, and a group's score is the sum of its two best",
            where=where,
            expected=f"n_group of at most {arch.n_routed_experts // 2}",
            found=arch.n_group,
            fix=_FIX,
        )


def _class_problems(config: Mapping[str, object], arch: Architecture, where: Path) -> Iterator[WeightkitError]:
    """``architectures`` must name the member's class, or one that the folder's own code brings along."""
    named, classes = config.get("architectures"), CLASSES[arch.model_type]
    listed = named if isinstance(named, list) else []
    own = {target.rpartition(".")[2] for target in strings(config.get("auto_map"))}
    if not any(isinstance(name, str) and name in own.union(classes) for name in listed):
        yield ConfigError(
            f"architectures does not name the class of model_type {arch.model_type}, and engines go by it",
            where=where,
            expected=f"[{classes[0]!r}]",
            found=str(named)[:80],
            fix=_FIX,
        )


def generation_problems(folder: Path, arch: Architecture) -> Iterator[WeightkitError]:
    """``generation_config.json``, where it can be read."""
    path = folder / GENERATION_NAME
    value = attempt(lambda: read_json_object(path), path) if path.is_file() else {}
    if not isinstance(value, WeightkitError):
        yield from _token_problems(value, arch, path)


def _token_problems(config: Mapping[str, object], arch: Architecture, where: Path) -> Iterator[WeightkitError]:
    for field in TOKEN_FIELDS:
        for token in listed_tokens(config, field):
            if type(token) is not int or not 0 <= token < arch.vocab_size:
                yield ConfigError(
                    f"{field} is no token of the vocabulary",
                    where=where,
                    expected=f"0 to {arch.vocab_size - 1}",
                    found=str(token)[:80],
                    fix="Take the file from the published repository.",
                )


def listed_tokens(config: Mapping[str, object], field: str) -> list[object]:
    """What stands in a field of special tokens, which may hold one id or several; a ``pad_token_id`` of -1 is none."""
    value = config.get(field)
    if value is None or (field == "pad_token_id" and value == -1):
        return []
    return value if isinstance(value, list) else [value]


def demo_problems(folder: Path, arch: Architecture, *, fp8: bool) -> Iterator[WeightkitError]:
    """The demo's arguments beside rank files: what it says of the model must follow from the config and the tensors."""
    path = folder / DEMO_CONFIG_NAME
    value = attempt(lambda: read_json_object(path), path) if path.is_file() else {}
    if isinstance(value, WeightkitError) or arch.is_gptq:
        return
    wanted = demo_arguments(arch, dtype="fp8" if fp8 else "bf16")
    wrong = [key for key in wanted if key in value and key not in FREE_ARGUMENTS and value[key] != wanted[key]]
    if wrong:
        yield ConfigError(
            "the demo's arguments are not those of this checkpoint",
            where=path,
            expected=", ".join(f"{key} {wanted[key]}" for key in wrong),
            found=", ".join(f"{key} {str(value[key])[:40]}" for key in wrong),
            fix="Write them so, or shard the checkpoint again.",
        )
