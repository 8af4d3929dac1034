"""GPTQ in configs: what is read and refused, which tensors follow, which degrees are legal, what is written."""

from __future__ import annotations

import re
import time
from itertools import product
from typing import Any

import pytest
from family_configs import FP8, SMALL, V3, V3_BF16, V32
from hypothesis import given, settings
from hypothesis import strategies as st

from weightkit.errors import ConfigError, PlanError, UnsupportedError
from weightkit.family import (
    Architecture,
    Expected,
    blueprint,
    demo_limits,
    gptq_config,
    legal_mp,
    legal_tp,
    mp_problems,
    quantizable_modules,
    require_mp,
    to_demo,
    to_published,
    totals,
    tp_problems,
    without_mtp_rules,
)
from weightkit.family.rules import MAX_LENGTH, Pattern, PatternError

#: By hand, as the experts of V3 are quantized: attention and the three dense layers are kept.
EXPERTS: dict[str, Any] = {
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "dynamic": {"-:.*self_attn.*": {}, r"-:.*layers\.(0|1|2)\.mlp\..*": {}},
    "meta": {"quantizer": ["weightkit:0.1"]},
}
ALL: dict[str, Any] = {**EXPERTS, "dynamic": {}}
NO_MTP = {**V3, "num_nextn_predict_layers": 0}
#: V3's widths, and one layer of experts.
FOUR_LAYERS = {**NO_MTP, "num_hidden_layers": 4}
#: SMALL with widths that fill words of 8, and groups that divide them.
SMALL_8 = {**SMALL, "moe_intermediate_size": 136, "intermediate_size": 304, "num_nextn_predict_layers": 0}


def arch_of(quantization: dict[str, Any] | None, config: dict[str, Any] = NO_MTP) -> Architecture:
    return Architecture.from_config({**config, "quantization_config": quantization})


def records_of(quantization: dict[str, Any], config: dict[str, Any] = NO_MTP) -> dict[str, Expected]:
    return blueprint(arch_of(quantization, config))


# Reading the dictionary


def test_what_is_read() -> None:
    found = arch_of({**EXPERTS, "checkpoint_format": "gptq_v2", "desc_act": True, "sym": False}).quantization
    assert found is not None
    assert (found.method, found.bits, found.group_size, found.codes_per_word) == ("gptq", 4, 128, 8)
    assert (found.desc_act, found.sym, found.checkpoint_format, found.zero_offset) == (True, False, "gptq_v2", 0)
    assert found.rules == ("-:.*self_attn.*", r"-:.*layers\.(0|1|2)\.mlp\..*")
    assert found.is_gptq
    assert not found.is_fp8


def test_autogptqs_own_dictionary_has_no_format_and_no_rules() -> None:
    raw = {"bits": 8, "group_size": -1, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True}
    found = arch_of({**raw, "true_sequential": True, "quant_method": "gptq"}).quantization
    assert found is not None
    assert (found.checkpoint_format, found.zero_offset, found.rules, found.codes_per_word) == ("gptq", 1, (), 4)


@pytest.mark.parametrize(
    ("bits", "form", "word"),
    [(4, "gptq", 0x77777777), (4, "gptq_v2", 0x88888888), (8, "gptq", 0x7F7F7F7F), (8, "gptq_v2", 0x80808080)],
)
def test_the_word_of_symmetric_zeros(bits: int, form: str, word: int) -> None:
    found = arch_of({**EXPERTS, "bits": bits, "checkpoint_format": form}).quantization
    assert found is not None
    assert found.symmetric_zeros == word


@pytest.mark.parametrize(
    ("change", "where", "found"),
    [
        ({"bits": 2}, "bits", "found 2"),
        ({"bits": 3}, "bits", "found 3"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format", "found marlin"),
        ({"is_marlin_format": True}, "is_marlin_format", "found True"),
        ({"pack_dtype": "int8"}, "pack_dtype", "found int8"),
        ({"lm_head": True}, "lm_head", "found True"),
        ({"dynamic": {"+:.*up_proj": {"bits": 8}}}, "dynamic: '+:.*up_proj'", "expected bits 4, found bits 8"),
        ({"dynamic": {".*up_proj": {"bits": 8}}}, "dynamic: '.*up_proj'", "found bits 8"),
        ({"dynamic": {"+:x": {"group_size": 32}}}, "dynamic: '+:x'", "found group_size 32"),
        ({"dynamic": {"-:(?!.*experts).*": {}}}, "dynamic: '-:(?!.*experts).*'", "a pattern that is not read"),
    ],
)
def test_variants_that_are_not_read_are_named(change: dict[str, Any], where: str, found: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        Architecture.from_config({**V3, "quantization_config": {**EXPERTS, **change}}, where="some/config.json")
    assert f"some/config.json: quantization_config.{where}" in str(caught.value)
    assert found in str(caught.value)


def test_an_override_that_changes_nothing_is_no_obstacle() -> None:
    rules = {"+:.*up_proj": {"bits": 4, "damp_percent": 0.1}, "-:.*": {}}
    records = records_of({**ALL, "dynamic": rules}, SMALL_8)
    assert "model.layers.0.mlp.up_proj.qweight" in records  # the first rule that matches counts
    assert "model.layers.0.mlp.down_proj.weight" in records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": None}, "bits: expected an integer"),
        ({"bits": True}, "bits: expected an integer"),
        ({"group_size": 0}, "group_size: expected -1 or a positive"),
        ({"group_size": -2}, "group_size: expected -1 or a positive"),
        ({"group_size": 10**5000}, "group_size: expected an integer, found a huge one"),
        ({"sym": 1}, "sym: expected true or false"),
        ({"desc_act": None}, "desc_act: expected true or false"),
        ({"dynamic": ["-:x"]}, "dynamic: expected an object"),
        ({"dynamic": {f"-:{number}": {} for number in range(300)}}, "at most 256 rules, found 300"),
        ({"modules_in_block_to_quantize": [3]}, "modules_in_block_to_quantize: expected names"),
        ({"modules_in_block_to_quantize": "mlp"}, "modules_in_block_to_quantize: expected names"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        arch_of({**EXPERTS, **change})


def test_modules_in_block() -> None:
    nested = [["mlp.experts.0.up_proj"], ["mlp.shared_experts.down_proj", "self_attn.o_proj"]]
    records = records_of({**ALL, "modules_in_block_to_quantize": nested}, {**SMALL_8, "v_head_dim": 16})
    assert {name for name in records if "layers.2." in name and name.endswith("qweight")} == {
        "model.layers.2.mlp.experts.0.up_proj.qweight",
        "model.layers.2.mlp.shared_experts.down_proj.qweight",
        "model.layers.2.self_attn.o_proj.qweight",
    }


# Patterns


NAMES = [
    "model.layers.3.self_attn.o_proj",
    "model.layers.3.self_attn.kv_a_proj_with_mqa",
    "model.layers.10.mlp.experts.17.up_proj",
    "model.layers.1.mlp.shared_experts.down_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.61.mlp.experts.255.gate_proj",
    "lm_head",
    "",
]
PATTERNS = [
    ".*self_attn.*",
    r".*layers\.(0|1|2)\.mlp\..*",
    r"model\.layers\.61\..*",
    r".*\.layers\.[0-9]+\.mlp\.experts\.\d+\.(?:up|gate)_proj$",
    r"^model\.layers\.1\.",
    "model",
    "layers",
    ".*[^a-z_]up_proj",
    "lm_head",
    "lm_head?",
    "(lm_)?head|model.layers.3.*(o_proj|x)",
    "(a|b)*",
    "(model|layers|.[0-9]+.)+mlp",
    "(?:(m|mo)*del)+.*?down",
    r".*[\].]up",
    "",
    "$",
    ".*$",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_pythons_do(pattern: str) -> None:
    ours = Pattern(pattern)
    for name in NAMES:
        assert ours.match(name) is (re.match(pattern, name) is not None), name
        assert ours.match(name) is (re.match(pattern, name) is not None), name  # what is known by now


ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", "(a|b)", "(a?b|)", "(?:(?:ab)*)", "(a(b|c)+)", "((b)+)"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(ATOMS, st.sampled_from(["", "", "*", "+", "?", "*?"])), max_size=5), st.booleans())
def test_any_pattern_matches_as_pythons_does(pieces: list[tuple[str, str]], to_end: bool) -> None:
    text = "".join(atom + quantifier for atom, quantifier in pieces) + "$" * to_end
    pattern = Pattern(text)
    for length in range(5):
        for letters in product("ab.", repeat=length):
            name = "".join(letters)
            assert pattern.match(name) is (re.match(text, name) is not None), (text, name)


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "a)", "(a", "[a", "*a", "a**", "a+*", "a*+", "a{2}", "{", "(?=a)", "(?i)a", "(?P<x>a)", r"(a)\1", r"\b"],
)
def test_patterns_that_are_not_read(pattern: str) -> None:
    with pytest.raises(PatternError):
        Pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["\\", "a^", "$a", "a|b$", "a$|b", "($)", "[z-a]", "[]", "a" * (MAX_LENGTH + 1), "(" * 200 + ")" * 200],
)
def test_more_patterns_that_are_not_read(pattern: str) -> None:
    with pytest.raises(PatternError):
        Pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*)*x", ".*.*.*.*.*.*.*.*x", "(a?" * 20 + ")" * 20 + "b", "a?" * 200 + "b"],
)
def test_a_hostile_pattern_takes_no_longer(pattern: str) -> None:
    started = time.monotonic()
    compiled = Pattern(pattern)
    for length in range(60, 100):
        assert not compiled.match("a" * length + "!")
    assert time.monotonic() - started < 120


# The tensors


def test_the_four_tensors_of_v3s_experts() -> None:
    records = records_of(EXPERTS)
    expert, shared = "model.layers.3.mlp.experts.255", "model.layers.60.mlp.shared_experts"
    assert {name: (r.dtype, r.shape, r.split_dim, r.expert, r.weight_name) for name, r in records.items()}.items() >= {
        f"{expert}.gate_proj.qweight": ("I32", (896, 2048), None, 255, None),
        f"{expert}.gate_proj.qzeros": ("I32", (56, 256), None, 255, f"{expert}.gate_proj.qweight"),
        f"{expert}.gate_proj.scales": ("F16", (56, 2048), None, 255, f"{expert}.gate_proj.qweight"),
        f"{expert}.gate_proj.g_idx": ("I32", (7168,), None, 255, f"{expert}.gate_proj.qweight"),
        f"{expert}.down_proj.qweight": ("I32", (256, 7168), None, 255, None),
        f"{expert}.down_proj.qzeros": ("I32", (16, 896), None, 255, f"{expert}.down_proj.qweight"),
        f"{expert}.down_proj.scales": ("F16", (16, 7168), None, 255, f"{expert}.down_proj.qweight"),
        f"{expert}.down_proj.g_idx": ("I32", (2048,), None, 255, f"{expert}.down_proj.qweight"),
        f"{shared}.up_proj.qweight": ("I32", (896, 2048), 1, None, None),
        f"{shared}.up_proj.qzeros": ("I32", (56, 256), 1, None, f"{shared}.up_proj.qweight"),
        f"{shared}.up_proj.scales": ("F16", (56, 2048), 1, None, f"{shared}.up_proj.qweight"),
        f"{shared}.up_proj.g_idx": ("I32", (7168,), None, None, f"{shared}.up_proj.qweight"),
        f"{shared}.down_proj.qweight": ("I32", (256, 7168), 0, None, None),
        f"{shared}.down_proj.qzeros": ("I32", (16, 896), 0, None, f"{shared}.down_proj.qweight"),
        f"{shared}.down_proj.scales": ("F16", (16, 7168), 0, None, f"{shared}.down_proj.qweight"),
        f"{shared}.down_proj.g_idx": ("I32", (2048,), 0, None, f"{shared}.down_proj.qweight"),
        "model.layers.3.self_attn.o_proj.weight": ("BF16", (7168, 16384), 1, None, None),
        "model.layers.2.mlp.up_proj.weight": ("BF16", (18432, 7168), 0, None, None),
        "model.layers.3.mlp.gate.weight": ("BF16", (256, 7168), None, None, None),
        "model.layers.3.mlp.gate.e_score_correction_bias": ("F32", (256,), None, None, None),
    }.items()
    assert f"{expert}.gate_proj.weight" not in records
    assert {record.dtype for record in records.values()} == {"I32", "F16", "BF16", "F32"}
    assert records[f"{expert}.gate_proj.qweight"].parameters == 7168 * 2048
    assert sum(records[f"{expert}.gate_proj.{leaf}"].parameters for leaf in ("qzeros", "scales", "g_idx")) == 0


def test_totals_of_v3_in_int4() -> None:
    """By hand: an expert is three weights of 7168 x 2048 codes, each with 114,688 scales and zeros and a g_idx."""
    records = records_of(EXPERTS).values()
    found = totals(records)
    experts = 58 * 257
    codes, scales, indices = 3 * 7168 * 2048, 3 * 56 * 2048, 2 * 7168 + 2048
    assert found.elements["I32"] == experts * (codes // 8 + scales // 8 + indices)
    assert found.elements["F16"] == experts * scales
    attention = 1536 * 7168 + 1536 + 128 * 192 * 1536 + 576 * 7168 + 512 + 128 * 256 * 512 + 7168 * 128 * 128
    bf16 = 61 * (attention + 2 * 7168) + 3 * 3 * 18432 * 7168 + 58 * 256 * 7168 + 7168 + 2 * 129280 * 7168
    assert found.elements["BF16"] == bf16
    assert found.elements["F32"] == 58 * 256
    assert found.tensors == experts * 3 * 4 + 61 * 9 + 3 * 3 + 58 * 2 + 3
    expert_bytes = codes // 2 + scales // 2 + 4 * indices + 2 * scales
    assert found.size_bytes == experts * expert_bytes + 2 * bf16 + 4 * 58 * 256
    # the same, worked out
    assert expert_bytes == 22_945_792
    assert found.size_bytes == 371_156_639_744
    assert sum(record.parameters for record in records) == 671_026_419_200


def test_all_of_v3_is_smaller() -> None:
    records = records_of(ALL).values()
    found = totals(records)
    attention = 1536 * 7168 + 128 * 192 * 1536 + 576 * 7168 + 128 * 256 * 512 + 7168 * 128 * 128
    weights = 61 * attention + 3 * 3 * 18432 * 7168 + 58 * 257 * 3 * 7168 * 2048
    assert found.elements["F16"] == weights // 128
    assert sum(record.parameters for record in records) == 671_026_419_200


@pytest.mark.parametrize(("group_size", "groups", "bits"), [(-1, 1, 4), (32, 224, 4), (64, 112, 8), (5000, 2, 8)])
def test_groups_and_bits(group_size: int, groups: int, bits: int) -> None:
    records = records_of({**EXPERTS, "group_size": group_size, "bits": bits}, FOUR_LAYERS)
    name = "model.layers.3.mlp.experts.0.gate_proj"
    assert records[f"{name}.qweight"].shape == (7168 * bits // 32, 2048)
    assert records[f"{name}.qzeros"].shape == (groups, 2048 * bits // 32)
    assert records[f"{name}.scales"].shape == (groups, 2048)


def test_one_group_for_all_columns_belongs_to_every_rank() -> None:
    records = records_of({**EXPERTS, "group_size": -1}, FOUR_LAYERS)
    name = "model.layers.3.mlp.shared_experts.down_proj"
    leaves = ("qweight", "qzeros", "scales", "g_idx")
    assert [records[f"{name}.{leaf}"].split_dim for leaf in leaves] == [0, None, None, 0]


def test_widths_that_fill_no_words() -> None:
    with pytest.raises(
        UnsupportedError, match=r"layers\.0\.mlp\.gate_proj\.weight.*multiples of 8, found \[300, 200\]"
    ):
        records_of({**ALL, "dynamic": {"-:.*self_attn.*": {}}}, SMALL)


def test_names_in_rank_files() -> None:
    for name in records_of(EXPERTS, SMALL_8):
        assert to_published(to_demo(name)) == name
    assert to_demo("model.layers.3.mlp.experts.0.up_proj.g_idx") == "layers.3.ffn.experts.0.w3.g_idx"


# Degrees


def test_pain_15_legal_degrees_of_v3_in_int4() -> None:
    arch = arch_of(EXPERTS)
    assert legal_mp(arch, fp8=False, gptq=True) == (1, 2, 4, 8, 16)  # shared experts have 16 groups
    assert legal_mp(arch, fp8=False) == (1, 2, 4, 8, 16, 32, 64, 128)
    assert legal_mp(arch_of({**EXPERTS, "group_size": 32}), fp8=False, gptq=True) == (1, 2, 4, 8, 16, 32, 64)
    assert legal_mp(arch_of({**EXPERTS, "group_size": -1}), fp8=False, gptq=True)[-1] == 128
    assert legal_mp(arch_of({**EXPERTS, "desc_act": True}), fp8=False, gptq=True) == (1,)


def test_pain_15_a_split_group_is_refused_with_the_legal_degrees() -> None:
    with pytest.raises(PlanError) as caught:
        require_mp(arch_of(EXPERTS), 32, fp8=False, gptq=True)
    assert str(caught.value) == (
        "model.layers.3.mlp.shared_experts.down_proj.qweight: 16 groups of 128 columns cannot be split over 32 ranks.\n"
        "Legal --mp for this int4 checkpoint: 1, 2, 4, 8, 16. Use one of them, or add --to bf16."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 100}, "2048 columns, which end within a group of 100, cannot"),
        ({"desc_act": True}, "groups of 128 columns from anywhere (desc_act) cannot"),
        ({"group_size": -1}, None),
    ],
)
def test_pain_15_reasons(change: dict[str, Any], message: str | None) -> None:
    found = [problem.what for problem in mp_problems(arch_of({**EXPERTS, **change}), 2, fp8=False, gptq=True)]
    assert [what for what in found if message is None or message in what] == found
    assert bool(found) is (message is not None)


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("group_size", [-1, 24, 32, 128])
@pytest.mark.parametrize("dynamic", [EXPERTS["dynamic"], {}, {r"-:.*layers\.3\..*": {}}])
def test_problems_agree_with_the_whole_blueprint(n: int, group_size: int, dynamic: dict[str, Any]) -> None:
    """A degree is legal exactly if each of the four tensors divides, and groups end where the ranks' parts do."""
    config = {**NO_MTP, "num_hidden_layers": 5, "n_routed_experts": 128, "n_group": 1, "topk_group": 1}
    arch = arch_of({**EXPERTS, "group_size": group_size, "dynamic": dynamic}, config)
    records = blueprint(arch)
    divides = arch.num_attention_heads % n == 0 and arch.n_routed_experts % n == 0
    for name, record in records.items():
        if record.split_dim is not None:
            divides &= record.shape[record.split_dim] % n == 0
            if name.endswith("qweight") and record.split_dim == 0 and group_size != -1:
                divides &= record.shape[0] * 8 % (group_size * n) == 0
    assert (not mp_problems(arch, n, fp8=False, gptq=True)) is divides


def test_pain_15_degrees_that_engines_can_have() -> None:
    assert legal_tp(arch_of(EXPERTS)) == (1, 2, 4, 8, 16)
    assert legal_tp(arch_of({**EXPERTS, "group_size": 32}))[-1] == 32  # tiles of 64 columns
    assert legal_tp(arch_of(None))[-1] == 128
    wide = arch_of({**EXPERTS, "group_size": 1024})
    assert legal_tp(wide) == (1, 2)
    expert = tp_problems(wide, 4)[-1]
    assert str(expert) == (
        "model.layers.3.mlp.experts.0.down_proj.qweight: 2048 columns of an expert (group size 1024) are not 4 times "
        "whole 1024s."
    )
    assert tp_problems(arch_of(EXPERTS), 3)[0].where == "num_attention_heads"


# What is written


def test_the_dictionary_of_v3s_experts() -> None:
    meta = {"quantizer": ["weightkit:0.1"]}
    assert gptq_config(arch_of(FP8), bits=4, group_size=128, scope="experts", mtp=False, meta=meta) == EXPERTS


@pytest.mark.parametrize(
    ("scope", "config", "mtp", "rules"),
    [
        ("experts", V3, True, ["-:.*self_attn.*", r"-:.*layers\.(0|1|2)\.mlp\..*", r"-:.*layers\.(61)\..*"]),
        ("all", V3, False, []),
        ("all", V3, True, [r"-:.*layers\.(61)\..*"]),
        ("all", V32, False, ["-:.*indexer.*"]),
        ("experts", {**V3, "first_k_dense_replace": 0}, False, ["-:.*self_attn.*"]),
    ],
)
def test_rules(scope: Any, config: dict[str, Any], mtp: bool, rules: list[str]) -> None:
    arch = Architecture.from_config(config)
    made = gptq_config(arch, bits=4, group_size=128, scope=scope, mtp=mtp, meta={})
    assert made["dynamic"] == {rule: {} for rule in rules}


@pytest.mark.parametrize("scope", ["experts", "all"])
@pytest.mark.parametrize("config", [V3, V32, {**V3_BF16, "moe_layer_freq": 2}], ids=["V3", "V3.2", "every other layer"])
def test_the_rules_quantize_what_they_should(scope: Any, config: dict[str, Any]) -> None:
    config = {**config, "n_routed_experts": 8, "n_group": 1, "topk_group": 1}
    made = gptq_config(Architecture.from_config(config), bits=4, group_size=64, scope=scope, mtp=True, meta={})
    arch = arch_of(made, config)
    records = blueprint(arch)
    for layer in range(arch.total_layers):
        for module in quantizable_modules(arch, layer):
            in_scope = "experts" in module or (scope == "all" and "indexer" not in module)
            assert (f"{module}.qweight" in records) is (in_scope and layer < 61), module


def test_many_dense_layers_take_several_rules() -> None:
    config = {**SMALL_8, "num_hidden_layers": 300, "first_k_dense_replace": 299}
    made = gptq_config(Architecture.from_config(config), bits=4, group_size=8, scope="experts", mtp=False, meta={})
    quantized = {name.split(".")[2] for name in records_of(made, config) if name.endswith("qweight")}
    assert quantized == {"299"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "--bits: no such width: expected 4 or 8, found 3"),
        ({"group_size": 0}, "--group-size: no such group size"),
        ({"scope": "attention"}, "--scope: no such scope"),
        ({"group_size": 96}, r"groups of 96 do not divide the 7168 input features of .*experts\.0\.gate_proj"),
        ({"group_size": 4096}, r"do not divide the 7168 input features of .*experts\.0\.gate_proj"),
        ({"group_size": 1024, "scope": "all"}, r"do not divide the 1536 input features of .*self_attn\.q_b_proj"),
    ],
)
def test_requests_without_a_result(change: dict[str, Any], message: str) -> None:
    wanted: dict[str, Any] = {"bits": 4, "group_size": 128, "scope": "experts", "mtp": False, "meta": {}, **change}
    with pytest.raises(PlanError, match=message):
        gptq_config(Architecture.from_config(V3), **wanted)


def test_rules_of_mtp_layers_go_with_them() -> None:
    arch = Architecture.from_config(V3)
    made = gptq_config(arch, bits=4, group_size=128, scope="experts", mtp=True, meta={})
    assert without_mtp_rules(made, arch) == {**EXPERTS, "meta": {}}
    kept: dict[str, Any] = {"-:.*nothing.*": {}, "+:.*": {}, "-:.*self_attn.*": {}, r"-:.*layers\.(60|61)\..*": {}}
    assert without_mtp_rules({"dynamic": kept}, arch) == {"dynamic": kept}
    assert without_mtp_rules({"bits": 4}, arch) == {"bits": 4}


def test_the_demo_reads_none_of_it() -> None:
    assert demo_limits(arch_of(EXPERTS)) == ["it reads no GPTQ: cast to bf16, or use an engine that does"]
