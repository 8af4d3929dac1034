"""A plan: reads nothing, hashes what it will do, says what it costs, and refuses what cannot be written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import V3, write_tiny

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.folder import SideFile
from weightkit.checkpoint.tensors import Stored
from weightkit.errors import FormatError, PlanError, TargetError
from weightkit.layouts import FileSet, lay_out_published
from weightkit.machine import usable_cores
from weightkit.measure import Ceilings, save
from weightkit.transforms import cast_to_fp8
from weightkit.writer import make_plan, summarize
from weightkit.writer.executor import peak_memory_bytes


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    write_tiny(tmp_path / "v3")
    return wk.open_checkpoint(tmp_path / "v3")


def one_file(tmp_path: Path, **changes: object) -> FileSet:
    (tmp_path / "source").mkdir(exist_ok=True)
    tensors = {"a": Stored(str(tmp_path / "source/x"), 0, "U8", (1,))}
    files = FileSet({"x.safetensors": tensors}, {}, False, {}, str(tmp_path / "source"))
    return replace(files, **changes)  # type: ignore[arg-type]


def test_totals(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = make_plan(lay_out_published(wk.cast(checkpoint, "bf16")), tmp_path / "out")
    tensors = V3.tensors()
    weights = sum(dtype == "F8_E4M3" for dtype, _ in tensors.values())
    assert plan.computed_tensors == weights
    assert plan.tensors == len(tensors) - weights
    assert plan.bytes_read == checkpoint.size_bytes
    headers = sum(len(file.header) for file in plan.files)
    assert all(len(file.header) % 4096 == 0 for file in plan.files)
    assert plan.bytes_written == headers + wk.cast(checkpoint, "bf16").size_bytes
    assert not (tmp_path / "out").exists()


def test_equal_plans_have_equal_hashes_wherever_they_write(checkpoint: Checkpoint, tmp_path: Path) -> None:
    again = wk.open_checkpoint(tmp_path / "v3")
    first = make_plan(wk.shard(checkpoint, mp=2), tmp_path / "a").hash
    assert make_plan(wk.shard(again, mp=2), tmp_path / "b").hash == first


@pytest.mark.parametrize(
    "change",
    [
        lambda checkpoint: wk.shard(checkpoint, mp=4),
        lambda checkpoint: wk.shard(checkpoint, ep=2),
        lambda checkpoint: wk.shard(wk.cast(checkpoint, "bf16"), mp=2),
        lambda checkpoint: wk.shard(wk.cast(checkpoint, "f16"), mp=2),
        lambda checkpoint: wk.shard(wk.keep_experts(checkpoint, 4), mp=2),
        lambda checkpoint: wk.shard(
            wk.keep_experts(checkpoint, 4, kept={1: [1, 2, 4, 5], 2: [0, 3, 4, 7], 3: [0, 1, 4, 5]}), mp=2
        ),
        lambda checkpoint: wk.shard(replace(checkpoint, side_files={}), mp=2),
    ],
)
def test_other_options_have_another_hash(
    change: Callable[[Checkpoint], FileSet], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert (
        make_plan(change(checkpoint), tmp_path / "a").hash != make_plan(wk.shard(checkpoint, mp=2), tmp_path / "a").hash
    )


def test_a_changed_source_has_another_hash(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first = make_plan(wk.shard(checkpoint, mp=2), tmp_path / "out").hash
    path = next((tmp_path / "v3").glob("*.safetensors"))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert make_plan(wk.shard(wk.open_checkpoint(tmp_path / "v3"), mp=2), tmp_path / "out").hash != first


def test_a_changed_side_file_has_another_hash(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first = make_plan(wk.shard(checkpoint, mp=2), tmp_path / "out").hash
    (tmp_path / "v3/tokenizer_config.json").write_text(json.dumps({"bos_token": "<c>"}))
    assert make_plan(wk.shard(wk.open_checkpoint(tmp_path / "v3"), mp=2), tmp_path / "out").hash != first


@pytest.mark.parametrize("target", ["v3", "v3/inside", "v3/../v3", ".", "v3/a/../b"])
def test_target_and_source_within_each_other(target: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="must be two folders"):
        make_plan(lay_out_published(checkpoint), tmp_path / target)


def test_a_link_to_the_source_is_the_source(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "v3")
    with pytest.raises(TargetError):
        make_plan(lay_out_published(checkpoint), tmp_path / "link")
    with pytest.raises(TargetError):
        make_plan(lay_out_published(checkpoint), tmp_path / "link/below")


def test_a_single_file_and_its_folder(tmp_path: Path) -> None:
    write_tiny(tmp_path / "v3", shards=1, pattern="model.safetensors")
    checkpoint = wk.open_checkpoint(tmp_path / "v3/model.safetensors")
    with pytest.raises(TargetError):
        make_plan(lay_out_published(checkpoint), tmp_path / "v3")


def test_a_name_that_begins_like_the_sources_is_another_folder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    make_plan(lay_out_published(checkpoint), tmp_path / "v3-bf16")


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/b.safetensors",
        "",
        "..",
        "a\0b",
        "weightkit.lock.json",
        "x.partial",
        ".weightkit",
    ],
)
def test_names_of_weight_files_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    files = one_file(tmp_path)
    with pytest.raises(PlanError, match="file names that cannot be written"):
        make_plan(replace(files, files={name: files.files["x.safetensors"]}), tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "a/../x",
        "a//b",
        "",
        ".weightkit/journal.jsonl",
        "weightkit.lock.json",
        "x.safetensors",
        "a.partial",
    ],
)
def test_names_of_side_files_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="file names that cannot be written"):
        make_plan(one_file(tmp_path, side_files={name: SideFile(content=b"")}), tmp_path / "out")


def test_a_weight_file_with_the_name_of_the_index(tmp_path: Path) -> None:
    files = one_file(tmp_path)
    named = {"model.safetensors.index.json": files.files["x.safetensors"]}
    with pytest.raises(PlanError):
        make_plan(replace(files, files=named, index=True), tmp_path / "out")


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nothing to write"):
        make_plan(one_file(tmp_path, files={}), tmp_path / "out")


def test_a_side_file_that_is_gone(tmp_path: Path) -> None:
    plan = make_plan(one_file(tmp_path, side_files={"a": SideFile(tmp_path / "gone")}), tmp_path / "out")
    with pytest.raises(FormatError, match="gone: cannot be read"):
        _ = plan.hash


def test_peak_memory_grows_with_jobs_and_not_with_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = make_plan(wk.shard(checkpoint, mp=4), tmp_path / "out")
    peaks = [peak_memory_bytes(plan, jobs) for jobs in (1, 2, 4, 100)]
    assert peaks == [peaks[0], 2 * peaks[0], 4 * peaks[0], 4 * peaks[0]]


def test_peak_memory_knows_the_widest_rows(tmp_path: Path) -> None:
    source = Stored(str(tmp_path / "source/x"), 0, "F8_E4M3", (4096, 1_000_000))
    scale = Stored(str(tmp_path / "source/x"), 0, "F32", (32, 7813))
    from weightkit.checkpoint.tensors import dequantize

    wide = dequantize(source, scale, "F32", name="w")
    plan = make_plan(one_file(tmp_path, files={"x.safetensors": {"w": wide}}), tmp_path / "out")
    assert peak_memory_bytes(plan, 1) > 128 * 1_000_000 * 4
    copied = make_plan(one_file(tmp_path, files={"x.safetensors": {"w": source}}), tmp_path / "out")
    assert peak_memory_bytes(copied, 1) < 64 << 20


def test_peak_memory_counts_the_parts_that_are_joined(tmp_path: Path) -> None:
    """Weight, result, copies of the parts, and the whole: what a strip of a computed Concat takes at most."""
    from weightkit.checkpoint.tensors import BlockQuantized, Cast, Concat, LazyTensor, dequantize

    path = str(tmp_path / "source/x")
    parts = [
        dequantize(Stored(path, at, "F8_E4M3", (128, 128)), Stored(path, at, "F32", (1, 1)), "BF16", name="w")
        for at in (0, 1 << 20)
    ]
    joined, strip = Concat(tuple(parts), 1), 8 << 20

    def peak(tensor: LazyTensor) -> int:
        return peak_memory_bytes(make_plan(one_file(tmp_path, files={"x": {"w": tensor}}), tmp_path / "out"), 1)

    assert peak(joined) == peak(Cast(joined, "F32")) == peak(parts[0]) + strip
    quantized = [BlockQuantized(source, scales=False, power_of_two=False) for source in (parts[0], joined)]
    assert peak(quantized[1]) == peak(quantized[0]) + 2 * strip  # BF16 is two bytes for each of FP8
    plain = Concat((Stored(path, 0, "BF16", (128, 128)), Stored(path, 1 << 20, "BF16", (128, 128))), 1)
    assert peak(Cast(plain, "F32")) == peak(parts[0])


def test_an_estimate_reads_what_ranks_share_once(tmp_path: Path) -> None:
    """A disk does, where the page cache keeps it; an estimate is a bound."""
    write_tiny(tmp_path / "v3")
    checkpoint = wk.open_checkpoint(tmp_path / "v3")
    plan = make_plan(wk.shard(checkpoint, mp=4), tmp_path / "mp4")
    assert plan.bytes_read > plan.source_bytes == wk.strip_mtp(checkpoint).size_bytes
    rates = dict.fromkeys(("write", "both_read", "both_write", "copy_one", "copy_all"), 1e12)
    rates |= dict.fromkeys(("sha256_one", "sha256_all", "dequant_one", "dequant_all"), 1e12)
    measured = Ceilings("/x", "2026-11-24T00:00:00+00:00", "any", usable_cores(), 0.0, True, 1, read=100.0, **rates)
    save(measured, tmp_path)
    assert summarize(plan).estimated_s == plan.source_bytes / 100


def test_which_sources_are_read_from_front_to_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Not those that ranks share, nor those that are put together: reads that jump cost more past the page cache."""

    def reads_once(files: FileSet) -> bool:
        return make_plan(files, tmp_path / "out").reads_once

    bf16 = wk.cast(checkpoint, "bf16")
    assert reads_once(lay_out_published(wk.strip_mtp(checkpoint)))
    assert reads_once(lay_out_published(bf16))
    wk.write(bf16, tmp_path / "bf16", progress=False)
    assert reads_once(lay_out_published(cast_to_fp8(wk.open_checkpoint(tmp_path / "bf16"))))
    ranks = wk.shard(checkpoint, mp=4)
    assert not reads_once(ranks)
    wk.write(ranks, tmp_path / "mp4", progress=False)
    assert not reads_once(wk.merge(wk.open_checkpoint(tmp_path / "mp4")))
