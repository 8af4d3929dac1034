"""``quantization_config`` of a ``config.json``: FP8 in blocks and GPTQ, read and checked.

GPTQ's fields are those that AutoGPTQ and GPTQModel write and that vLLM and SGLang read; for the tensors that follow
from them see ``blueprint``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from weightkit.errors import UnsupportedError
from weightkit.family.rules import MAX_RULES, Pattern, PatternError

FP8_BLOCK_SIZE = (128, 128)
"""Rows and columns of a weight that share one scale, in every published FP8 member."""
GPTQ_BITS = (4, 8)
"""Widths whose codes fill 32-bit words."""
GPTQ_FORMATS = ("gptq", "gptq_v2")
"""``checkpoint_format``: the first stores zero points less one, as AutoGPTQ did and every engine reads."""
WORD_BITS = 32
_CONFIG = "quantization_config"
#: What an override may not change: here all weights are quantized alike.
_FIXED = ("bits", "group_size", "sym", "desc_act", "pack_dtype")


@dataclass(frozen=True, slots=True)
class Quantization:
    """``quantization_config`` of a ``config.json``.

    Attributes:
        method: ``quant_method`` as published: ``fp8``, ``gptq``, ``compressed-tensors``...
        block_size: rows and columns that share a scale; None unless the method is ``fp8``.
        scale_fmt: ``ue8m0`` where the scales are powers of two (V3.1 on), still stored as F32; else None.
        modules_to_not_convert: modules that keep the unquantized dtype, by the paths the config gives there or in
            ``ignored_layers``.
        bits: width of a GPTQ code, 4 or 8; 0 for other methods, whose next fields mean nothing.
        group_size: input features that share a scale; -1: all of them.
        sym: whether every zero point is ``2 ** (bits - 1)``.
        desc_act: whether groups may be of any input features, as ``g_idx`` says, rather than of neighbours.
        checkpoint_format: ``gptq`` (stored zero points are one less) or ``gptq_v2``.
        rules: the patterns of ``dynamic`` in their order, each with ``-:`` (these modules stay unquantized) or ``+:``.
        modules_in_block: the only modules of a layer that are quantized, such as ``mlp.up_proj``; None: all.
        raw: the dictionary as it stands in the config.
    """

    method: str
    block_size: tuple[int, int] | None = None
    scale_fmt: str | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    bits: int = 0
    group_size: int = 0
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = GPTQ_FORMATS[0]
    rules: tuple[str, ...] = ()
    modules_in_block: tuple[str, ...] | None = None
    raw: Mapping[str, object] = field(default_factory=dict, hash=False, compare=False, repr=False)

    @property
    def is_fp8(self) -> bool:
        """Whether weights are F8_E4M3 with a ``weight_scale_inv`` for each block."""
        return self.method == "fp8"

    @property
    def is_gptq(self) -> bool:
        """Whether weights are codes packed in I32 words, with ``scales``, ``qzeros`` and ``g_idx``."""
        return self.method == "gptq"

    @property
    def codes_per_word(self) -> int:
        """GPTQ codes in an I32 word: 8 of 4 bits."""
        return WORD_BITS // self.bits

    @property
    def zero_offset(self) -> int:
        """What a stored zero point is less than the zero point."""
        return 1 if self.checkpoint_format == GPTQ_FORMATS[0] else 0

    @property
    def symmetric_zeros(self) -> int:
        """The word of ``qzeros`` (unsigned) where every zero point is ``2 ** (bits - 1)``: 0x77777777 for int4 v1."""
        zero = (1 << (self.bits - 1)) - self.zero_offset
        return sum(zero << (self.bits * place) for place in range(self.codes_per_word))

    def groups(self, in_features: int) -> int:
        """Scales of an output feature. A last group that is shorter has one too."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def quantizes(self, module: str) -> bool:
        """Whether the linear layer ``module`` (``model.layers.3.mlp.up_proj``) is quantized, as far as names say.

        For GPTQ the first pattern of ``dynamic`` that matches from the name's beginning counts, as in GPTQModel, vLLM
        and SGLang.
        """
        kept = self.modules_to_not_convert
        if kept and any(module == path or module.startswith(f"{path}.") for path in kept):
            return False
        if self.modules_in_block is not None and not any(
            f".{path}." in f".{module}." for path in self.modules_in_block
        ):
            return False
        return next((chosen for chosen, pattern in _compiled(self.rules) if pattern.match(module)), True)


FP8 = Quantization("fp8", FP8_BLOCK_SIZE)
"""The quantization of DeepSeek-V3 as published."""


def rule_matches(rule: str, module: str) -> bool:
    """Whether a rule of ``dynamic``, with its ``-:`` or ``+:``, is about ``module``."""
    return _compiled((rule,))[0][1].match(module)


@lru_cache(maxsize=64)
def _compiled(rules: tuple[str, ...]) -> tuple[tuple[bool, Pattern], ...]:
    """Whether a rule's modules are quantized, and which they are."""
    return tuple((not rule.startswith("-:"), Pattern(rule.removeprefix("-:").removeprefix("+:"))) for rule in rules)


def read_quantization(raw: Mapping[str, object], problems: list[str], *, where: str) -> Quantization | None:
    """Read and check the dictionary; None, and a line in ``problems``, where it says nothing usable.

    Raises:
        UnsupportedError: a GPTQ variant that weightkit does not read.
    """
    method = raw.get("quant_method")
    if not isinstance(method, str):
        problems.append(f"{_CONFIG}.quant_method: expected a string, found {method!r}")
        return None
    if method == "fp8":
        return _read_fp8(raw, problems)
    if method == "gptq":
        return read_gptq(raw, problems, where=where)
    return Quantization(method, raw=raw)


def _read_fp8(raw: Mapping[str, object], problems: list[str]) -> Quantization:
    """Only E4M3 in blocks of 128 x 128: the format that weightkit computes with."""
    block = raw.get("weight_block_size")
    if block != list(FP8_BLOCK_SIZE):
        problems.append(f"{_CONFIG}.weight_block_size: expected {list(FP8_BLOCK_SIZE)}, found {block!r}")
    fmt = raw.get("fmt", "e4m3")
    if fmt not in ("e4m3", "float8_e4m3fn"):
        problems.append(f"{_CONFIG}.fmt: expected 'e4m3', found {fmt!r}")
    scale_fmt = raw.get("scale_fmt")
    if scale_fmt not in (None, "float", "ue8m0"):  # transformers writes float where there is none
        problems.append(f"{_CONFIG}.scale_fmt: expected 'ue8m0', 'float' or none, found {scale_fmt!r}")
    return Quantization(
        "fp8",
        block_size=FP8_BLOCK_SIZE,
        scale_fmt="ue8m0" if scale_fmt == "ue8m0" else None,
        modules_to_not_convert=_exceptions(raw, problems),
        raw=raw,
    )


def _exceptions(raw: Mapping[str, object], problems: list[str]) -> tuple[str, ...]:
    """The modules that stay unquantized. transformers calls the list ``modules_to_not_convert`` and vLLM
    ``ignored_layers``; each takes the other name where its own is not there."""
    lists: list[tuple[str, ...]] = []
    for key in ("modules_to_not_convert", "ignored_layers"):
        value = raw.get(key)
        if value is None:
            continue
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            lists.append(tuple(value))
        else:
            problems.append(f"{_CONFIG}.{key}: expected a list of names, found {str(value)[:80]}")
    if len({frozenset(names) for names in lists}) > 1:
        problems.append(f"{_CONFIG}: modules_to_not_convert and ignored_layers differ, and engines read either")
    return lists[0] if lists else ()


def read_gptq(raw: Mapping[str, object], problems: list[str], *, where: str) -> Quantization | None:
    """GPTQ's dictionary, from ``config.json`` or ``quantize_config.json``; as ``read_quantization``."""
    before = len(problems)
    bits, group_size = _integer(raw, "bits", problems), _integer(raw, "group_size", problems)
    sym, desc_act = _boolean(raw, "sym", problems), _boolean(raw, "desc_act", problems)
    if group_size < -1 or group_size == 0:
        problems.append(f"{_CONFIG}.group_size: expected -1 or a positive number, found {group_size}")
    rules = _rules(raw, problems)
    blocks = tuple(_modules_in_block(raw, problems))
    if len(problems) > before:
        return None
    for what, key, expected, found in _unsupported(raw, bits):
        raise UnsupportedError(what, where=f"{where}: {_CONFIG}.{key}", expected=expected, found=found, fix=_FIX)
    _check_rules(raw, rules, where)
    return Quantization(
        "gptq",
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
        checkpoint_format=str(raw.get("checkpoint_format") or GPTQ_FORMATS[0]),
        rules=rules,
        modules_in_block=blocks or None,
        raw=raw,
    )


_FIX = "Use another quantization of this model, or its FP8 or BF16 repository."


def _unsupported(raw: Mapping[str, object], bits: int) -> Iterator[tuple[str, str, str, object]]:
    """Variants of GPTQ that exist and are not read here."""
    form, pack = raw.get("checkpoint_format"), raw.get("pack_dtype")
    if bits not in GPTQ_BITS:
        yield "GPTQ of a width that is not read", "bits", "4 or 8", bits
    if form not in (None, *GPTQ_FORMATS):
        yield "a GPTQ layout that is not read", "checkpoint_format", "gptq or gptq_v2", form
    if raw.get("is_marlin_format"):
        yield "a GPTQ layout that is not read", "is_marlin_format", "false", raw["is_marlin_format"]
    if pack not in (None, "int32", "torch.int32"):
        yield "GPTQ codes packed in other words", "pack_dtype", "int32", pack
    if raw.get("lm_head"):
        yield "a quantized head", "lm_head", "false", raw["lm_head"]


def _check_rules(raw: Mapping[str, object], rules: tuple[str, ...], where: str) -> None:
    """Refuse a pattern that is not known, and an override that makes some weights unlike the others."""
    dynamic = raw.get("dynamic")
    for rule in rules:
        place = f"{where}: {_CONFIG}.dynamic: {rule[:80]!r}"
        try:
            _compiled((rule,))
        except PatternError as exc:
            raise UnsupportedError(
                f"a pattern that is not read ({exc})",
                where=place,
                fix="Write the rule with plain groups, sets and quantifiers: no lookaround, no counts.",
            ) from None
        override = dynamic[rule] if isinstance(dynamic, Mapping) else None
        changed = [
            key for key in _FIXED if isinstance(override, Mapping) and override.get(key, raw.get(key)) != raw.get(key)
        ]
        if changed and isinstance(override, Mapping) and not rule.startswith("-:"):
            raise UnsupportedError(
                "an override that quantizes some modules otherwise than the rest",
                where=place,
                expected=", ".join(f"{key} {raw.get(key)}" for key in changed),
                found=", ".join(f"{key} {override[key]}" for key in changed),
                fix=_FIX,
            )


def _rules(raw: Mapping[str, object], problems: list[str]) -> tuple[str, ...]:
    dynamic = raw.get("dynamic")
    if not dynamic:
        return ()
    if not isinstance(dynamic, Mapping):
        problems.append(f"{_CONFIG}.dynamic: expected an object, found {str(dynamic)[:80]}")
        return ()
    if len(dynamic) > MAX_RULES:
        problems.append(f"{_CONFIG}.dynamic: expected at most {MAX_RULES} rules, found {len(dynamic):,}")
        return ()
    return tuple(dynamic)


def _modules_in_block(raw: Mapping[str, object], problems: list[str]) -> Iterator[str]:
    """The names, which optimum writes as a list of lists."""
    found = raw.get("modules_in_block_to_quantize")
    for entry in found if isinstance(found, list) else [] if found is None else [found]:
        for name in entry if isinstance(entry, list) else [entry]:
            if not isinstance(name, str) or found is entry:
                problems.append(f"{_CONFIG}.modules_in_block_to_quantize: expected names, found {str(name)[:80]}")
                return
            yield name


def _integer(raw: Mapping[str, object], key: str, problems: list[str]) -> int:
    value = raw.get(key)
    if type(value) is int and abs(value) < 1 << 31:
        return value
    problems.append(
        f"{_CONFIG}.{key}: expected an integer, found {str(value)[:80] if type(value) is not int else 'a huge one'}"
    )
    return 1


def _boolean(raw: Mapping[str, object], key: str, problems: list[str]) -> bool:
    value = raw.get(key)
    if not isinstance(value, bool):
        problems.append(f"{_CONFIG}.{key}: expected true or false, found {str(value)[:80]}")
    return value is True
