"""The rotary embedding that a config asks for, where loaders compute different ones or none: no tensor tells.

Read are ``modeling_deepseek.py`` of the published repositories, ``modeling_rope_utils.py`` of transformers, and vLLM's
``transformers_utils/config.py`` and ``model_executor/layers/rotary_embedding``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from weightkit.errors import ConfigError, UnsupportedError, WeightkitError
from weightkit.family import rope_type

SPELLINGS = ("rope_scaling", "rope_parameters")
"""The field, and what transformers 5 calls it."""
#: What these dictionaries may hold without scaling anything.
_UNSCALED = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor"))
_FIX = "Take the field from config.json of the published repository."


def rope_problems(config: Mapping[str, object], where: Path) -> Iterator[WeightkitError]:
    """Kinds of scaling that the family does not have, and fields without which, or by which, loaders differ."""
    given = _given(config)
    for name, scaling in given.items():
        yield from _kind_problems(scaling, f"{where}: {name}")
        if rope_type(scaling) == "yarn":
            yield from _yarn_problems(scaling, f"{where}: {name}")
    yield from _spelling_problems(config, given, where)


def rope_notes(config: Mapping[str, object]) -> Iterator[str]:
    """What is unusual, and read alike by all loaders."""
    for name, scaling in _given(config).items():
        if rope_type(scaling) == "yarn" and not _scales(scaling):
            yield f"{name}: YaRN without mscale and mscale_all_dim, with which published members scale attention"


def _given(config: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    """The dictionaries that are there, by their names."""
    return {name: value for name in SPELLINGS if isinstance(value := config.get(name), Mapping) and value}


def _scales(scaling: Mapping[str, object]) -> list[str]:
    return [key for key in ("mscale", "mscale_all_dim") if scaling.get(key) is not None]


def _kind_problems(scaling: Mapping[str, object], where: str) -> Iterator[WeightkitError]:
    kind, older, newer = rope_type(scaling), scaling.get("type"), scaling.get("rope_type")
    if None not in (older, newer) and older != newer:
        yield ConfigError(
            "type and rope_type differ, and loaders read either",
            where=where,
            found=f"{older} and {newer}",
            fix="Set both to what the model was trained with, or remove type.",
        )
    if kind is None and scaling.keys() - _UNSCALED:
        yield ConfigError(
            "no type, so that some loaders scale nothing and others refuse it",
            where=where,
            expected="type yarn, or no such field",
            found=", ".join(sorted(scaling))[:80],
            fix=_FIX,
        )
    if kind not in (None, "default", "yarn"):
        yield UnsupportedError(
            "a kind of scaling that no member of the family has; engines compute YaRN all the same, or fail",
            where=where,
            expected="yarn or default",
            found=str(kind)[:80],
            fix=_FIX,
        )


def _yarn_problems(scaling: Mapping[str, object], where: str) -> Iterator[WeightkitError]:
    if scaling.get("original_max_position_embeddings") is None:
        yield ConfigError(
            "YaRN without original_max_position_embeddings, for which loaders put 4096, max_position_embeddings or "
            "nothing",
            where=where,
            expected="the context before it was extended",
            found="none",
            fix=_FIX,
        )
    scales = _scales(scaling)
    if len(scales) == 1:
        yield ConfigError(
            "one of mscale and mscale_all_dim, and loaders differ on what follows without the other",
            where=where,
            expected="both, or neither",
            found=f"{scales[0]} {scaling[scales[0]]}",
            fix=_FIX,
        )
    factor, fast, slow = (_number(scaling, *field) for field in (("factor", 1), ("beta_fast", 32), ("beta_slow", 1)))
    if factor < 1:
        yield ConfigError(
            "a factor that shortens the context", where=where, expected="1 or more", found=factor, fix=_FIX
        )
    if fast < slow:
        yield ConfigError(
            "beta_fast is less than beta_slow, so that the frequencies to keep are the ones that are divided",
            where=where,
            expected="beta_fast 32, beta_slow 1",
            found=f"beta_fast {fast}, beta_slow {slow}",
            fix=_FIX,
        )


def _number(scaling: Mapping[str, object], key: str, default: float) -> float:
    """A number that the architecture's reader has passed; what it refused is reported there."""
    value = scaling.get(key)
    return value if isinstance(value, (int, float)) and value else default


def _spelling_problems(
    config: Mapping[str, object], given: Mapping[str, Mapping[str, object]], where: Path
) -> Iterator[WeightkitError]:
    """``rope_scaling`` against ``rope_parameters``, and ``rope_theta`` outside against the one inside."""
    meanings = [_meaning(scaling) for scaling in given.values()]
    if len(meanings) == 2 and meanings[0] != meanings[1]:
        differing = sorted(
            key for key in meanings[0].keys() | meanings[1] if meanings[0].get(key) != meanings[1].get(key)
        )
        yield ConfigError(
            "rope_scaling and rope_parameters differ, and loaders read either",
            where=where,
            found=", ".join(f"{key} {meanings[0].get(key)} and {meanings[1].get(key)}" for key in differing)[:200],
            fix="Set both to what the model was trained with, or remove one.",
        )
    thetas = [source["rope_theta"] for source in (config, *given.values()) if source.get("rope_theta") is not None]
    if any(theta != thetas[0] for theta in thetas):
        yield ConfigError(
            "rope_theta stands in several places with different values",
            where=where,
            found=", ".join(str(theta)[:20] for theta in thetas),
            fix="Set all to what the model was trained with, or remove all but one.",
        )


def _meaning(scaling: Mapping[str, object]) -> dict[str, object]:
    """The fields that count, with the kind under one name."""
    kind = rope_type(scaling) or "default"
    if kind == "default":
        return {"type": kind}
    return {"type": kind, **{key: value for key, value in scaling.items() if key not in _UNSCALED}}
