"""Sizes by hand: totals as published, a rank's part from a table of names written out here, errors and edges."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from folders import read_safetensors
from tiny import V2_LITE, V3, V3_INT4, Gptq, Tiny, write_tiny

import weightkit as wk
from weightkit import manifests
from weightkit.cli.app import group
from weightkit.errors import NotACheckpointError, PlanError, SpaceError, WeightkitError
from weightkit.family import Architecture, blueprint, legal_tp, totals, tp_problems
from weightkit.sizing import Load, Machine, SizingPlan, plan
from weightkit.sizing.engines import obstacles
from weightkit.sizing.forms import forms_of
from weightkit.sizing.plan import FormatPlan
from weightkit.sizing.routes import MOE_LAYER_S, quantization_s
from weightkit.sizing.source import read_source
from weightkit.sizing.weights import weigh

GIB = 1 << 30
SIZES = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4}
#: DeepSeek-V3, by its published config, in the names and shapes that tests/tiny.py writes out.
FULL = Tiny(
    hidden=7168,
    vocab=129280,
    layers=61,
    dense_layers=3,
    heads=128,
    q_lora=1536,
    kv_lora=512,
    nope=128,
    rope=64,
    v=128,
    intermediate=18432,
    moe=2048,
    experts=256,
    shared=1,
    groups=8,
    top_groups=4,
    top_k=8,
)
LITE_INT4_PROBLEM = "22 groups of 128 columns cannot be split over 4 ranks"


def formats(found: SizingPlan) -> dict[str, FormatPlan]:
    return {item.name: item for item in found.formats}


@pytest.fixture(scope="module")
def v3() -> SizingPlan:
    return plan("deepseek-v3", Machine(8, 96 * GIB))


# Totals


def test_totals_of_v3(v3: SizingPlan) -> None:
    found = formats(v3)
    assert found["fp8"].disk_bytes == 688_574_839_360
    assert found["fp8"].main_bytes == 673_150_611_808
    assert found["bf16"].disk_bytes == 1_368_979_721_216
    assert found["bf16"].main_bytes == 1_342_052_868_096
    assert found["int4"].main_bytes == 371_156_639_744
    assert round(found["int4"].main_bytes / GIB, 1) == 345.7
    assert found["int4"].disk_bytes - found["int4"].main_bytes == 1_368_979_721_216 - 1_342_052_868_096
    assert [item.loaded_bytes for item in v3.formats] == [item.main_bytes for item in v3.formats]


def test_int4_of_v3_by_hand() -> None:
    """58 layers of 257 experts, and of the rest what BF16 has."""

    def int4(columns: int, rows: int) -> int:
        groups = columns // 128
        return columns // 8 * rows * 4 + groups * rows // 8 * 4 + groups * rows * 2 + columns * 4

    experts = 58 * 257 * (2 * int4(7168, 2048) + int4(2048, 7168))
    rest = 1_342_052_868_096 - 58 * 257 * 3 * 7168 * 2048 * 2
    assert experts + rest == 371_156_639_744


def test_totals_of_v2_lite() -> None:
    found = formats(plan("deepseek-v2-lite"))
    assert set(found) == {"bf16", "int4"}
    assert found["bf16"].disk_bytes == found["bf16"].main_bytes == 31_412_968_448
    experts = 3 * 2048 * 1408  # of one, in elements; the two shared ones are one of twice the width
    per_group = 2 + 0.5  # an F16 scale and a zero point of 4 bits
    int4 = 26 * 66 * experts * (0.5 + per_group / 128) + 26 * 4 * (64 * (2 * 2048 + 1408) + 2 * 2048 + 2 * 1408)
    assert found["int4"].main_bytes == 31_412_968_448 - 26 * 66 * experts * 2 + int4
    assert found["bf16"].token_cache_bytes == 27 * (512 + 64) * 2


def test_totals_of_pico() -> None:
    found = formats(plan("pico"))
    assert found["fp8"].disk_bytes == 11_798_688
    biases = 3 * 16  # stay F32
    assert found["bf16"].disk_bytes == 2 * (10_452_992 + 671_360) + 4 * biases
    assert found["fp8"].token_cache_bytes == 3 * (96 + 64) * 2


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3.2", "moonlight", "pico"])
def test_a_layer_stands_for_all_of_its_kind(name: str) -> None:
    arch = Architecture.from_config(manifests.load(name).config)
    weights = weigh(arch)
    assert weights == weigh(arch, alike=False)
    assert weights.size_bytes(mtp=True) == totals(blueprint(arch).values()).size_bytes


def test_int4_counts_alike_too() -> None:
    int4 = forms_of(read_source("deepseek-v2-lite"))[-1]
    assert weigh(int4.arch) == weigh(int4.arch, alike=False)


@pytest.mark.parametrize("name", manifests.names())
def test_every_manifest(name: str) -> None:
    expected = manifests.load(name).expected
    found = plan(name, Machine(8, 141_000_000_000))
    assert expected is not None
    assert expected.size_bytes in {item.disk_bytes for item in found.formats}
    assert all(item.placement is not None or item.problems for item in found.formats)
    assert json.loads(json.dumps(found.to_json()))["model"] == name
    before_notes, _, notes = found.render().partition("Assumed: ")
    assert notes
    assert max(map(len, before_notes.split("\n"))) <= 100


# One rank


def rank_bytes(model: Tiny, n: int, *, whole_experts: bool) -> int:
    """Bytes on a rank, from names and shapes that stand in tests/tiny.py and the table of the checkpoint's page."""
    rows = ("q_b_proj", "q_proj", "kv_b_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    columns = ("o_proj", "down_proj")
    total = 0
    for name, (dtype, shape) in model.tensors().items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= model.layers:
            continue
        size = SIZES[dtype]
        for length in shape:
            size *= length
        module, leaf = name.split(".")[-2:]
        if ".experts." in name and whole_experts:
            total += size // n
        elif module in rows:
            total += size if leaf == "g_idx" else size // n
        elif module in columns:
            total += size // n
        else:
            total += size
    return total


def test_a_rank_of_v3_in_fp8() -> None:
    found = formats(plan("deepseek-v3", Machine(16)))["fp8"]
    assert found.placements["cut"].weight_bytes == rank_bytes(FULL, 16, whole_experts=False)
    assert found.placements["whole"].weight_bytes == rank_bytes(FULL, 16, whole_experts=True)


def test_a_rank_of_v3_in_bf16_and_int4(v3: SizingPlan) -> None:
    found = formats(v3)
    bf16, int4 = replace(FULL, fp8=False), replace(FULL, fp8=False, gptq=Gptq(group_size=128))
    assert found["bf16"].placements["cut"].weight_bytes == rank_bytes(bf16, 8, whole_experts=False)
    assert found["int4"].placements["cut"].weight_bytes == rank_bytes(int4, 8, whole_experts=False)
    assert found["int4"].placements["whole"].weight_bytes == rank_bytes(int4, 8, whole_experts=True)


def test_parts_of_a_rank_by_hand(v3: SizingPlan) -> None:
    place = formats(v3)["bf16"].placement
    assert place is not None
    assert place.experts == "cut"
    assert place.parts["embedding"] == place.parts["head"] == 129280 * 7168 * 2 // 8
    attention = 1536 * 7168 + 576 * 7168 + 1536 + 512 + (128 * 192 * 1536 + 128 * 256 * 512 + 7168 * 128 * 128) // 8
    assert place.parts["attention"] == 61 * attention * 2
    assert place.parts["dense"] == 3 * 3 * 7168 * 18432 * 2 // 8
    assert place.parts["shared"] == 58 * 3 * 7168 * 2048 * 2 // 8
    assert place.parts["routed"] == 256 * place.parts["shared"]
    assert place.parts["rest"] == 58 * 256 * (7168 * 2 + 4) + (2 * 61 + 1) * 7168 * 2
    assert "mtp" not in place.parts


def test_experts_that_do_not_divide_go_to_the_first_ranks() -> None:
    """61 experts on 4 GPUs: 16 on the first."""
    config = {**manifests.load("moonlight").config, "n_routed_experts": 61, "n_group": 1, "topk_group": 1}
    weights = weigh(Architecture.from_config(config))
    assert weights.on_rank(4, whole_experts=True, mtp=False)["routed"] == weights.parts["routed"].experts // 61 * 16


def test_the_cache_is_whole_on_every_rank(v3: SizingPlan) -> None:
    for item in v3.formats:
        assert item.token_cache_bytes == 61 * 576 * 2 == 70_272
        assert item.placement is not None
        assert item.placement.kv_cache_bytes == 4096 * 70_272
    more = formats(plan("deepseek-v3", Machine(16), Load(context=10_000, batch=3)))["fp8"].placement
    assert more is not None
    assert more.kv_cache_bytes == 30_000 * 70_272


def test_an_indexer_keeps_keys_too() -> None:
    found = plan("deepseek-v3.2").formats[0]
    assert found.token_cache_bytes == 61 * (576 * 2 + 128 + 4)


def test_mtp_layers_where_they_are_loaded() -> None:
    found = formats(plan("deepseek-v3", load=Load(mtp=True)))["bf16"]
    assert found.loaded_bytes == found.disk_bytes
    assert found.token_cache_bytes == 62 * 576 * 2
    assert found.placement is not None
    whole = 2 * (1536 + 576) * 7168 + 2 * (1536 + 512) + 2 * 256 * 7168 + 4 * 256 + 2 * 2 * 7168
    own = 2 * 3 * 7168 + 2 * 7168 * 2 * 7168
    assert (found.placement.parts["mtp"] - whole - own) * 8 + whole + own == found.disk_bytes - found.main_bytes


def test_kv_b_is_kept_twice_where_it_is_quantized(v3: SizingPlan) -> None:
    kept = {item.name: item.placement.absorbed_bytes for item in v3.formats if item.placement is not None}
    assert kept == {"fp8": 61 * 128 * 256 * 512 * 2 // 8, "bf16": 0, "int4": 0}


def test_activations_by_hand(v3: SizingPlan) -> None:
    place = formats(v3)["fp8"].placements
    logits = 129280 * 4
    cut = 4096 * 2 * (2 * 7168 + 8 * (3 * 256 + 7168)) + logits
    whole = 4096 * 2 * (2 * 7168 + 8 * (3 * 2048 + 7168)) + logits
    assert place["cut"].activation_bytes == cut
    assert place["whole"].activation_bytes == whole
    many = formats(plan("deepseek-v3", load=Load(context=100_000, batch=2)))["fp8"].placements["cut"]
    assert many.activation_bytes == 2 * (cut - logits) + 2 * logits  # 8,192 tokens at once, not 200,000
    one = formats(plan("deepseek-v3", Machine(1), Load(context=100_000)))["fp8"].placements["cut"]
    attention = 1536 + 512 + 64 + 128 * 2 * (192 + 128)
    assert attention < 3 * 18432 + 8 * 3 * 2048  # dense and experts are wider here, attention on no number of GPUs
    assert one.activation_bytes == 8192 * 2 * (2 * 7168 + 8 * (3 * 2048 + 7168)) + logits


# Fits


def test_what_fits_on_eight_of_96_gib(v3: SizingPlan) -> None:
    assert {item.name: item.fits for item in v3.formats} == {"fp8": True, "bf16": False, "int4": True}
    fewest = {item.name: item.smallest.gpus for item in v3.formats if item.smallest is not None}
    assert fewest == {"fp8": 8, "bf16": 16, "int4": 8}
    for item in v3.formats:
        assert item.placement is not None
        assert item.left_bytes == int(96 * GIB * 0.9) - item.placement.needed_bytes
    tokens = formats(v3)["fp8"].cache_tokens
    assert tokens is not None
    roomy = formats(plan("deepseek-v3", Machine(8, 96 * GIB), Load(context=tokens // 2, batch=2)))["fp8"]
    assert roomy.cache_tokens is not None
    assert roomy.cache_tokens < tokens  # only activations have grown: 8,192 tokens at once


def test_exactly_enough_is_enough() -> None:
    needed = formats(plan("pico", Machine(1, GIB)))["bf16"].placement
    assert needed is not None
    for less, fits in ((0, True), (1, False)):
        found = plan("pico", Machine(1, needed.needed_bytes - less, utilization=1.0), formats=["bf16"])
        assert found.formats[0].fits is fits
        assert found.formats[0].smallest is not None
        assert (found.formats[0].smallest.gpus == 1) is fits


def test_without_gpu_memory_there_is_no_verdict() -> None:
    found = plan("deepseek-v3").formats[0]
    assert found.fits is found.left_bytes is found.cache_tokens is found.smallest is None
    assert found.placement is not None
    assert "fp8   needs 80.4 GiB (86.3 GB) of each GPU" in plan("deepseek-v3").render()


def test_pain_15_groups_against_the_degree() -> None:
    """V2-Lite's experts are 11 groups of 128 wide: no two GPUs can cut them, but each can have half of them whole."""
    found = formats(plan("deepseek-v2-lite", Machine(2, 24 * GIB)))["int4"]
    assert found.legal == {"cut": (1,), "whole": (1, 2)}
    assert found.placement is not None
    assert found.placement.experts == "whole"
    assert found.smaller_groups == 64
    four = formats(plan("deepseek-v2-lite", Machine(4, 24 * GIB)))["int4"]
    assert four.placement is None
    assert four.fits is False
    assert four.smaller_groups is None
    assert LITE_INT4_PROBLEM in four.problems["cut"][0]
    narrow = formats(plan("deepseek-v2-lite", Machine(2), group_size=64))["int4"]
    assert narrow.legal["cut"] == (1, 2)
    assert narrow.command == "weightkit quantize --group-size 64"


def test_degrees_of_v3(v3: SizingPlan) -> None:
    sixteen = (1, 2, 4, 8, 16)
    assert {item.name: item.legal["cut"] for item in v3.formats} == {
        "fp8": sixteen,
        "bf16": (*sixteen, 32, 64, 128),
        "int4": sixteen,
    }


def test_blocks_of_cut_experts() -> None:
    """1536 columns over 8 GPUs are 192 each, no whole blocks: vLLM and SGLang refuse, and ask for whole experts."""
    config = {**manifests.load("deepseek-v3").config, "moe_intermediate_size": 1536, "n_shared_experts": 0}
    arch = Architecture.from_config(config)
    assert [problem.where for problem in tp_problems(arch, 8)] == ["model.layers.3.mlp.experts.0.down_proj.weight"]
    assert "(in scale blocks)" in str(tp_problems(arch, 8)[0])
    assert tp_problems(arch, 8, whole_experts=True) == []
    assert legal_tp(arch) == (1, 2, 4)
    few = Architecture.from_config(
        {**config, "n_routed_experts": 4, "n_group": 1, "topk_group": 1} | {"num_experts_per_tok": 2}
    )
    assert [problem.where for problem in tp_problems(few, 8, whole_experts=True)] == ["n_routed_experts"]


def test_what_engines_do_not_take() -> None:
    found = formats(plan("deepseek-v3", group_size=256))
    assert found["int4"].obstacles == {"vLLM": ("groups of 256: Marlin has -1, 32, 64, 128",)}
    assert found["fp8"].obstacles == {}
    everything = replace(FULL, fp8=False, gptq=Gptq(group_size=128, sym=False, everything=True))
    arch = Architecture.from_config(everything.config())
    assert obstacles(arch, "vLLM") == ("asymmetric zero points, which Marlin's MoE does not read",)
    assert "quantized attention" in obstacles(arch, "SGLang")[0]
    assert "latent of 512 + 64, not 96 + 64" in formats(plan("pico"))["bf16"].obstacles["vLLM"][0]


# Routes


def test_routes_of_v3(v3: SizingPlan) -> None:
    found = {route.command: route for route in v3.routes}
    disk, main, bf16, int4 = 688_574_839_360, 673_150_611_808, 1_342_052_868_096, 371_156_639_744
    assert list(found) == [
        "fetch",
        "strip",
        "cast --to bf16 --no-mtp",
        "quantize --no-mtp",
        "shard --mp 8",
        "shard --mp 8 --to bf16",
    ]
    assert (found["fetch"].disk_bytes, found["fetch"].wall_s) == (disk, disk / 1e8)
    assert (found["strip"].reads_bytes, found["strip"].writes_bytes) == (main, main)
    cast = found["cast --to bf16 --no-mtp"]
    assert (cast.disk_bytes, cast.wall_s) == (disk + bf16, (main + bf16) / 2e9)
    quantize = found["quantize --no-mtp"]
    assert quantize.disk_bytes == disk + int4 + 2 * 512 * 4096 * 7168 * 2
    assert quantize.wall_s == pytest.approx(58 * MOE_LAYER_S)
    assert (quantize.bound_by, quantize.projected) == ("computing", True)


def test_speeds_and_degrees_of_routes() -> None:
    found = {r.command: r for r in plan("deepseek-v3", Machine(12, disk_speed=10**8, network_speed=10**10)).routes}
    assert (found["fetch"].bound_by, found["fetch"].wall_s) == ("disk", 688_574_839_360 / 1e8)
    assert found["quantize --no-mtp"].bound_by == "disk"
    assert "shard --mp 8" in found  # the most that is legal and not more than 12
    bf16 = {route.command: route for route in plan("deepseek-v2-lite", Machine(16)).routes}
    assert list(bf16) == ["fetch", "quantize", "shard --mp 16"]


def test_quantization_grows_with_experts_and_width() -> None:
    config = dict(manifests.load("deepseek-v3").config)
    whole = quantization_s(Architecture.from_config(config))
    half = quantization_s(Architecture.from_config({**config, "moe_intermediate_size": 1024}))
    assert (whole, half) == (pytest.approx(58 * MOE_LAYER_S), pytest.approx(29 * MOE_LAYER_S))


def test_a_shards_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    write_tiny(tmp_path / "fp8")
    wk.write(wk.shard(wk.strip_mtp(wk.open_checkpoint(tmp_path / "fp8")), mp=4), tmp_path / "mp4", progress=False)
    written = sum(
        len(content)
        for file in (tmp_path / "mp4").glob("*.safetensors")
        for _, _, content in read_safetensors(file).values()
    )
    found = {r.command: r for r in plan(tmp_path / "fp8", Machine(4), Load(context=512)).routes}
    assert found["shard --mp 4"].writes_bytes == written


def test_one_token_streamed(v3: SizingPlan) -> None:
    found = formats(v3)["bf16"]
    assert found.routed_token_bytes == 58 * 8 * 3 * 7168 * 2048 * 2
    assert found.streamed_token_s == found.routed_token_bytes / 2e9
    routed = 58 * 256 * 3 * 7168 * 2048 * 2
    assert found.resident_bytes == 1_342_052_868_096 - routed - 129280 * 7168 * 2


# Checkpoints on disk


@pytest.mark.parametrize(
    ("model", "names"),
    [(V3, {"fp8", "bf16", "int4"}), (V2_LITE, {"bf16", "int4"}), (V3_INT4, {"bf16", "int4"})],
    ids=["fp8", "bf16", "int4"],
)
def test_a_checkpoint_on_disk(tmp_path: Path, model: Tiny, names: set[str]) -> None:
    write_tiny(tmp_path / "model", model)
    stored = sum(
        len(content)
        for file in (tmp_path / "model").glob("*.safetensors")
        for _, _, content in read_safetensors(file).values()
    )
    found = plan(tmp_path / "model", Machine(1), Load(context=512), group_size=16)
    own = next(item for item in found.formats if not item.command)
    assert own.disk_bytes == stored
    assert {item.name for item in found.formats} <= names
    assert names <= {item.name for item in found.formats} | set(found.missing)
    assert all(not route.command.startswith("fetch") for route in found.routes)
    assert any(route.command.startswith("quantize") for route in found.routes) is (
        model.gptq is None and "int4" not in found.missing
    )


def test_rank_files_have_no_mtp_layers(tmp_path: Path) -> None:
    write_tiny(tmp_path / "fp8")
    wk.write(wk.shard(wk.strip_mtp(wk.open_checkpoint(tmp_path / "fp8")), mp=2), tmp_path / "mp2", progress=False)
    published = json.loads((tmp_path / "fp8/config.json").read_text())
    found = plan(tmp_path / "mp2", load=Load(context=512), config=published).formats[0]
    assert found.disk_bytes == found.main_bytes
    assert found.main_bytes == plan(tmp_path / "fp8", load=Load(context=512)).formats[0].main_bytes


# What cannot be


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: plan("deepseek-v4-maybe"), NotACheckpointError, "no such path, and no known model"),
        (lambda: Machine(gpus=0), PlanError, "--gpus: nothing can be planned with that: expected at least 1, found 0"),
        (lambda: Machine(gpu_memory=0), PlanError, "--gpu-memory"),
        (lambda: Machine(utilization=1.5), PlanError, "--gpu-memory-utilization"),
        (lambda: Machine(disk_speed=0), PlanError, "--disk-speed"),
        (lambda: Machine(gpus=0, network_speed=0), WeightkitError, "2 problems"),
        (lambda: Load(context=0), PlanError, "--context"),
        (lambda: plan("deepseek-v3", load=Load(context=163_841)), PlanError, "at most 163,840"),
        (lambda: plan("deepseek-v2-lite", formats=["fp8"]), PlanError, "expected bf16, int4"),
        (lambda: plan("pico", formats=["int4"], group_size=100), PlanError, "groups of 100 do not divide"),
    ],
)
def test_what_cannot_be_planned(call: Any, error: type[WeightkitError], says: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value)


def test_memory_that_is_too_little_for_anything() -> None:
    with pytest.raises(SpaceError) as caught:
        plan("deepseek-v3", Machine(8, GIB))
    found = re.search(r"expected ([\d.]+) GiB at least, on (\d+) GPUs in (\w+), found 1.0 GiB", str(caught.value))
    assert found is not None
    assert found.groups()[1:] == ("128", "bf16")
    enough = plan("deepseek-v3", Machine(128, int((float(found[1]) + 0.06) * GIB)))
    assert formats(enough)["bf16"].fits
    with pytest.raises(SpaceError):
        plan("deepseek-v3", Machine(128, int((float(found[1]) - 0.06) * GIB)))


# The command


def test_the_command_answers_first() -> None:
    done = CliRunner().invoke(group, ["plan", "--gpus", "8", "--gpu-memory", "96GiB"])
    assert done.exit_code == 0, done.output
    assert done.output.split("\n")[:6] == [
        "deepseek-v3 (DeepSeek-V3 family) on 8 GPUs of 96.0 GiB (103.1 GB), 90% of it usable",
        "for 1 sequence of 4,096 tokens (context 163,840), MTP layers not loaded",
        "",
        "fp8   fits: 6.0 GiB (6.4 GB) left of each GPU, 95,874 tokens of cache",
        "bf16  does not fit: 72.4 GiB (77.7 GB) too much for each GPU; fewest GPUs: 16",
        "int4  fits: 40.0 GiB (42.9 GB) left of each GPU, 614,563 tokens of cache",
    ]
    for figure in ("641.3 GiB (688.6 GB)", "1,249.9 GiB (1,342.1 GB)", "345.7 GiB (371.2 GB)", "disk 2.0 GB/s"):
        assert figure in done.output


def test_the_command_in_json() -> None:
    arguments = ["plan", "--model", "deepseek-v3", "--json", "--format", "int4", "--disk-speed", "1GB/s", "--gpus", "4"]
    done = CliRunner().invoke(group, [*arguments, "--gpu-memory", "141GB"])
    found = json.loads(done.output)
    (int4,) = found["formats"]
    assert (int4["main_bytes"], int4["fits"], int4["smallest"]["gpus"]) == (371_156_639_744, True, 4)
    assert int4["placements"]["cut"]["needed_bytes"] + int4["left_bytes"] == int(141e9 * 0.9)
    assert found["routes"][1]["wall_s"] == 2 * 673_150_611_808 / 1e9


def test_the_command_takes_a_path(tmp_path: Path) -> None:
    write_tiny(tmp_path / "mine")
    done = CliRunner().invoke(group, ["plan", str(tmp_path / "mine"), "--context", "128"])
    assert done.output.startswith("mine (DeepSeek-V3 family) on 8 GPUs\n")


@pytest.mark.parametrize("arguments", [["--gpus", "0"], ["--gpu-memory", "lots"], ["--disk-speed", "fast/s"]])
def test_the_command_refuses_what_is_no_number(arguments: list[str]) -> None:
    assert CliRunner().invoke(group, ["plan", *arguments]).exit_code == 2
