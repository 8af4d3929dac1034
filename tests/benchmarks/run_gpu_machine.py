"""Everything that is measured on a machine with a GPU, in one call of six to eight minutes. Needs no network.

    python tests/benchmarks/run_gpu_machine.py --dir /tmp/bench --peers .peers --report report.md

Steps, each with its own share of the time, none of which stops the others when it fails:

    check      versions, disk, GPU; that the peers' scripts start
    small      1.5 GB of full width: all contenders once, outputs compared: compiles kernels, finds failures early
    generate   DeepSeek's generate.py on our single-rank files and on convert.py's: the same text
    cast       12 GB: ours on CPU and on GPU, fp8_cast_bf16.py, cp, plain I/O
    shard      12 GB: ours, convert.py, cp, plain I/O, mp 8

At most 36 GB of disk are in use at a time. The tables come last, and in ``--report``. generate.py is run from a copy in
which ``apply_chat_template`` gets ``return_dict=False``, without which it fails on transformers 5.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
#: How generate.py prints an answer; a random one may hold line breaks.
COMPLETION = re.compile(r"^Completion: (.*?)\s*(?=^Prompt: |\Z)", re.DOTALL | re.MULTILINE)
PROMPTS = "How many bytes has a BF16 value?\nWas ist ein Tensor?\n"


@dataclass
class Session:
    """Where things lie, what time is left, and what was said about each step."""

    folder: Path
    peers: Path | None
    report: Path
    deadline: float
    python: str = sys.executable
    notes: list[str] = field(default_factory=list)

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, line: str) -> None:
        print(f"[{self.left_s():5.0f} s left] {line}", flush=True)
        self.notes.append(line)

    def call(self, name: str, command: list[str], limit_s: float) -> bool:
        """Run a step's command, its output passed through; a note where it fails."""
        started = time.monotonic()
        environment = os.environ | {"PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1"}
        limit_s = min(limit_s, self.left_s())
        try:
            code = subprocess.run(command, env=environment, timeout=max(1.0, limit_s), check=False).returncode
        except subprocess.TimeoutExpired:
            self.note(f"{name}: STOPPED after {limit_s:.0f} s")
            return False
        self.note(f"{name}: {'done' if code == 0 else f'FAILED, exit {code}'} in {time.monotonic() - started:.1f} s")
        return code == 0


def quiet(command: list[str]) -> tuple[bool, str]:
    """Whether a command succeeds, and its output."""
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return False, str(exc)
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} MISSING"


def check(session: Session) -> bool:
    """Say what is there. Returns whether there is a GPU."""
    free_gb = shutil.disk_usage(session.folder).free / 1e9
    session.note(f"free on {session.folder}: {free_gb:.0f} GB; load {os.getloadavg()[0]:.1f}")
    session.note(", ".join(map(version, ("torch", "triton", "numba", "numpy", "safetensors", "transformers", "tqdm"))))
    okay, output = quiet([session.python, "-c", "import weightkit; weightkit.open_checkpoint; weightkit.write"])
    session.note("weightkit imports" if okay else f"weightkit does NOT import: {output[-400:]}")
    if session.peers is None:
        session.note("no --peers: DeepSeek's scripts are left out")
    else:
        for script in ("convert.py", "fp8_cast_bf16.py", "generate.py"):
            okay, output = quiet([session.python, str(session.peers / script), "--help"])
            session.note(f"{script} starts" if okay else f"{script} does NOT start: {output[-300:]}")
    okay, output = quiet([session.python, "-c", "import torch; print(torch.cuda.get_device_name())"])
    session.note(f"GPU: {output}" if okay else "no CUDA device: its rows and generate.py are left out")
    return okay


def checkpoint(session: Session, name: str, options: list[str]) -> Path | None:
    folder = session.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    command = [session.python, str(HERE / "full_width.py"), "--dir", str(folder), *options]
    return folder if session.call(f"checkpoint {name}", command, 120) else None


def bench(session: Session, what: str, source: Path, limit_s: float, options: list[str]) -> None:
    """One benchmark; its budget is a little less than its limit, so that it stops by itself and prints its table."""
    limit_s = min(limit_s, session.left_s() - 5)
    if limit_s < 20:
        session.note(f"{what} on {source.name}: LEFT OUT, no time")
        return
    command = [session.python, str(HERE / "bench_convert.py"), what, "--checkpoint", str(source)]
    command += ["--work", str(session.folder / "work"), "--out", str(session.report), "--compare"]
    command += ["--budget-s", str(int(limit_s * 0.85)), *options]
    if session.peers is not None:
        command += ["--peers", str(session.peers)]
    session.call(f"{what} on {source.name}", command, limit_s)


def generate(session: Session, source: Path) -> None:
    """DeepSeek's generate.py on rank files that we wrote and on those that convert.py wrote."""
    if session.peers is None:
        return
    scripts, ours, theirs = (session.folder / name for name in ("demo", "mp1", "mp1-convert"))
    for folder in (scripts, ours, theirs):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(session.peers, scripts)
    text = (scripts / "generate.py").read_text()
    wanted = "add_generation_prompt=True, return_dict=False)"
    (scripts / "generate.py").write_text(text.replace("add_generation_prompt=True)", wanted))
    (session.folder / "prompts.txt").write_text(PROMPTS)
    code = "import sys, weightkit as wk; wk.write(wk.shard(wk.open_checkpoint(sys.argv[1]), mp=1), sys.argv[2])"
    session.call("shard --mp 1", [session.python, "-c", code, str(source), str(ours)], 60)
    convert = [session.python, str(session.peers / "convert.py"), "--hf-ckpt-path", str(source), "--save-path"]
    session.call("convert.py mp 1", [*convert, str(theirs), "--n-experts", "16", "--model-parallel", "1"], 60)
    answers = [answer(session, scripts, folder, ours / "demo_config.json") for folder in (ours, theirs)]
    same = "the same text" if answers[0] == answers[1] else f"DIFFERENT text: {answers}"
    session.note(f"generate.py on our files and on convert.py's: {same if all(answers) else 'FAILED'}")
    mine = [[own_answer(session, folder, prompt) for prompt in PROMPTS.splitlines()] for folder in (source, ours)]
    said = [text.strip() for text in COMPLETION.findall(answers[0])]
    same = "the same text" if mine == [said, said] else f"DIFFERENT text: {mine!a}"
    session.note(f"weightkit generate on the FP8 checkpoint and on its rank file, beside generate.py: {same}")
    for folder in (scripts, ours, theirs):
        shutil.rmtree(folder, ignore_errors=True)


def own_answer(session: Session, folder: Path, prompt: str) -> str:
    options = ["--prompt", prompt, "--max-new-tokens", "16", "--quiet"]
    okay, output = quiet([session.python, "-m", "weightkit", "generate", str(folder), *options])
    if not okay:
        session.note(f"weightkit generate on {folder.name} FAILED: {output[-600:]}")
    return output


def answer(session: Session, scripts: Path, folder: Path, config: Path) -> str:
    command = [session.python, str(scripts / "generate.py"), "--ckpt-path", str(folder), "--config", str(config)]
    command += ["--input-file", str(session.folder / "prompts.txt"), "--max-new-tokens", "16", "--temperature", "0"]
    okay, output = quiet(command)
    if not okay:
        session.note(f"generate.py on {folder.name} FAILED: {output[-600:]}")
        return ""
    session.note(f"generate.py on {folder.name}: {COMPLETION.findall(output)!a}")
    return output[output.index("Prompt:") :]


def main() -> None:
    parser = argparse.ArgumentParser(description="All measurements of a GPU machine in one call.")
    parser.add_argument("--dir", type=Path, required=True, help="folder on the disk that is meant; emptied of its own")
    parser.add_argument("--peers", type=Path, help="DeepSeek's inference folder")
    parser.add_argument("--report", type=Path, default=Path("gpu_report.md"))
    parser.add_argument("--limit-s", type=float, default=540, help="seconds for all of it")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256, help="of the large checkpoint; 256 make 12 GB")
    parser.add_argument("--vocab", type=int, default=129280, help="of the large checkpoint")
    parser.add_argument("--skip", nargs="*", default=[], choices=("small", "generate", "cast", "shard"))
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    args.report.unlink(missing_ok=True)
    peers = args.peers.resolve() if args.peers else None
    session = Session(args.dir.resolve(), peers, args.report.resolve(), time.monotonic() + args.limit_s)
    gpu = check(session)
    devices = ["--device", "cpu", "cuda"] if gpu else ["--device", "cpu"]
    if not {"small", "generate"} <= set(args.skip):
        run_small(session, devices, gpu=gpu, skip=args.skip)
    if not {"cast", "shard"} <= set(args.skip):
        large = checkpoint(session, "large", ["--experts", str(args.experts), "--vocab", str(args.vocab)])
        rounds = ["--rounds", str(args.rounds), "--no-warm-up", "--plain", "direct"]
        if large and "cast" not in args.skip:
            once = ["--once", "fp8_cast_bf16.py"]
            bench(session, "cast", large, session.left_s() * 0.65, [*rounds, *devices, *once])
        if large and "shard" not in args.skip:
            bench(session, "shard", large, session.left_s(), [*rounds, "--device", "cpu"])
        shutil.rmtree(session.folder / "large", ignore_errors=True)
    finish(session)


def run_small(session: Session, devices: list[str], *, gpu: bool, skip: list[str]) -> None:
    small = checkpoint(session, "small", ["--experts", "16", "--vocab", "264", "--shard-gb", "0.5"])
    if small is None:
        return
    if "small" not in skip:
        for what in ("cast", "shard"):
            bench(
                session, what, small, 90, ["--rounds", "1", "--plain", "direct", *(devices if what == "cast" else [])]
            )
    if gpu and "generate" not in skip:
        generate(session, small)
    shutil.rmtree(small, ignore_errors=True)


def finish(session: Session) -> None:
    tables = session.report.read_text() if session.report.exists() else "no tables\n"
    notes = "\n".join(f"- {note}" for note in session.notes)
    session.report.write_text(f"{tables}\n### Steps\n\n{notes}\n")
    print("\n" + "=" * 100 + f"\n{notes}\n\n{tables}", flush=True)


if __name__ == "__main__":
    main()
