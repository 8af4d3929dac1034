"""DeepSeek-V3 at full size, rehearsed: every command that reads no data, on its 163 files with holes for data.

Each runs in a process of its own; its CPU seconds and peak memory have bounds that a machine of half this one's speed
keeps. By hand it prints the figures:

    python tests/cli/test_rehearsal.py [FOLDER]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from sparse import write_known, write_sparse

import weightkit as wk
from weightkit import manifests
from weightkit.family import Architecture, blueprint
from weightkit.writer import make_plan

PICO = Path(manifests.__path__[0]) / "pico"
FP8_BYTES = 688_574_839_360
BF16_BYTES = 1_368_979_721_216
#: A shared machine takes several times the CPU seconds; what is quadratic in tensors takes far more.
SLOWER = 3

#: Runs a command and says what it took; a process this small lends its children no memory.
WRAPPER = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
wall_s, cpu_s = time.perf_counter() - started, used.ru_utime + used.ru_stime
took = {"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": used.ru_maxrss * 1024 / 1e6}
print(json.dumps({"code": done.returncode, "out": done.stdout, "err": done.stderr, **took}))
"""


@dataclass(frozen=True)
class Case:
    """A command; ``{fp8}``, ``{bf16}`` and ``{mp8}`` stand for sources, ``{out}`` for a target.

    Attributes:
        line: its words.
        cpu_s, peak_mb: bounds, of CPU seconds on an idle machine.
        found: a text that it must print.
    """

    line: str
    cpu_s: float
    peak_mb: float
    found: str


@dataclass(frozen=True)
class Took:
    """What a command took, and what it printed."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    code: int
    out: str
    err: str


CASES = [
    Case("inspect {fp8}", 8, 250, "91,991"),
    Case("verify {fp8} --quick", 8, 300, "No problems"),
    Case("strip {fp8} {out} --dry-run", 9, 250, "write      673.2 GB"),
    Case("cast {fp8} {out} --to bf16 --dry-run", 10, 250, "write      1.37 TB"),
    Case("cast {bf16} {out} --to fp8 --dry-run", 10, 250, "write      688.6 GB"),
    Case("shard {fp8} {out} --mp 8 --dry-run", 14, 250, "read       740.0 GB\nwrite      681.1 GB"),
    Case("shard {fp8} {out} --mp 16 --dry-run", 15, 250, "read       690.2 GB\nwrite      690.2 GB"),
    Case("shard {fp8} {out} --ep 64 --dry-run", 20, 300, "write      1.88 TB"),
    Case("shard {fp8} {out} --mp 32 --to bf16 --dry-run", 18, 250, "write      1.41 TB"),
    Case("merge {mp8} {out} --dry-run", 12, 300, "write      673.2 GB"),
    Case("quantize {fp8} {out} --method rtn --dry-run", 28, 850, "write      398.1 GB"),
    Case(
        "quantize {fp8} {out} --calibration {text} --samples 16 --host-memory 64GB --dry-run",
        28,
        850,
        "write      398.1 GB",
    ),
    Case("launch vllm {fp8}", 13, 350, "vllm serve"),
    Case("plan {fp8} --gpu-memory 96GiB", 8, 200, "shard --mp 8             740.0 GB    681.1 GB"),
]


def write_all(root: Path) -> dict[str, Path]:
    """The published checkpoint, one cast to BF16, and rank files of mp 8."""
    folders = {name: root / name for name in ("fp8", "bf16", "mp8")}
    assert write_known(folders["fp8"]) == FP8_BYTES
    config = {key: value for key, value in manifests.load("deepseek-v3").config.items() if key != "quantization_config"}
    records = blueprint(replace(Architecture.from_config(config), quantization=None, dtype="BF16")).values()
    tensors = {record.name: (record.dtype, record.shape) for record in records}
    assert write_sparse(folders["bf16"], config, tensors, shards=163) == BF16_BYTES
    _write_ranks(folders["fp8"], folders["mp8"])
    for folder in folders.values():
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(PICO / "checkpoint" / name, folder / name)
    return folders


def _write_ranks(source: Path, folder: Path) -> None:
    """The headers that a plan has, and holes."""
    plan = make_plan(wk.shard(wk.open_checkpoint(source), mp=8), folder)
    folder.mkdir()
    for planned in plan.files:
        with (folder / planned.name).open("wb") as file:
            file.write(planned.header)
            file.truncate(planned.size_bytes)
    shutil.copyfile(source / "config.json", folder / "config.json")


def run(case: Case, folders: dict[str, Path], root: Path) -> Took:
    words = case.line.format(**folders, out=root / "out", text=PICO / "calibration.jsonl").split()
    line = [sys.executable, "-c", WRAPPER, sys.executable, "-m", "weightkit", *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=root, check=True, timeout=900)
    return Took(**json.loads(done.stdout))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("rehearsal")
    yield write_all(root)
    shutil.rmtree(root)


#: 8 ranks take all that 16 do, whose bytes are counted in test_full_size.py; GPTQ all that rounding to nearest does.
TESTED = [case for case in CASES if "--mp 16" not in case.line and "--method rtn" not in case.line]


@pytest.mark.parametrize("case", TESTED, ids=lambda case: case.line.split(" {")[0] + case.line.partition("}")[2])
def test_rehearsed(case: Case, folders: dict[str, Path], tmp_path: Path) -> None:
    took = run(case, folders, tmp_path)
    assert took.code == 0, took.err
    assert case.found in took.out
    assert took.cpu_s < SLOWER * case.cpu_s
    assert took.peak_mb < case.peak_mb
    assert not (tmp_path / "out").exists()


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        root = Path(name)
        folders = write_all(root)
        print("| command | wall s | CPU s | peak MB |\n|---|---|---|---|")
        for case in CASES:
            took = run(case, folders, root)
            words = case.line.format(fp8="FP8", bf16="BF16", mp8="MP8", out="OUT", text="TEXT")
            print(f"| {words} | {took.wall_s:.1f} | {took.cpu_s:.1f} | {took.peak_mb:.0f} |", flush=True)
            if took.code or case.found not in took.out:
                print(took.code, took.out, took.err, file=sys.stderr)


if __name__ == "__main__":
    main()
