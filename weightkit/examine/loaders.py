"""What loaders ask of the small JSON files that no tensor tells: without it, a whole checkpoint does not load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from weightkit.checkpoint.json_file import read_json_object, strings
from weightkit.errors import ConfigError, WeightkitError
from weightkit.examine.survey import attempt
from weightkit.family import Architecture, demo_arguments
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
GENERATION_NAME = "generation_config.json"
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
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, Mapping) else {}
    if quantization.get("quant_method") == "fp8" and quantization.get("activation_scheme") != "dynamic":
        yield ConfigError(
            "activation_scheme is not dynamic, the only one that engines have for block scales",
            where=f"{where}: quantization_config",
            expected="dynamic",
            found=quantization.get("activation_scheme", "none"),
            fix=_FIX,
        )
    yield from _routing_problems(arch, where)
    yield from _token_problems(config, arch, where)


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
    for field in ("bos_token_id", "eos_token_id"):
        value = config.get(field)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int or not 0 <= token < arch.vocab_size:
                yield ConfigError(
                    f"{field} is no token of the vocabulary",
                    where=where,
                    expected=f"0 to {arch.vocab_size - 1}",
                    found=str(token)[:80],
                    fix="Take the file from the published repository.",
                )


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
