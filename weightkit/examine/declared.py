"""What the config declares, held against what the files hold.

A stale statement (FP8 declared, BF16 stored; an MTP layer declared, none stored) is one problem, not one for each of
the tensors that it concerns: the rest is then checked against what the files hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

from weightkit.checkpoint.dtypes import TORCH_NAMES
from weightkit.checkpoint.folder import CONFIG_NAME
from weightkit.checkpoint.json_file import read_json_object
from weightkit.errors import ConfigError, MissingFileError, WeightkitError
from weightkit.examine.survey import attempt
from weightkit.family import FP8, Architecture, Expected, Role, blueprint, layer_of

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
    quantization = _quantization_problem(arch, expected, dtypes, declared.where)
    if quantization is not None:
        problems.append(quantization)
        arch = replace(arch, quantization=None if arch.is_fp8 else FP8)
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


def _quantization_problem(
    arch: Architecture, expected: Mapping[str, Expected], dtypes: Mapping[str, str], where: Path
) -> ConfigError | None:
    """Where the config declares FP8 and no weight is, or the other way round."""
    stored_fp8 = sum(dtype == "F8_E4M3" for dtype in dtypes.values())
    if arch.is_fp8:
        others = Counter(dtypes[name] for name, item in expected.items() if item.scale_name and name in dtypes)
        if stored_fp8 or not others or others.keys() - {"BF16", "F16", "F32"}:
            return None
        found = ", ".join(f"{count:,} in {dtype}" for dtype, count in others.items())
        return ConfigError(
            "quantization_config declares FP8 weights, and none is",
            where=where,
            found=found,
            fix="Remove quantization_config from config.json, or fetch the FP8 files.",
        )
    # linear weights are most of what is left without scales: a few strays are problems of their own
    if 2 * stored_fp8 <= sum(name.endswith("_proj.weight") for name in dtypes):
        return None
    return ConfigError(
        "no quantization_config, and weights are FP8",
        where=where,
        found=f"{stored_fp8:,} in F8_E4M3",
        fix='Take config.json from the published repository; it has "quant_method": "fp8" in quantization_config.',
    )


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
