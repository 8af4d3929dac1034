"""Every manifest against the blueprint, and the loader's refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from known import alike

import weightkit.manifests as manifests
from weightkit.errors import ConfigError, PlanError
from weightkit.family import Architecture, blueprint, totals

PUBLISHED = (
    "deepseek-r1",
    "deepseek-r1-0528",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v2.5",
    "deepseek-v3",
    "deepseek-v3-0324",
    "deepseek-v3-base",
    "deepseek-v3.1",
    "deepseek-v3.2",
    "glm-5",
    "glm-5-fp8",
    "kimi-k2",
    "moonlight",
)


def test_all_published_members_are_there() -> None:
    assert set(PUBLISHED) <= set(manifests.names())
    assert manifests.names() == tuple(sorted(manifests.names()))


@pytest.mark.parametrize("names", alike(), ids=",".join)
def test_expected_totals_follow_from_the_architecture(names: list[str]) -> None:
    manifest = manifests.load(names[0])
    arch = Architecture.from_config(manifest.config, where=names[0])
    if manifest.expected is None:
        pytest.skip("no totals given")
    found = totals(blueprint(arch).values())
    assert dict(manifest.expected.elements) == found.elements
    assert (manifest.expected.tensors, manifest.expected.size_bytes) == (found.tensors, found.size_bytes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_members_are_on_both_hubs(name: str) -> None:
    manifest = manifests.load(name)
    assert set(manifest.hubs) == {"huggingface", "modelscope"}
    assert all(hub.id.count("/") == 1 and hub.revision for hub in manifest.hubs.values())
    assert manifest.path is None


def test_v3_as_published() -> None:
    manifest = manifests.load("deepseek-v3")
    assert manifest.title == "DeepSeek-V3"
    assert manifest.hubs["huggingface"] == manifests.Hub("deepseek-ai/DeepSeek-V3", "main")
    assert manifest.expected == manifests.Expectation(
        tensors=91_991,
        size_bytes=688_574_839_360,
        elements={"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600},
        files=163,
    )


@pytest.mark.parametrize(("name", "close"), [("deepsek-v3", "deepseek-v3"), ("Kimi_K2", "kimi-k2"), ("glm5", "glm-5")])
def test_a_mistyped_name_gets_the_close_ones(name: str, close: str) -> None:
    with pytest.raises(PlanError, match=f"Did you mean .*{close}"):
        manifests.load(name)


@pytest.mark.parametrize(
    "name", ["", "gpt", "../manifests/deepseek-v3", "/etc/passwd", "deepseek-v3.toml/..", "pico/x"]
)
def test_a_name_is_never_a_path(name: str) -> None:
    with pytest.raises(PlanError, match="no model of this name is known"):
        manifests.load(name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(manifests, "_FOLDER", tmp_path)
    return tmp_path


def test_one_that_ships_with_its_checkpoint(folder: Path) -> None:
    (folder / "tiny").mkdir()
    (folder / "tiny" / "manifest.toml").write_text(
        'title = "Tiny"\ncheckpoint = "checkpoint"\n[architecture]\nmodel_type = "deepseek_v3"\n'
        '[files]\n"a.safetensors" = {size_bytes = 3}\n[evaluation]\naccuracy = 0.97\n'
        '[smoke]\nperplexity = 3.5\nanswers = [["1 + 1?", "2"]]\n',
        encoding="utf-8",
    )
    assert manifests.names() == ("tiny",)
    manifest = manifests.load("tiny")
    assert manifest.path == folder / "tiny" / "checkpoint"
    assert manifest.config == {"model_type": "deepseek_v3"}
    assert manifest.files == {"a.safetensors": {"size_bytes": 3}}
    assert manifest.evaluation == {"accuracy": 0.97}
    assert manifest.smoke == manifests.Smoke((("1 + 1?", "2"),), 3.5)
    assert manifest.expected is None
    assert manifest.hubs == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "not TOML"),
        ("title = 3\n[architecture]\n", "title is not what a manifest has there"),
        ('title = "x"\n', "architecture is not"),
        ('title = "x"\n[architecture]\n[hubs.gitlab]\nid = "a/b"\n', "expected one of huggingface, modelscope"),
        ('title = "x"\n[architecture]\n[hubs.huggingface]\nid = "a/b"\n', "revision is not"),
        ('title = "x"\n[architecture]\n[calibration]\nsamples = 3\n', "file is not"),
        ('title = "x"\n[architecture]\n[calibration]\nfile = "a"\ndataset = "b/c"\n', "revision is not"),
        ('title = "x"\n[architecture]\n[smoke]\nanswers = [["?"]]\n', "answers is not"),
        ('title = "x"\n[architecture]\n[smoke]\nperplexity = 0.5\n', "perplexity is not"),
        ('title = "x"\n[architecture]\n[expected]\ntensors = true\nsize_bytes = 1\nelements = {}\n', "tensors is not"),
    ],
)
def test_a_damaged_manifest_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "bad.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        manifests.load("bad")
    assert "bad.toml" in str(caught.value)
