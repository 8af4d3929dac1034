"""What ``inspect`` counts, against sums done by hand and against published figures."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
from known import alike
from tiny import MOONLIGHT, V2_LITE, V3, Tiny, write_tiny

import weightkit as wk
from weightkit.errors import NotACheckpointError, UnsupportedError
from weightkit.examine import Inspection

ELEMENT_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def parts(found: Inspection) -> dict[str, int]:
    return {component.name: component.parameters for component in found.components}


def test_deepseek_v3_with_nothing_downloaded() -> None:
    """The published figures: 671 B parameters, 37 B activated, 688,574,839,360 bytes in 91,991 tensors."""
    found = wk.inspect("deepseek-v3")
    assert (found.tensors, found.size_bytes, found.files) == (91_991, 688_574_839_360, 163)
    assert {total.dtype: total.elements for total in found.dtypes} == {
        "F8_E4M3": 680_571_043_840,
        "BF16": 3_918_786_560,
        "F32": 41_555_600,
    }
    assert found.main_parameters == 669_065_609_216 + 1_960_795_136 + 58 * 256
    assert parts(found)["routed"] == 58 * 256 * 3 * 7168 * 2048
    assert parts(found)["embedding"] == parts(found)["head"] == 129_280 * 7168
    assert found.activated_parameters == found.main_parameters - 129_280 * 7168 - 58 * 248 * 3 * 7168 * 2048
    assert found.layers == {"dense": 3, "moe": 58, "mtp": 1}
    assert found.experts == {"routed": 256, "shared": 1, "per_token": 8, "groups": 8, "groups_per_token": 4}
    assert found.context_length == 163_840
    assert found.legal_mp == {"fp8": (1, 2, 4, 8, 16), "bf16": (1, 2, 4, 8, 16, 32, 64, 128)}
    assert found.differs == ()
    assert "deepseek-v3" in found.published_as


@pytest.mark.parametrize("names", alike(), ids=",".join)
def test_every_manifest_is_what_it_says(names: list[str]) -> None:
    found = wk.inspect(names[0])
    assert found.differs == ()
    assert set(names) <= set(found.published_as)
    assert sum(part.size_bytes for part in found.components) == sum(part.size_bytes for part in found.dtypes)


@pytest.mark.parametrize("model", [V3, V2_LITE, MOONLIGHT])
def test_counts_of_a_folder(model: Tiny, tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "it", model)
    found = wk.inspect(tmp_path / "it")
    assert (found.name, found.layout, found.files) == ("it", "published", 3)
    assert (found.tensors, found.size_bytes) == (len(contents), sum(len(data) for _, _, data in contents.values()))
    for total in found.dtypes:
        shapes = [shape for dtype, shape, _ in contents.values() if dtype == total.dtype]
        assert (total.tensors, total.elements) == (len(shapes), sum(map(prod, shapes)))
        assert total.size_bytes == total.elements * ELEMENT_BYTES[total.dtype]
    moe_layers = model.layers - model.dense_layers
    a_expert = 3 * model.hidden * model.moe
    bias = model.experts if model.sigmoid else 0
    assert parts(found)["routed"] == moe_layers * model.experts * a_expert
    assert parts(found)["shared"] == moe_layers * model.shared * a_expert
    assert parts(found)["router"] == moe_layers * (model.experts * model.hidden + bias)
    assert parts(found)["dense"] == model.dense_layers * 3 * model.hidden * model.intermediate
    assert parts(found)["norm"] == model.hidden * (2 * model.layers + 1)
    assert parts(found).get("rotary", 0) == 0
    assert "other" not in parts(found)
    weights = sum(
        prod(shape) for name, (_, shape, _) in contents.items() if not name.endswith(("_scale_inv", "inv_freq"))
    )
    assert found.parameters == weights
    mtp = sum(
        prod(shape)
        for name, (_, shape, _) in contents.items()
        if name.startswith(f"model.layers.{model.layers}.") and not name.endswith("_scale_inv")
    )
    assert found.main_parameters == weights - mtp
    unused = moe_layers * (model.experts - model.top_k) * a_expert
    assert found.activated_parameters == weights - mtp - model.vocab * model.hidden - unused
    assert found.layers == {"dense": model.dense_layers, "moe": moe_layers, "mtp": model.mtp_layers}
    assert found.context_length == 512
    assert found.published_as == ()


def test_ranks_count_what_is_on_several_once(tmp_path: Path) -> None:
    write_tiny(tmp_path / "fp8")
    checkpoint = wk.open_checkpoint(tmp_path / "fp8")
    wk.write(wk.shard(checkpoint, mp=4), tmp_path / "mp4", progress=False)
    whole, ranks = wk.inspect(tmp_path / "fp8"), wk.inspect(tmp_path / "mp4")
    assert ranks.layout == "4 mp ranks"
    assert ranks.layers["mtp"] == 0
    assert ranks.main_parameters == ranks.parameters == whole.main_parameters
    assert ranks.activated_parameters == whole.activated_parameters
    assert ranks.origin["source"] == str(tmp_path / "fp8")
    assert "made by source" in ranks.render()


def test_bf16_of_fp8_has_the_same_parameters(tmp_path: Path) -> None:
    write_tiny(tmp_path / "fp8")
    wk.write(wk.cast(wk.open_checkpoint(tmp_path / "fp8"), "bf16"), tmp_path / "bf16", progress=False)
    fp8, bf16 = wk.inspect(tmp_path / "fp8"), wk.inspect(tmp_path / "bf16")
    assert parts(fp8) == parts(bf16)
    assert [total.dtype for total in bf16.dtypes] == ["BF16", "F32"]


def test_text_is_aligned_and_moderately_wide() -> None:
    lines = wk.inspect("deepseek-v3").render().splitlines()
    table = lines[lines.index("") + 1 :]
    components = table[: table.index("")]
    assert len({len(line) for line in components}) == 1
    assert max(len(line) for line in components) <= 80
    assert max(map(len, lines)) <= 100
    assert "671.03 B, 36.63 B activated a token, and 13.46 B in MTP" in "\n".join(lines)


def test_json_is_plain(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    for found in (wk.inspect(tmp_path), wk.inspect("moonlight")):
        value = json.loads(json.dumps(found.to_json()))
        assert value["parameters"] == found.parameters
        assert value["components"][0]["name"] == "embedding"


def test_neither_path_nor_model() -> None:
    with pytest.raises(NotACheckpointError, match="Did you mean deepseek-v3"):
        wk.inspect("deepseek-v33")


def test_pain_12_distilled_model_is_named(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    with pytest.raises(UnsupportedError, match="distilled"):
        wk.inspect(tmp_path)


def test_absurd_config_is_refused_at_once(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    with pytest.raises(wk.WeightkitError, match="num_hidden_layers"):
        wk.inspect(tmp_path, config={**V3.config(), "num_hidden_layers": 10**15})
