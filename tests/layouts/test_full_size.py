"""DeepSeek-V3 at full size, of headers alone: opened, and planned for every command, with the totals that must result.

Literal figures are those of the published repository and arithmetic over its table of shapes; times are printed by
``benchmarks/bench_open.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sparse import write_known

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.errors import PlanError
from weightkit.layouts import FileSet, lay_out_published
from weightkit.sizing import Machine
from weightkit.sizing import plan as size
from weightkit.writer import Plan, make_plan
from weightkit.writer.executor import peak_memory_bytes

ALL_BYTES = 688_574_839_360
MAIN_BYTES = 673_150_611_808
ALL_BF16_BYTES = 1_368_979_721_216
MAIN_BF16_BYTES = 1_342_052_868_096
#: What is whole on every rank, of 61 layers, 58 of them with a router: q_a, kv_a, their scales, norms, routers.
NORMS_AND_ROUTERS = 61 * 2 * (1536 + 512 + 2 * 7168) + 58 * (2 * 256 * 7168 + 4 * 256) + 2 * 7168
REPLICATED_FP8 = 61 * (1536 * 7168 + 4 * 12 * 56 + 576 * 7168 + 4 * 5 * 56) + NORMS_AND_ROUTERS
REPLICATED_BF16 = 61 * 2 * (1536 + 576) * 7168 + NORMS_AND_ROUTERS
#: Peak of the workers' buffers, beside Python and its libraries.
MOST_MEMORY_BYTES = 1 << 30


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("full") / "v3"
    assert write_known(folder) == ALL_BYTES
    yield wk.open_checkpoint(folder)
    for path in folder.iterdir():
        path.unlink()


def planned(files: FileSet, tmp_path: Path) -> tuple[Plan, int]:
    """The plan and its bytes of data."""
    plan = make_plan(files, tmp_path / "out")
    assert peak_memory_bytes(plan, 8) < MOST_MEMORY_BYTES
    assert len(plan.hash) == 64
    return plan, plan.bytes_written - sum(len(file.header) for file in plan.files)


def require_as_sized(command: str, gpus: int, made: Plan, data: int) -> None:
    """Before anything is fetched ``weightkit plan`` says the same of the command."""
    route = next(route for route in size("deepseek-v3", Machine(gpus)).routes if route.command == command)
    assert (route.reads_bytes, route.writes_bytes) == (made.bytes_read, data)
    assert route.disk_bytes == ALL_BYTES + data


def test_opened(v3: Checkpoint) -> None:
    assert len(v3.tensors) == 91_991
    assert len(v3.stamps) == 163
    assert v3.size_bytes == ALL_BYTES
    assert v3.dtypes == {"F8_E4M3", "BF16", "F32"}


def test_strip(v3: Checkpoint, tmp_path: Path) -> None:
    plan, data = planned(lay_out_published(wk.strip_mtp(v3)), tmp_path)
    assert (plan.tensors, data, plan.bytes_read, plan.computed_tensors) == (90_427, MAIN_BYTES, MAIN_BYTES, 0)
    assert len(plan.files) < 163
    assert plan.files[-1].name == f"model-{len(plan.files):05}-of-{len(plan.files):06}.safetensors"
    require_as_sized("strip", 8, plan, data)


def test_cast(v3: Checkpoint, tmp_path: Path) -> None:
    plan, data = planned(lay_out_published(wk.cast(v3, "bf16")), tmp_path)
    weights = sum(tensor.dtype == "F8_E4M3" for tensor in v3.tensors.values())
    assert (plan.tensors, data, plan.bytes_read) == (91_991 - weights, ALL_BF16_BYTES, ALL_BYTES)
    assert plan.computed_tensors == weights
    assert len(plan.files) == 163


def test_cast_without_mtp(v3: Checkpoint, tmp_path: Path) -> None:
    made, data = planned(lay_out_published(wk.cast(wk.strip_mtp(v3), "bf16")), tmp_path)
    assert data == MAIN_BF16_BYTES
    require_as_sized("cast --to bf16 --no-mtp", 8, made, data)


@pytest.mark.parametrize("mp", [16])
def test_shard(mp: int, v3: Checkpoint, tmp_path: Path) -> None:
    plan, data = planned(wk.shard(v3, mp=mp), tmp_path)
    assert data == MAIN_BYTES + (mp - 1) * REPLICATED_FP8
    assert plan.computed_tensors == 0
    assert len(plan.files) == mp
    assert len({file.size_bytes - len(file.header) for file in plan.files}) == 1
    assert plan.source_bytes == MAIN_BYTES
    require_as_sized(f"shard --mp {mp}", mp, plan, data)


@pytest.mark.parametrize("mp", [32])
def test_shard_to_bf16_in_one_pass(mp: int, v3: Checkpoint, tmp_path: Path) -> None:
    plan, data = planned(wk.shard(wk.cast(v3, "bf16"), mp=mp), tmp_path)
    assert data == MAIN_BF16_BYTES + (mp - 1) * REPLICATED_BF16
    assert len(plan.files) == mp
    require_as_sized(f"shard --mp {mp} --to bf16", mp, plan, data)


def test_an_illegal_degree(v3: Checkpoint) -> None:
    with pytest.raises(PlanError, match="144 scale blocks cannot be split over 32 ranks") as caught:
        wk.shard(v3, mp=32)
    assert "Legal --mp for this FP8 checkpoint: 1, 2, 4, 8, 16. Use one of them, or add --to bf16." in str(caught.value)


def test_fewer_experts(v3: Checkpoint, tmp_path: Path) -> None:
    plan, data = planned(lay_out_published(wk.keep_experts(wk.strip_mtp(v3), 64)), tmp_path)
    expert = 3 * (2048 * 7168 + 4 * 16 * 56)
    assert data == MAIN_BYTES - 58 * 192 * (expert + 2 * 7168 + 4)
    assert all(file.size_bytes < 5_000_000_000 for file in plan.files)


def test_fewer_expert_ranks(v3: Checkpoint, tmp_path: Path) -> None:
    plan, _ = planned(wk.shard(v3, ep=12), tmp_path)
    counts = [sum(".experts." in name for name in file.tensors) for file in plan.files]
    assert counts == [58 * 22 * 6] * 4 + [58 * 21 * 6] * 8
