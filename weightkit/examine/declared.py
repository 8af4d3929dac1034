"""What the config declares, held against what the files hold.

A stale statement (FP8 declared, BF16 stored; an MTP layer declared, none stored) is one problem, not one for each of
the tensors that it concerns: the rest is then checked against what the files hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from weightkit.checkpoint.dtypes import TORCH_NAMES
from weightkit.checkpoint.folder import CONFIG_NAME
from weightkit.checkpoint.json_file import read_json_object
from weightkit.errors import ConfigError, MissingFileError, WeightkitError
from weightkit.examine.survey import attempt
from weightkit.family import (
    FP8,
    QUANTIZE_CONFIG_NAME,
    Architecture,
    Expected,
    Quantization,
    Role,
    blueprint,
    layer_of,
    read_gptq,
)
from weightkit.layouts.opening import advise

#: Above these no blueprint is drawn: a config must not make a list of 10^12 tensors. The largest published member has
#: 61 layers of 384 experts.
LIMITS = {
    "num_hidden_layers": 10_000,
    "num_nextn_predict_layers": 10_000,
    "n_routed_experts": 100_000,
    "num_attention_heads": 100_000,
}
MAX_EXPERTS = 200_000
#: What only an MTP layer has, below ``model.layers.N.``.
MTP_MARKS = frozenset(("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head"))
#: What every full layer has.
LAYER_MARKS = frozenset(("input_layernorm", "self_attn", "mlp"))


@dataclass(frozen=True)
class Declared:
    """A config that was read.

    Attributes:
        arch: None where the config is damaged, or of a model that weightkit does not know.
        own: whether it lies in the checkpoint's folder.
    """

    config: Mapping[str, object] | None
    arch: Architecture | None
    where: Path
    own: bool
    problems: tuple[WeightkitError, ...]


def read_declared(folder: Path, config: str | Path | Mapping[str, object] | None) -> Declared:
    """Read and identify the config of a folder, or the one that is given instead."""
    where = folder / CONFIG_NAME if config is None or isinstance(config, Mapping) else Path(config)
    own = config is None
    content = config if isinstance(config, Mapping) else attempt(lambda: read_json_object(where), where)
    if isinstance(content, MissingFileError):
        content = ConfigError(
            "no config.json", where=where, fix="Copy the model's config.json there, or name one with --config."
        )
    if isinstance(content, WeightkitError):
        advise(content)
        return Declared(None, None, where, own, (content,))
    arch = identify(content, where)
    if isinstance(arch, WeightkitError):
        return Declared(content, None, where, own, (arch,))
    return Declared(content, arch, where, own, ())


def identify(config: Mapping[str, object], where: Path) -> Architecture | WeightkitError:
    """The architecture, or why there is none: another model, a broken field, sizes that no model has."""
    absurd = [
        f"{field}: expected at most {limit:,}, found {_number(config.get(field)):,}"
        for field, limit in LIMITS.items()
        if _number(config.get(field)) > limit
    ]
    experts = _number(config.get("num_hidden_layers")) * _number(config.get("n_routed_experts"))
    if not absurd and experts > MAX_EXPERTS:
        absurd = [f"num_hidden_layers x n_routed_experts: expected at most {MAX_EXPERTS:,}, found {experts:,}"]
    if absurd:
        listing = "".join(f"\n  {field}" for field in absurd)
        return ConfigError(f"sizes that no model has:{listing}", where=where, fix="Take config.json from the hub.")
    return attempt(lambda: Architecture.from_config(config, where=str(where)), where)


def _number(value: object) -> int:
    return value if type(value) is int else 0


def reconcile(
    declared: Declared, dtypes: Mapping[str, str], names: Set[str] | None, *, has_mtp: bool
) -> tuple[dict[str, Expected] | None, Architecture | None, list[WeightkitError]]:
    """The blueprint to hold the tensors against, its architecture, and the config's statements that are not true.

    Args:
        dtypes: published name to dtype of what the files hold.
        names: these names, and those that are in files that could not be read; None where not all are known.
        has_mtp: whether the layout has MTP layers at all.
    """
    problems: list[WeightkitError] = []
    arch = declared.arch
    if arch is None:
        return None, None, problems
    if names is not None:
        arch, problems = _true_layers(arch, names, declared, has_mtp=has_mtp)
    start = arch
    expected = attempt(lambda: blueprint(start), declared.where)
    if isinstance(expected, WeightkitError):
        return None, arch, [*problems, expected]
    untrue = _untrue_quantization(arch, expected, dtypes, declared.where)
    if untrue is not None:
        problems.append(untrue.problem)
        if untrue.stored == "gptq" and untrue.true is None:
            return None, arch, problems
        arch = replace(arch, quantization=untrue.true)
        expected = blueprint(arch)
    stored = _stored_dtype(arch, expected, dtypes)
    if stored is not None:
        problems.append(_dtype_problem(arch, stored, declared))
        arch = replace(arch, dtype=stored)
        expected = blueprint(arch)
    return expected, arch, problems


def _true_layers(
    arch: Architecture, names: Set[str], declared: Declared, *, has_mtp: bool
) -> tuple[Architecture, list[WeightkitError]]:
    """The architecture with the layers that there are, where the files hold whole layers that the config denies, or
    none of the MTP layers that it declares."""
    where = declared.where
    marks = _marks_of_layers(names, arch.num_hidden_layers)
    layers, mtp = arch.num_hidden_layers, arch.num_nextn_predict_layers
    problems: list[WeightkitError] = []
    consecutive = sorted(marks) == list(range(layers, layers + len(marks)))
    main = [layer for layer, found in marks.items() if not found & MTP_MARKS and found >= LAYER_MARKS]
    if consecutive and main and max(main) == layers + len(main) - 1:
        problems.append(
            ConfigError(
                "num_hidden_layers is not the number of layers",
                where=where,
                expected=layers + len(main),
                found=layers,
                fix="Correct the field, or take config.json from the published repository.",
            )
        )
        layers += len(main)
    held_mtp = len(marks) - len(main)
    if not has_mtp:
        if mtp and declared.own:  # the published config, given for ranks, is right to declare them
            problems.append(_mtp_problem(where, 0, mtp))
        held_mtp = 0
    elif consecutive and (held_mtp > mtp or (held_mtp == 0 and mtp)):
        problems.append(_mtp_problem(where, held_mtp, mtp))
    else:
        held_mtp = mtp
    if not problems:
        return arch, []
    true = replace(arch, num_hidden_layers=layers, num_nextn_predict_layers=held_mtp)
    if arch.indexer_layers:
        true = replace(true, indexer_layers=arch.indexer_layers | set(range(arch.total_layers, true.total_layers)))
    return true, problems


def _mtp_problem(where: Path, stored: int, declared: int) -> ConfigError:
    fix = f"Set it to {stored}" + (", or take the layers out: weightkit strip." if stored else ".")
    return ConfigError(
        "num_nextn_predict_layers is not the number of MTP layers",
        where=where,
        expected=stored,
        found=declared,
        fix=fix,
    )


def _marks_of_layers(names: Set[str], first: int) -> dict[int, set[str]]:
    """Layer to the names right below it, for layers from ``first`` on."""
    marks: dict[int, set[str]] = {}
    for name in names:
        layer = layer_of(name)
        if layer is not None and layer >= first:
            marks.setdefault(layer, set()).add(name.split(".")[3] if name.count(".") > 2 else "")
    return marks


class _Untrue(NamedTuple):
    """A false statement about quantization; the form that most weights have, and its details as far as they are
    known."""

    problem: ConfigError
    stored: str
    true: Quantization | None


def _untrue_quantization(
    arch: Architecture, expected: Mapping[str, Expected], dtypes: Mapping[str, str], where: Path
) -> _Untrue | None:
    """Where the config declares FP8 or GPTQ and no weight is, or the other way round."""
    fp8 = sum(dtype == "F8_E4M3" for dtype in dtypes.values())
    gptq = sum(dtype == "I32" and name.endswith(".qweight") for name, dtype in dtypes.items())
    # linear weights are most of what is left without scales: a few strays are problems of their own
    linear = sum(name.endswith("_proj.weight") for name in dtypes)
    if not arch.is_gptq and 4 * gptq > linear + gptq:
        return _undeclared_gptq(arch, gptq, where)
    if arch.is_fp8 or arch.is_gptq:
        return None if (fp8 if arch.is_fp8 else gptq) else _declared_in_vain(arch, expected, dtypes, where)
    if 2 * fp8 <= linear:
        return None
    problem = ConfigError(
        "no quantization_config, and weights are FP8",
        where=where,
        found=f"{fp8:,} in F8_E4M3",
        fix='Take config.json from the published repository; it has "quant_method": "fp8" in quantization_config.',
    )
    return _Untrue(problem, "fp8", FP8)


def _declared_in_vain(
    arch: Architecture, expected: Mapping[str, Expected], dtypes: Mapping[str, str], where: Path
) -> _Untrue | None:
    """The config declares FP8 or GPTQ, and no weight is."""
    suffix = ".qweight" if arch.is_gptq else ".weight"
    weights = (name.removesuffix(suffix) + ".weight" for name, item in expected.items() if item.scale_name)
    others = Counter(dtypes[name] for name in weights if name in dtypes)
    known = {"BF16", "F16", "F32"} | ({"F8_E4M3"} if arch.is_gptq else set())
    if not others or others.keys() - known:
        return None
    declared = "GPTQ" if arch.is_gptq else "FP8"
    problem = ConfigError(
        f"quantization_config declares {declared} weights, and none is",
        where=where,
        found=", ".join(f"{count:,} in {dtype}" for dtype, count in others.items()),
        fix=f"Remove quantization_config from config.json, or fetch the {declared} files.",
    )
    return _Untrue(problem, "fp8", FP8) if "F8_E4M3" in others else _Untrue(problem, "none", None)


def _undeclared_gptq(arch: Architecture, count: int, where: Path) -> _Untrue:
    """Weights are GPTQ, and the config does not say so; ``quantize_config.json`` may."""
    side = where.parent / QUANTIZE_CONFIG_NAME
    found = attempt(lambda: read_gptq(read_json_object(side), [], where=str(side)), side)
    problem = ConfigError(
        "no GPTQ in quantization_config, and weights are GPTQ",
        where=where,
        found=f"{count:,} in I32" + (", and quantization_config of FP8" if arch.is_fp8 else ""),
        fix=f'Put the dictionary of {QUANTIZE_CONFIG_NAME}, with "quant_method": "gptq", into config.json.',
    )
    return _Untrue(problem, "gptq", found if isinstance(found, Quantization) else None)


def _stored_dtype(arch: Architecture, expected: Mapping[str, Expected], dtypes: Mapping[str, str]) -> str | None:
    """The one float dtype that all weights have where the config declares another."""
    stored = {
        dtypes[name]
        for name, item in expected.items()
        if name in dtypes
        and item.dtype == arch.dtype
        and item.weight_name is None
        and item.role is not Role.ROUTER_BIAS
    }
    return stored.pop() if len(stored) == 1 and stored <= TORCH_NAMES.keys() - {arch.dtype} else None


def _dtype_problem(arch: Architecture, stored: str, declared: Declared) -> ConfigError:
    field = "dtype" if declared.config is not None and declared.config.get("torch_dtype") is None else "torch_dtype"
    return ConfigError(
        f"{field} is not the dtype of the tensors",
        where=declared.where,
        expected=TORCH_NAMES[stored],
        found=TORCH_NAMES[arch.dtype],
        fix=f"Set {field} to what the tensors are, or fetch the files that belong to this config.",
    )
