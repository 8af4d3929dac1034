"""GPTQ checkpoints through every transform: bits equal an independent computation, and what is declared stays true."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plain_reference
import pytest
from folders import INDEX, Contents, read_config, read_published, read_safetensors, tree, without
from tiny import V3, V3_INT4, Gptq, Tiny, gptq_weight, write_safetensors, write_tiny

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.errors import ConfigError, MissingTensorError, PlanError, ScaleError, UnsupportedError, WeightkitError
from weightkit.layouts import FileSet

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
EXPERT = "model.layers.1.mlp.experts.1.up_proj"  # its scales are in another file than the rest
SIDE = "quantize_config.json"
VARIANTS = {
    "int4": Gptq(),
    "a short last group": Gptq(group_size=32),
    "one group": Gptq(group_size=-1),
    "v2": Gptq(checkpoint_format="gptq_v2"),
    "asymmetric": Gptq(sym=False),
    "activation order": Gptq(act_order=True),
    "int8": Gptq(bits=8, group_size=48, sym=False),
    "all layers": Gptq(everything=True, group_size=8),
}


def write(what: Checkpoint | FileSet, target: Path) -> Path:
    wk.write(what, target, device="cpu", progress=False)
    return target


def int4(gptq: Gptq, **changes: Any) -> Tiny:
    return replace(V3_INT4, gptq=gptq, **changes)


def expected(contents: Contents, gptq: Gptq, to: str) -> Contents:
    """By hand: four tensors become a weight, BF16 is widened and rounded, F32 stays."""
    dtype, found = to.upper(), {}
    for name, (stored, shape, data) in contents.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            weight = gptq_weight(contents, module, gptq)
            bits = plain_reference.round_to(weight, dtype)
            found[f"{module}.weight"] = (dtype, weight.shape, bits.tobytes())
        elif stored == "BF16":
            found[name] = (dtype, shape, plain_reference.round_to(plain_reference.widen(data, "BF16"), dtype).tobytes())
        elif leaf not in LEAVES:
            found[name] = (stored, shape, data)
    return found


# Cast


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_of_a_cast(variant: str, tmp_path: Path) -> None:
    model = int4(VARIANTS[variant])
    contents = write_tiny(tmp_path / "int4", model)
    result = write(wk.cast(wk.open_checkpoint(tmp_path / "int4"), "bf16"), tmp_path / "cast")
    wanted = expected(contents, VARIANTS[variant], "bf16")
    found = read_published(result)
    for name, tensor in wanted.items():
        assert found.pop(name) == tensor, name
    assert not found
    assert set(wanted) == set(replace(model, gptq=None).tensors())


@pytest.mark.parametrize("to", ["f16", "f32"])
def test_other_dtypes(to: str, tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "int4", V3_INT4)
    result = write(wk.cast(wk.open_checkpoint(tmp_path / "int4"), to), tmp_path / "cast")
    assert read_published(result) == expected(contents, Gptq(), to)


def test_the_config_follows(tmp_path: Path) -> None:
    write_tiny(tmp_path / "int4", V3_INT4)
    checkpoint = wk.cast(wk.open_checkpoint(tmp_path / "int4"), "bf16")
    assert SIDE not in checkpoint.side_files
    result = write(checkpoint, tmp_path / "cast")
    assert read_config(result) == replace(V3, fp8=False).config()
    assert not (result / SIDE).exists()
    assert (result / "chat_template.jinja").exists()
    assert wk.verify(result, progress=False).ok


def test_the_four_may_lie_in_different_files(tmp_path: Path) -> None:
    write_tiny(tmp_path, V3_INT4)
    places = wk.open_checkpoint(tmp_path).placement
    assert places[f"{EXPERT}.scales"] != places[f"{EXPERT}.qweight"]


def edited(folder: Path, change: Callable[[Contents], object]) -> Checkpoint:
    weight_map: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_safetensors(path)
        change(tensors)
        write_safetensors(path, tensors)
        weight_map |= dict.fromkeys(tensors, path.name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return wk.open_checkpoint(folder)


@pytest.mark.parametrize("leaf", ["qzeros", "scales", "g_idx"])
def test_a_weight_that_lacks_a_part(leaf: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, V3_INT4)
    checkpoint = edited(tmp_path, lambda tensors: tensors.pop(f"{EXPERT}.{leaf}", None))
    with pytest.raises(ScaleError) as caught:
        wk.cast(checkpoint, "bf16")
    text = str(caught.value)
    assert text.startswith(f"{EXPERT}.qweight: a GPTQ weight that lacks a part: expected {EXPERT}.{leaf}")
    for transform in (wk.strip_mtp, lambda c: wk.shard(c, mp=2), lambda c: wk.keep_experts(c, 4)):
        with pytest.raises(MissingTensorError, match=f"{EXPERT}.{leaf}".replace(".", r"\.")):
            transform(checkpoint)


def test_parts_without_their_weight(tmp_path: Path) -> None:
    write_tiny(tmp_path, V3_INT4)
    checkpoint = edited(tmp_path, lambda tensors: tensors.pop(f"{EXPERT}.qweight", None))
    with pytest.raises(WeightkitError) as caught:
        wk.cast(checkpoint, "bf16")
    assert "3 times: a part of a GPTQ weight without its codes" in str(caught.value)
    for leaf in ("qzeros", "scales", "g_idx"):
        assert f"{EXPERT}.{leaf}: expected {EXPERT}.qweight" in str(caught.value)


@pytest.mark.parametrize(("leaf", "dtype"), [("scales", "BF16"), ("qzeros", "F32"), ("g_idx", "F32")])
def test_a_part_of_another_dtype(leaf: str, dtype: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, V3_INT4)
    name = f"{EXPERT}.{leaf}"
    checkpoint = edited(
        tmp_path, lambda tensors: tensors.update({name: (dtype, *tensors[name][1:])}) if name in tensors else None
    )
    with pytest.raises(ScaleError, match=EXPERT.replace(".", r"\.")):
        wk.cast(checkpoint, "bf16")


def test_codes_that_the_config_does_not_declare(tmp_path: Path) -> None:
    write_tiny(tmp_path, V3_INT4)
    (tmp_path / "config.json").write_text(json.dumps(replace(V3, fp8=False).config()))
    with pytest.raises(WeightkitError, match="no cast is defined for this dtype"):
        wk.cast(wk.open_checkpoint(tmp_path), "bf16")


@pytest.mark.parametrize("change", [{"bits": 3}, {"dynamic": {"+:.*experts.*": {"bits": 8}}}])
def test_variants_that_are_not_read(change: dict[str, object], tmp_path: Path) -> None:
    config = V3_INT4.config()
    quantization = {**Gptq().config(V3_INT4), **change}
    write_tiny(tmp_path, V3_INT4)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(UnsupportedError):
        wk.cast(wk.open_checkpoint(tmp_path), "bf16")


# Strip, copy, experts


def test_strip(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "int4", V3_INT4)
    result = write(wk.strip_mtp(wk.open_checkpoint(tmp_path / "int4")), tmp_path / "stripped")
    assert read_published(result) == without(contents, "layers.3.")
    declared = read_config(result)
    assert declared == replace(V3_INT4, mtp_layers=0).config()  # the rule about layer 3 is gone
    assert json.loads((result / SIDE).read_text()) == declared["quantization_config"]
    assert wk.verify(result, values=True, progress=False).ok


@pytest.mark.parametrize("present", [True, False])
def test_a_copy_declares_the_same_in_both_files(present: bool, tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "int4", V3_INT4)
    (tmp_path / "int4" / SIDE).unlink()
    if present:
        (tmp_path / "int4" / SIDE).write_text(json.dumps({"bits": 3}))
    result = write(wk.open_checkpoint(tmp_path / "int4"), tmp_path / "copy")
    assert read_published(result) == contents
    assert read_config(result) == V3_INT4.config()
    assert json.loads((result / SIDE).read_text()) == V3_INT4.config()["quantization_config"]


def test_a_declaration_that_another_tool_left_stale(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "bf16", replace(V3, fp8=False))
    (tmp_path / "bf16/config.json").write_text(json.dumps(V3_INT4.config()))
    (tmp_path / "bf16" / SIDE).write_text(json.dumps(Gptq().config(V3_INT4)))
    result = write(wk.open_checkpoint(tmp_path / "bf16"), tmp_path / "out")
    assert read_published(result) == contents
    assert read_config(result) == replace(V3, fp8=False).config()
    assert not (result / SIDE).exists()


def test_fewer_experts(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "int4", V3_INT4)
    kept = {1: [0, 3, 4, 7], 2: [1, 2, 5, 6], 3: [0, 1, 4, 5]}
    result = write(wk.keep_experts(wk.open_checkpoint(tmp_path / "int4"), 4, kept=kept), tmp_path / "four")
    found = read_published(result)
    for layer in (1, 2):
        for new, old in enumerate(kept[layer]):
            for leaf in LEAVES:
                module = f"model.layers.{layer}.mlp.experts"
                assert found[f"{module}.{new}.down_proj.{leaf}"] == contents[f"{module}.{old}.down_proj.{leaf}"]
    assert set(found) == set(replace(V3_INT4, experts=4).tensors())
    assert wk.verify(result, progress=False).ok


@pytest.mark.parametrize(("number", "fits"), [(7, False), (0, True)])
def test_rules_that_name_experts(number: int, fits: bool, tmp_path: Path) -> None:
    """Expert 7 of layer 1 is BF16; kept as number 3, the rule about number 7 would no longer say so."""
    model = V3_INT4
    contents = write_tiny(tmp_path / "int4", model)
    module = f"model.layers.1.mlp.experts.{number}"
    bf16 = expected(contents, Gptq(), "bf16")
    config = model.config()
    quantization = Gptq().config(model)
    rules = {**quantization["dynamic"], rf"-:model\.layers\.1\.mlp\.experts\.{number}\..*": {}}  # type: ignore[dict-item]
    config["quantization_config"] = {**quantization, "dynamic": rules}
    (tmp_path / "int4/config.json").write_text(json.dumps(config))

    def change(tensors: Contents) -> None:
        for name in [name for name in tensors if name.startswith(f"{module}.")]:
            del tensors[name]
            weight = f"{name.rpartition('.')[0]}.weight"
            if name.endswith("qweight"):
                tensors[weight] = bf16[weight]

    checkpoint = edited(tmp_path / "int4", change)
    kept = {layer: [0, 3, 4, 7] for layer in (1, 2, 3)}
    if fits:
        found = wk.keep_experts(checkpoint, 4, kept=kept)
        assert f"{module}.up_proj.weight" in found.tensors
    else:
        with pytest.raises(WeightkitError, match="rules of quantization_config do not hold for renumbered experts"):
            wk.keep_experts(checkpoint, 4, kept=kept)


# Ranks


#: Component to its name in rank files, and to the dimension of its four tensors that is split, by hand.
DEMO = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "mlp": "ffn"}
SPLIT = {
    "gate_proj": {"qweight": 1, "qzeros": 1, "scales": 1},
    "up_proj": {"qweight": 1, "qzeros": 1, "scales": 1},
    "down_proj": {"qweight": 0, "qzeros": 0, "scales": 0, "g_idx": 0},
}
NUMPY = {"I32": "<i4", "F16": "<f2"}


def int4_on_rank(contents: Contents, rank: int, mp: int) -> Contents:
    """What a rank's file holds of the quantized tensors."""
    found: Contents = {}
    for name, (dtype, shape, data) in contents.items():
        parts = name.split(".")
        if parts[-1] not in LEAVES:
            continue
        renamed = ".".join(DEMO.get(part, part) for part in parts[1:])
        if "experts" in parts:
            if int(parts[parts.index("experts") + 1]) * mp // 8 == rank:
                found[renamed] = (dtype, shape, data)
            continue
        dim = SPLIT[parts[-2]].get(parts[-1])
        if dim is not None:
            part = np.split(np.frombuffer(data, NUMPY[dtype]).reshape(shape), mp, dim)[rank]
            shape, data = part.shape, part.tobytes()
        found[renamed] = (dtype, shape, data)
    return found


@pytest.mark.parametrize("mp", [1, 2, 4, 8])
def test_ranks_hold_what_they_should_and_merge_to_the_source(mp: int, tmp_path: Path) -> None:
    contents = without(write_tiny(tmp_path / "int4", V3_INT4), "layers.3.")
    ranks = write(wk.shard(wk.open_checkpoint(tmp_path / "int4"), mp=mp), tmp_path / "ranks")
    for rank in range(mp):
        held = read_safetensors(ranks / f"model{rank}-mp{mp}.safetensors")
        assert {name: held[name] for name in held if name.rpartition(".")[2] in LEAVES} == int4_on_rank(
            contents, rank, mp
        )
    last = read_safetensors(ranks / f"model{mp - 1}-mp{mp}.safetensors")["layers.1.ffn.shared_experts.w2.g_idx"]
    assert np.frombuffer(last[2], "<i4")[-1] == 512 // 16 - 1  # the numbers of the whole
    assert json.loads((ranks / SIDE).read_text()) == read_config(ranks)["quantization_config"]
    assert not (ranks / "demo_config.json").exists()
    assert wk.verify(ranks, values=True, progress=False).ok
    merged = write(wk.merge(wk.open_checkpoint(ranks)), tmp_path / "merged")
    assert read_published(merged) == contents
    assert read_config(merged) == replace(V3_INT4, mtp_layers=0).config()


@pytest.mark.parametrize("variant", ["one group", "int8", "v2", "all layers"])
def test_every_legal_degree_of_other_variants(variant: str, tmp_path: Path) -> None:
    model = int4(VARIANTS[variant], mtp_layers=0, intermediate=768, moe=192)
    contents = write_tiny(tmp_path / "int4", model)
    checkpoint = wk.open_checkpoint(tmp_path / "int4")
    legal = wk.inspect(tmp_path / "int4").legal_mp[f"int{VARIANTS[variant].bits}"]
    assert {1, 2}.issubset(legal)
    for mp in legal:
        ranks = write(wk.shard(checkpoint, mp=mp), tmp_path / f"ranks{mp}")
        assert read_published(write(wk.merge(wk.open_checkpoint(ranks)), tmp_path / f"merged{mp}")) == contents


@pytest.mark.parametrize("ep", [3, 8])
@pytest.mark.parametrize("variant", ["int4", "activation order"])
def test_expert_ranks(ep: int, variant: str, tmp_path: Path) -> None:
    contents = without(write_tiny(tmp_path / "int4", int4(VARIANTS[variant])), "layers.3.")
    ranks = write(wk.shard(wk.open_checkpoint(tmp_path / "int4"), ep=ep), tmp_path / "ranks")
    assert wk.verify(ranks, values=True, progress=False).ok
    assert read_published(write(wk.merge(wk.open_checkpoint(ranks)), tmp_path / "merged")) == contents


def test_ranks_of_ranks_are_the_ranks_of_the_source(tmp_path: Path) -> None:
    write_tiny(tmp_path / "int4", V3_INT4)
    checkpoint = wk.open_checkpoint(tmp_path / "int4")
    between = write(wk.shard(checkpoint, mp=8), tmp_path / "between")
    again = tree(write(wk.shard(wk.open_checkpoint(between), mp=2), tmp_path / "again"))
    direct = write(wk.shard(checkpoint, mp=2), tmp_path / "direct")
    for rank in range(2):
        file = f"model{rank}-mp2.safetensors"
        assert read_safetensors(tmp_path / "again" / file) == read_safetensors(direct / file)
    assert again[SIDE] == tree(direct)[SIDE]


@pytest.mark.parametrize("mp", [4, 16])
def test_int4_to_bf16_ranks_in_one_pass(mp: int, tmp_path: Path) -> None:
    """16 ranks cut 8 columns of groups of 16, 8 of a word."""
    model = replace(V3_INT4, experts=16, mtp_layers=0)
    write_tiny(tmp_path / "int4", model)
    checkpoint = wk.open_checkpoint(tmp_path / "int4")
    once = write(wk.shard(wk.cast(checkpoint, "bf16"), mp=mp), tmp_path / "once")
    bf16 = write(wk.cast(checkpoint, "bf16"), tmp_path / "bf16")
    twice = write(wk.shard(wk.open_checkpoint(bf16), mp=mp), tmp_path / "twice")
    for rank in range(mp):
        file = f"model{rank}-mp{mp}.safetensors"
        assert read_safetensors(once / file) == read_safetensors(twice / file)
    assert json.loads((once / "demo_config.json").read_text())["dtype"] == "bf16"
    assert not (once / SIDE).exists()


def test_int4_ranks_cast(tmp_path: Path) -> None:
    contents = without(write_tiny(tmp_path / "int4", V3_INT4), "layers.3.")
    ranks = write(wk.shard(wk.open_checkpoint(tmp_path / "int4"), mp=4), tmp_path / "ranks")
    found = read_published(write(wk.cast(wk.open_checkpoint(ranks), "bf16"), tmp_path / "bf16"))
    assert found == expected(contents, Gptq(), "bf16")


def test_activation_order_forbids_ranks(tmp_path: Path) -> None:
    write_tiny(tmp_path, int4(VARIANTS["activation order"]))
    checkpoint = wk.open_checkpoint(tmp_path)
    with pytest.raises(PlanError, match=r"groups of 16 columns from anywhere \(desc_act\) cannot be split") as caught:
        wk.shard(checkpoint, mp=2)
    assert "Legal --mp for this int4 checkpoint: 1. Use one of them, or add --to bf16." in str(caught.value)


def test_a_model_that_gptq_cannot_hold(tmp_path: Path) -> None:
    write_tiny(tmp_path, replace(V3, fp8=False, moe=132, shared=0))
    config = {**replace(V3, fp8=False, moe=132, shared=0).config(), "quantization_config": Gptq().config(V3)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    add = {"x.qweight": ("I32", (1,), bytes(4))}
    checkpoint = edited(tmp_path, lambda tensors: tensors.update(add) if EXPERT + ".weight" in tensors else None)
    with pytest.raises(ConfigError, match="multiples of 8"):
        wk.strip_mtp(checkpoint)
