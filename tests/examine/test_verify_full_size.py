"""The real model's 163 files and 91,991 tensors, without its bytes: files of holes behind true headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import weightkit as wk
from weightkit import manifests
from weightkit.checkpoint import build_header
from weightkit.family import Architecture, blueprint

FILES = 163


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v3")
    config = {**manifests.load("deepseek-v3").config, "architectures": ["DeepseekV3ForCausalLM"]}
    records = list(blueprint(Architecture.from_config(config)).values())
    share = -(-len(records) // FILES)
    weight_map: dict[str, str] = {}
    for number in range(FILES):
        part = records[number * share : (number + 1) * share]
        name = f"model-{number + 1:05}-of-{FILES:06}.safetensors"
        header = build_header([(item.name, item.dtype, item.shape) for item in part], {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(item.size_bytes for item in part))
        weight_map |= {item.name: name for item in part}
    total = sum(item.size_bytes for item in records)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_quick_verify_of_all_headers_takes_seconds(deepseek_v3: Path) -> None:
    report = wk.verify(deepseek_v3, manifest="deepseek-v3", quick=True, progress=False)
    assert report.ok, report.render()
    assert (report.files, report.tensors, report.size_bytes) == (FILES, 91_991, 688_574_839_360)
    assert report.wall_s < 60  # 2.5 s on two idle cores; its memory is measured in test_rehearsal.py


@pytest.mark.slow
def test_one_missing_file_of_163_is_one_problem(deepseek_v3: Path, tmp_path: Path) -> None:
    missing = deepseek_v3 / "model-00042-of-000163.safetensors"
    elsewhere = missing.rename(tmp_path / missing.name)
    report = wk.verify(deepseek_v3, quick=True, progress=False)
    elsewhere.rename(missing)
    assert len(report.problems) == 1
    assert len(report.render().splitlines()) < 15
