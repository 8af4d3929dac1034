"""Tensors held against the blueprint: missing, unexpected, of a wrong dtype or shape, quantized weights and their
parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import NamedTuple

from weightkit.checkpoint import Entry
from weightkit.checkpoint.tensors import FP8_BLOCK
from weightkit.errors import CheckpointError, MissingTensorError, ScaleError, TensorError, WeightkitError
from weightkit.examine.survey import Survey
from weightkit.family import (
    Architecture,
    Expected,
    expert_ranges,
    in_demo,
    layer_of,
    mp_problems,
    to_demo,
    to_published,
)
from weightkit.layouts.opening import FETCH
from weightkit.layouts.ranks import RankSet

SCALE_SUFFIX = "_scale_inv"
CODES_SUFFIX = ".qweight"
#: What a GPTQ weight has beside its ``qweight``.
PARTNERS = ("qzeros", "scales", "g_idx")
WRONG_FILES = "Fetch the file again, or take config.json from the repository that the files are from."
WRONG_EXCEPTIONS = (
    "Correct modules_to_not_convert in quantization_config, or take config.json from the repository that the files are "
    "from."
)
WRONG_RULES = "Correct dynamic in quantization_config, or take config.json from the repository that the files are from."
LEFT_IN_FP8 = "FP8 beside GPTQ: engines take every tensor that is not F16, BF16 or F32 for one of GPTQ's"


class Wanted(NamedTuple):
    """A tensor that a file must hold: what the blueprint says of it, and its shape there."""

    expected: Expected
    shape: tuple[int, ...]


class Held(NamedTuple):
    """A tensor that a file holds; ``where`` is how messages call it."""

    entry: Entry
    where: str


def published_names(survey: Survey) -> dict[str, str]:
    """Published name to dtype of every tensor; rank files' other names are left out."""
    if survey.ranks is None:
        return {entry.name: entry.dtype for _, entry in survey.held()}
    renamed: dict[str, str | None] = {}
    dtypes: dict[str, str] = {}
    for _, entry in survey.held():
        if entry.name not in renamed:
            renamed[entry.name] = published_or_none(entry.name)
        name = renamed[entry.name]
        if name is not None:
            dtypes[name] = entry.dtype
    return dtypes


def published_or_none(name: str) -> str | None:
    """The published name of a name in rank files; None where it has none."""
    try:
        return to_published(name)
    except CheckpointError:
        return None


def tensor_problems(survey: Survey, expected: Mapping[str, Expected], arch: Architecture) -> list[WeightkitError]:
    """All files' tensors held against the blueprint."""
    if survey.ranks is not None:
        return _rank_problems(survey, survey.ranks, expected, arch)
    held = {entry.name: Held(entry, f"{file}: {entry.name}") for file, entry in survey.held()}
    if not held:
        return []
    wanted = {name: Wanted(item, item.shape) for name, item in expected.items()}
    excused: Set[str] = survey.index.weight_map.keys() if survey.index is not None else frozenset()
    left = _left_in_fp8(held) if arch.is_gptq else {}
    held = {name: found for name, found in held.items() if name not in left}
    problems = compare(wanted, held, excused=excused | left.keys(), complete=survey.complete, missing_where=str)
    return [*_fp8_problem(left), *problems]


def _rank_problems(
    survey: Survey, ranks: RankSet, expected: Mapping[str, Expected], arch: Architecture
) -> list[WeightkitError]:
    illegal = mp_problems(arch, ranks.size, fp8=arch.is_fp8, gptq=arch.is_gptq) if ranks.kind == "mp" else []
    if ranks.size > arch.n_routed_experts:
        return [CheckpointError("more ranks than routed experts", where=survey.folder, found=f"{ranks.size} ranks")]
    if illegal:
        fix = "Take config.json from the checkpoint that was sharded, or shard it again."
        return [CheckpointError(problem.what, where=problem.where, fix=fix) for problem in illegal]
    whole, experts = _wanted_on_ranks(ranks, expected, arch)
    problems: list[WeightkitError] = []
    for rank, file in enumerate(ranks.names()):
        header = survey.scan.headers.get(file)
        if header is not None:
            held = {_key(entry.name): Held(entry, f"{file}: {entry.name}") for entry in header.entries}
            left = _left_in_fp8(held) if arch.is_gptq else {}
            held = {name: found for name, found in held.items() if name not in left}
            wanted = whole | experts[rank]
            problems += _fp8_problem(left)
            problems += compare(wanted, held, excused=left.keys(), complete=True, missing_where=_in_file(file))
    return problems


def _left_in_fp8(held: Mapping[str, Held]) -> dict[str, Held]:
    """FP8 weights and their scales."""
    weights = {name: found for name, found in held.items() if found.entry.dtype.startswith("F8_")}
    scales = {name: found for name, found in held.items() if name.removesuffix(SCALE_SUFFIX) in weights}
    return weights | scales


def _fp8_problem(left: Mapping[str, Held]) -> list[WeightkitError]:
    if not left:
        return []
    fix = "Cast them to BF16, as the rest that is not quantized: weightkit cast, before the weights are quantized."
    first = next(iter(left.values())).where
    return [
        TensorError(LEFT_IN_FP8, where=first, found=f"{len(left):,} tensors of FP8 weights, this the first", fix=fix)
    ]


def _key(name: str) -> str:
    """The published name, or what equals none: a published name in a rank file is as wrong there as any other."""
    return published_or_none(name) or f"not in rank files: {name}"


def _in_file(file: str) -> Callable[[str], str]:
    return lambda name: f"{file}: {name}"


def _wanted_on_ranks(
    ranks: RankSet, expected: Mapping[str, Expected], arch: Architecture
) -> tuple[dict[str, Wanted], list[dict[str, Wanted]]]:
    """What every rank holds, and the experts of each."""
    owners = {
        expert: rank for rank, owned in enumerate(expert_ranges(arch.n_routed_experts, ranks.size)) for expert in owned
    }
    whole: dict[str, Wanted] = {}
    experts: list[dict[str, Wanted]] = [{} for _ in range(ranks.size)]
    for name, item in expected.items():
        if not in_demo(item):
            continue
        if item.expert is not None:
            experts[owners[item.expert]][name] = Wanted(item, item.shape)
        else:
            whole[name] = Wanted(item, _shape_on_rank(item, ranks))
    return whole, experts


def replicated(ranks: RankSet, expected: Mapping[str, Expected]) -> frozenset[str]:
    """The tensors that are whole on every rank, by their names in rank files."""
    return frozenset(
        to_demo(name)
        for name, item in expected.items()
        if in_demo(item) and item.expert is None and (item.split_dim is None or ranks.kind == "ep")
    )


def _shape_on_rank(item: Expected, ranks: RankSet) -> tuple[int, ...]:
    dim = item.split_dim
    if ranks.kind != "mp" or dim is None:
        return item.shape
    return (*item.shape[:dim], item.shape[dim] // ranks.size, *item.shape[dim + 1 :])


def compare(
    wanted: Mapping[str, Wanted],
    held: Mapping[str, Held],
    *,
    excused: Set[str],
    complete: bool,
    missing_where: Callable[[str], str],
) -> list[WeightkitError]:
    """What differs, each difference once.

    Args:
        wanted: by published name.
        held: by published name, or by the name in the file where that has no published form.
        excused: names whose absence was explained already.
        complete: whether what is not held is missing.
        missing_where: how messages call a tensor that is not there.
    """
    stranger = _another_model(wanted, held)
    if stranger is not None:
        return [stranger]
    problems: list[WeightkitError] = []
    for name, found in held.items():
        problem = _check(name, found, wanted, held)
        if problem is not None:
            problems.append(problem)
    if complete:
        problems += _missing(wanted, held, excused, missing_where)
    return problems


def _another_model(wanted: Mapping[str, Wanted], held: Mapping[str, Held]) -> WeightkitError | None:
    """One problem where most tensors are not the config's model's: a list of them all would not help."""
    unknown = [name for name in held if name not in wanted]
    if 2 * len(unknown) <= len(held):
        return None
    return TensorError(
        f"{len(unknown):,} of {len(held):,} tensors are not those of the model that the config describes",
        expected=f"such as {next(iter(wanted), 'none')}",
        found=f"such as {held[unknown[0]].where}",
        fix="Bring config.json and weights of one model together. Distilled models (Qwen, Llama) are not supported.",
    )


def _check(name: str, found: Held, wanted: Mapping[str, Wanted], held: Mapping[str, Held]) -> WeightkitError | None:
    entry, where = found
    if name not in wanted:
        return _unexpected(name, found, wanted, held)
    item, shape = wanted[name]
    weight = held.get(item.weight_name) if item.weight_name is not None else None
    if weight is not None and weight.entry.dtype != _codes_of(item):
        return None  # the weight's dtype is the problem, and it is reported
    error = TensorError if item.weight_name is None else ScaleError
    if not item.allows(entry.dtype):
        expected = " or ".join((item.dtype, *item.other_dtypes))
        fix = WRONG_EXCEPTIONS if "F8_E4M3" in (item.dtype, entry.dtype) else WRONG_FILES
        return error("wrong dtype", where=where, expected=expected, found=entry.dtype, fix=fix)
    if entry.shape != shape and not item.optional:
        what = "wrong shape" if item.weight_name is None else _misfit(item)
        return error(what, where=where, expected=list(shape), found=list(entry.shape), fix=WRONG_FILES)
    return None


def _codes_of(item: Expected) -> str:
    """The dtype of the weight that a scale, or another part, belongs to."""
    return "F8_E4M3" if item.name.endswith(SCALE_SUFFIX) else "I32"


def _misfit(item: Expected) -> str:
    if item.name.endswith(SCALE_SUFFIX):
        return "the scale does not fit its weight"
    return f"the shape of {item.name.rpartition('.')[2]} does not fit its qweight"


def _unexpected(
    name: str, found: Held, wanted: Mapping[str, Wanted], held: Mapping[str, Held]
) -> WeightkitError | None:
    """What is wrong with a tensor that the config does not call for; None where another problem says it."""
    entry, where = found
    module, _, leaf = name.rpartition(".")
    weight = held.get(name.removesuffix(SCALE_SUFFIX)) if name.endswith(SCALE_SUFFIX) else None
    if weight is not None and weight.entry.dtype != "F8_E4M3":
        return ScaleError(
            "a scale without an FP8 weight",
            where=where,
            found=f"a weight in {weight.entry.dtype}",
            fix="Fetch weight and scale from one repository.",
        )
    if weight is not None and name.removesuffix(SCALE_SUFFIX) in wanted:
        return None  # the weight is FP8 and should not be, and that is reported
    if leaf == "weight" and module + CODES_SUFFIX in wanted:
        what = "not quantized, and no rule of quantization_config excepts it"
        return TensorError(what, where=where, expected=module + CODES_SUFFIX, found=entry.dtype, fix=WRONG_RULES)
    if f"{module}.weight" in wanted and module + CODES_SUFFIX in held:
        if leaf in PARTNERS:
            return None  # it is with its weight where it should be
        if name.endswith(CODES_SUFFIX):
            what = "quantized, although quantization_config excepts it"
            return TensorError(what, where=where, expected=f"{module}.weight", found=entry.dtype, fix=WRONG_RULES)
    return TensorError("the config calls for no such tensor", where=where, fix=WRONG_FILES)


def _missing(
    wanted: Mapping[str, Wanted], held: Mapping[str, Held], excused: Set[str], where: Callable[[str], str]
) -> list[WeightkitError]:
    present = {layer_of(name) for name in held} | {layer_of(name) for name in excused}
    problems: list[WeightkitError] = []
    empty: dict[int, int] = {}
    for name, (item, shape) in wanted.items():
        if name in held or name in excused or item.optional or _other_form(name) in held:
            continue
        if item.layer is not None and item.layer not in present:
            empty[item.layer] = empty.get(item.layer, 0) + 1
        elif item.weight_name is None or item.weight_name not in held:
            fix = "Fetch the files that hold it." + (" Or take the whole layer out: weightkit strip." * item.mtp)
            facts = f"{item.dtype} {list(shape)}"
            problems.append(MissingTensorError("no file holds this tensor", where=where(name), expected=facts, fix=fix))
        elif held[item.weight_name].entry.dtype == _codes_of(item):
            problems.append(_without_scale(where(item.weight_name), where(name)))
    layers = [
        MissingTensorError(
            "no file holds any tensor of this layer",
            where=where(f"model.layers.{layer}"),
            expected=f"{count:,} tensors",
            found="none",
            fix="Fetch the files that hold it, or take config.json from the repository that the files are from.",
        )
        for layer, count in empty.items()
    ]
    return [*layers, *problems]


def _other_form(name: str) -> str:
    """The tensor that stands for a weight where it is quantized by GPTQ and should not be, or the other way round."""
    module, _, leaf = name.rpartition(".")
    if leaf == "weight":
        return module + CODES_SUFFIX
    return f"{module}.weight" if name.endswith(CODES_SUFFIX) or leaf in PARTNERS else ""


def _without_scale(weight: str, scale: str) -> ScaleError:
    """What to raise for a quantized weight that lacks its scale, or another part that gives it its meaning."""
    part = scale.rpartition(".")[2] if weight.endswith(CODES_SUFFIX) else "scale"
    return ScaleError(
        f"{'an FP8' if part == 'scale' else 'a GPTQ'} weight without its {part}",
        where=weight,
        expected=scale,
        found="no such tensor",
        fix=f"Fetch the file that holds the {part}: without it the weight has no meaning.",
    )


def partner_problems(survey: Survey) -> list[WeightkitError]:
    """Quantized weights and what belongs to them, held against each other by name alone, for a checkpoint without a
    usable config."""
    if survey.ranks is not None or survey.mixed:
        return []
    held = {entry.name: Held(entry, f"{file}: {entry.name}") for file, entry in survey.held()}
    known = held.keys() | (survey.index.weight_map.keys() if survey.index is not None else set[str]())
    problems: list[WeightkitError] = []
    for name, (entry, where) in held.items():
        if entry.dtype == "F8_E4M3" and len(entry.shape) == 2:
            scale = held.get(name + SCALE_SUFFIX)
            if scale is None and name + SCALE_SUFFIX not in known and survey.complete:
                problems.append(_without_scale(where, name + SCALE_SUFFIX))
            elif scale is not None and not _fits(entry, scale.entry):
                blocks = [-(-size // FP8_BLOCK) for size in entry.shape]
                problems.append(
                    ScaleError(
                        "the scale does not fit its weight",
                        where=scale.where,
                        expected=f"F32 {blocks}",
                        found=f"{scale.entry.dtype} {list(scale.entry.shape)}",
                        fix=FETCH,
                    )
                )
        elif name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) not in known and survey.complete:
            problems.append(ScaleError("a scale without an FP8 weight", where=where, fix=FETCH))
        elif survey.complete:
            problems += _gptq_partner_problems(name, where, known)
    return problems


def _gptq_partner_problems(name: str, where: str, known: Set[str]) -> list[WeightkitError]:
    module, _, leaf = name.rpartition(".")
    if name.endswith(CODES_SUFFIX):
        parts = (f"{module}.{part}" for part in PARTNERS)
        return [_without_scale(where, part) for part in parts if part not in known]
    if leaf in PARTNERS and module + CODES_SUFFIX not in known:
        return [ScaleError(f"the {leaf} of no GPTQ weight", where=where, expected=module + CODES_SUFFIX, fix=FETCH)]
    return []


def _fits(weight: Entry, scale: Entry) -> bool:
    return scale.dtype == "F32" and scale.shape == tuple(-(-size // FP8_BLOCK) for size in weight.shape)
