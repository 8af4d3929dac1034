"""To ranks and back: the files are what the table of split dimensions says, and merged they are the source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import plain_reference
import pytest
from folders import INDEX, Contents, metadata, read_config, read_published, read_safetensors, tree, without
from tiny import KIMI, MOONLIGHT, V2_LITE, V3, V3_BF16, V31, Tiny, write_tiny

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.layouts import FileSet

MODELS = {"V3": V3, "V3.1": V31, "V3-BF16": V3_BF16, "V2-Lite": V2_LITE, "Moonlight": MOONLIGHT, "Kimi-K2": KIMI}
#: By hand: in FP8 each rank needs whole blocks, of 512 rows of the MLPs and 512 (Kimi-K2: 256) columns of o_proj.
LEGAL = {
    "V3": (1, 2, 4),
    "V3.1": (1, 2, 4),
    "V3-BF16": (1, 2, 4, 8),
    "V2-Lite": (1, 2, 4, 8),
    "Moonlight": (1, 2, 4, 8),
    "Kimi-K2": (1, 2),
}
CASES = [(name, mp) for name, degrees in LEGAL.items() for mp in degrees]

#: Component to its name in rank files and the dimension that is split.
RENAMED = {
    "embed_tokens": ("embed", 0),
    "lm_head": ("head", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "gate": ("gate", None),
    "norm": ("norm", None),
    "self_attn": ("attn", None),
    "mlp": ("ffn", None),
    "weight_scale_inv": ("scale", None),
    "e_score_correction_bias": ("bias", None),
}
ITEMSIZE = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}


def on_rank(contents: Contents, rank: int, mp: int, experts: int) -> Contents:
    """What a rank's file holds of the published tensors, MTP layers and inv_freq left out already."""
    found: Contents = {}
    for name, (dtype, shape, data) in contents.items():
        parts = name.removeprefix("model.").split(".")
        renamed = ".".join(RENAMED.get(part, (part, None))[0] for part in parts)
        dim = RENAMED.get(parts[-2], (None, None))[1]
        if "experts" in parts:
            if int(parts[parts.index("experts") + 1]) * mp // experts == rank:
                found[renamed] = (dtype, shape, data)
            continue
        if dim is not None:
            array = np.frombuffer(data, f"V{ITEMSIZE[dtype]}").reshape(shape)
            part = np.split(array, mp, dim)[rank]
            shape, data = part.shape, part.tobytes()
        found[renamed] = (dtype, shape, data)
    return found


def write(what: Checkpoint | FileSet, target: Path) -> Path:
    wk.write(what, target, device="cpu", progress=False)
    return target


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Contents]]:
    """By model: the published checkpoint, and what of it goes into rank files."""
    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for name, model in MODELS.items():
        contents = write_tiny(folder / name, model)
        found[name] = (folder / name, without(contents, f"layers.{model.layers}.", "inv_freq"))
    return found


@pytest.mark.parametrize(("name", "mp"), CASES)
def test_ranks_hold_what_they_should_and_merge_to_the_source(
    name: str, mp: int, sources: dict[str, tuple[Path, Contents]], tmp_path: Path
) -> None:
    folder, contents = sources[name]
    ranks = write(wk.shard(wk.open_checkpoint(folder), mp=mp), tmp_path / "ranks")
    names = [f"model{rank}-mp{mp}.safetensors" for rank in range(mp)]
    assert sorted(path.name for path in ranks.glob("*.safetensors")) == sorted(names)
    for rank, file in enumerate(names):
        assert read_safetensors(ranks / file) == on_rank(contents, rank, mp, MODELS[name].experts)
        assert metadata(ranks / file) == {"format": "pt"}
    assert not (ranks / INDEX).exists()
    merged = write(wk.merge(wk.open_checkpoint(ranks)), tmp_path / "merged")
    assert read_published(merged) == contents
    assert read_config(merged) == read_config(ranks)
    declared = {"num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in MODELS[name].config() else {}
    assert read_config(merged) == MODELS[name].config() | declared


@pytest.mark.parametrize("ep", [1, 2, 3, 5, 7, 8])
def test_expert_ranks(ep: int, sources: dict[str, tuple[Path, Contents]], tmp_path: Path) -> None:
    folder, contents = sources["V3"]
    ranks = write(wk.shard(wk.open_checkpoint(folder), ep=ep), tmp_path / "ranks")
    whole = on_rank(contents, 0, 1, 8)
    held: list[list[int]] = []
    for rank in range(ep):
        tensors = read_safetensors(ranks / f"model{rank}-ep{ep}.safetensors")
        assert all(tensors[key] == whole[key] for key in tensors)
        experts = {int(key.split(".")[4]) for key in tensors if ".experts." in key}
        assert without(tensors, ".experts.") == without(whole, ".experts.")
        held.append(sorted(experts))
    assert [expert for experts in held for expert in experts] == list(range(8))
    sizes = [len(experts) for experts in held]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    merged = write(wk.merge(wk.open_checkpoint(ranks)), tmp_path / "merged")
    assert read_published(merged) == contents


@pytest.mark.parametrize(("first", "second"), [({"mp": 4}, {"mp": 2}), ({"mp": 2}, {"mp": 4}), ({"ep": 3}, {"mp": 4})])
def test_ranks_of_ranks_are_the_ranks_of_the_source(
    first: dict[str, int], second: dict[str, int], sources: dict[str, tuple[Path, Contents]], tmp_path: Path
) -> None:
    folder, _ = sources["V3"]
    checkpoint = wk.open_checkpoint(folder)
    between = write(wk.shard(checkpoint, **first), tmp_path / "between")
    again = tree(write(wk.shard(wk.open_checkpoint(between), **second), tmp_path / "again"))
    direct = tree(write(wk.shard(checkpoint, **second), tmp_path / "direct"))
    locks = [json.loads(found.pop("weightkit.lock.json"))["files"] for found in (again, direct)]
    contents = [
        {file: read_safetensors(tmp_path / which / file) for file in found if file.endswith(".safetensors")}
        for which, found in (("again", again), ("direct", direct))
    ]
    assert contents[0] == contents[1]
    assert set(locks[0]) == set(locks[1])
    small = [
        {file: data for file, data in found.items() if not file.endswith(".safetensors")} for found in (again, direct)
    ]
    assert small[0] == small[1]


def test_resharded_files_are_byte_for_byte_the_same(sources: dict[str, tuple[Path, Contents]], tmp_path: Path) -> None:
    """Tensors come in the order in which the source is best read; from ranks that is the blueprint's, at any degree."""
    checkpoint = wk.open_checkpoint(sources["V3"][0])
    results = []
    for mp in (1, 2, 4):
        between = write(wk.shard(checkpoint, mp=mp), tmp_path / f"from{mp}")
        found = tree(write(wk.shard(wk.open_checkpoint(between), mp=2), tmp_path / f"to{mp}"))
        del found["weightkit.lock.json"]
        results.append(found)
    assert results[0] == results[1] == results[2]


def test_what_goes_with_ranks(sources: dict[str, tuple[Path, Contents]], tmp_path: Path) -> None:
    folder, _ = sources["V3.1"]
    ranks = write(wk.shard(wk.open_checkpoint(folder), mp=2), tmp_path / "ranks")
    assert {path.name for path in ranks.iterdir() if path.suffix != ".safetensors"} == {
        "chat_template.jinja",
        "config.json",
        "demo_config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "weightkit.lock.json",
    }
    demo = json.loads((ranks / "demo_config.json").read_text())
    assert (demo["dtype"], demo["scale_fmt"], demo["n_routed_experts"]) == ("fp8", "ue8m0", 8)
    # a merge leaves the demo's JSON out again
    merged = write(wk.merge(wk.open_checkpoint(ranks)), tmp_path / "merged")
    assert not (merged / "demo_config.json").exists()


@pytest.mark.parametrize(
    "model", [V3, replace(V3, intermediate=320, moe=96), replace(V3, heads=8, v=24)], ids=["whole", "MLPs", "o_proj"]
)
def test_fp8_to_bf16_ranks_that_cut_blocks(model: Tiny, tmp_path: Path) -> None:
    """8 ranks: 64 of 512 rows and fewer each, which begin within blocks of the FP8 source."""
    contents = without(write_tiny(tmp_path / "v3", model), "layers.3.")
    bf16: Contents = {}
    for name, (dtype, shape, data) in contents.items():
        if dtype == "F8_E4M3":
            scale_shape, scale = contents[f"{name}_scale_inv"][1:]
            codes = np.frombuffer(data, np.uint8).reshape(shape)
            scales = np.frombuffer(scale, np.float32).reshape(scale_shape)
            bf16[name] = ("BF16", shape, plain_reference.dequantized(codes, scales, "BF16"))
        elif not name.endswith("_scale_inv"):
            bf16[name] = (dtype, shape, data)
    checkpoint = wk.open_checkpoint(tmp_path / "v3")
    ranks = write(wk.shard(wk.cast(checkpoint, "bf16"), mp=8), tmp_path / "ranks")
    for rank in range(8):
        assert read_safetensors(ranks / f"model{rank}-mp8.safetensors") == on_rank(bf16, rank, 8, 8)
    assert json.loads((ranks / "demo_config.json").read_text())["dtype"] == "bf16"
    merged = write(wk.merge(wk.open_checkpoint(ranks)), tmp_path / "merged")
    assert read_published(merged) == bf16
    assert "quantization_config" not in read_config(merged)


def test_ranks_cast_on_the_way_are_the_ranks_of_the_cast(
    sources: dict[str, tuple[Path, Contents]], tmp_path: Path
) -> None:
    """FP8 ranks to BF16 ranks of another degree, in one pass: a concat of dequantized parts, cut anew."""
    folder, _ = sources["V3"]
    checkpoint = wk.open_checkpoint(folder)
    fp8 = write(wk.shard(checkpoint, mp=4), tmp_path / "fp8")
    once = write(wk.shard(wk.cast(wk.open_checkpoint(fp8), "bf16"), mp=8), tmp_path / "once")
    bf16 = write(wk.cast(checkpoint, "bf16"), tmp_path / "bf16")
    twice = write(wk.shard(wk.open_checkpoint(bf16), mp=8), tmp_path / "twice")
    for rank in range(8):
        file = f"model{rank}-mp8.safetensors"
        assert read_safetensors(once / file) == read_safetensors(twice / file)


def test_a_merge_of_the_published_layout_keeps_its_shards(
    sources: dict[str, tuple[Path, Contents]], tmp_path: Path
) -> None:
    folder, _ = sources["V3"]
    merged = write(wk.merge(wk.open_checkpoint(folder)), tmp_path / "merged")
    assert {path.name for path in merged.glob("*.safetensors")} == {path.name for path in folder.glob("*.safetensors")}
    assert read_published(merged) == read_published(folder)


def test_a_merge_packs_into_shards(sources: dict[str, tuple[Path, Contents]], tmp_path: Path) -> None:
    folder, contents = sources["V3"]
    ranks = write(wk.shard(wk.open_checkpoint(folder), mp=2), tmp_path / "ranks")
    merged = write(wk.merge(wk.open_checkpoint(ranks), shard_bytes=500_000), tmp_path / "merged")
    assert len(list(merged.glob("model-*-of-*.safetensors"))) > 3
    assert read_published(merged) == contents
