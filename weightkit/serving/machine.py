"""What this machine must have before an engine is started: the port, the program, GPUs, memory on them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from weightkit.errors import DeviceError, EngineError, MissingFileError, PlanError, WeightkitError
from weightkit.serving.launch import Launch
from weightkit.units import human_bytes

PROGRAM_S = 60.0
_INSTALL = {
    "vllm": "Install vLLM, or activate the environment that has it.",
    "sglang": "Install SGLang, or activate the environment that has it.",
    "lmdeploy": "Install LMDeploy, or activate the environment that has it.",
    "demo": "Install torch, or activate the environment that has it.",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """Attributes: name: as the driver says; memory_bytes: all of its memory."""

    name: str
    memory_bytes: int


def machine_problems(launch: Launch) -> Iterator[WeightkitError]:
    """Everything on this machine that the engine would stumble over."""
    yield from _port_problems(launch)
    yield from _program_problems(launch)
    yield from _gpu_problems(launch)


def _port_problems(launch: Launch) -> Iterator[WeightkitError]:
    if launch.endpoint is None:
        return
    host, port = _listened_on(launch)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        yield PlanError(
            f"the engine cannot listen there ({exc.strerror or exc})",
            where=f"{host}:{port}",
            fix="Choose another --port, or stop what listens there; --host must be an address of this machine.",
        )


def _listened_on(launch: Launch) -> tuple[str, int]:
    argv = launch.argv
    flag = "--server-name" if "--server-name" in argv else "--host"
    return argv[argv.index(flag) + 1], urlsplit(launch.endpoint or "").port or 0


def _program_problems(launch: Launch) -> Iterator[WeightkitError]:
    engine, fix = launch.engine, _INSTALL[launch.engine.name]
    program = shutil.which(engine.program)
    if program is None:
        yield EngineError(
            f"{engine.title} is not on this machine: no such program on PATH", where=engine.program, fix=fix
        )
    elif engine.module is not None and not _has_module(program, engine.module):
        yield EngineError(f"this Python does not find the module {engine.module}", where=program, fix=fix)
    if engine.name == "demo":
        script = Path(next(word for word in launch.argv if word.endswith("generate.py")))
        if not script.is_file():
            yield MissingFileError(
                "the demo's program is not there",
                where=script,
                expected="generate.py of DeepSeek-V3's repository, in its folder inference",
                found="no such file",
                fix="Name its folder with --demo.",
            )


def _has_module(python: str, module: str) -> bool:
    """Whether a Python finds a module; without importing it, which takes long."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, timeout=PROGRAM_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _gpu_problems(launch: Launch) -> Iterator[WeightkitError]:
    gpus = visible_gpus()
    if len(gpus) < launch.tp:
        yield DeviceError(
            "not enough GPUs",
            where="--tp",
            expected=f"{launch.tp} that are visible here",
            found=f"{len(gpus)}" + (f" ({gpus[0].name})" if gpus else ", as nvidia-smi says"),
            fix="Use a smaller --tp, or a machine with more; CUDA_VISIBLE_DEVICES may hide some.",
        )
        return
    used = sorted(gpu.memory_bytes for gpu in gpus)[-launch.tp :]
    if launch.weights_bytes > sum(used):
        yield DeviceError(
            "the weights alone are more than the GPUs' memory",
            where=f"{launch.tp} x {gpus[0].name}",
            expected=f"at least {human_bytes(launch.weights_bytes)}",
            found=human_bytes(sum(used)),
            fix="Use a larger --tp, or a smaller form: weightkit quantize.",
        )


def visible_gpus() -> list[Gpu]:
    """The GPUs that ``nvidia-smi`` lists and ``CUDA_VISIBLE_DEVICES`` leaves visible; empty where it does not run."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=PROGRAM_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 4 and row[3].isdigit()] if done.returncode == 0 else []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        wanted = [word.strip() for word in chosen.split(",")]
        rows = [row for row in rows if row[0] in wanted or any(word and row[1].startswith(word) for word in wanted)]
    return [Gpu(row[2], int(row[3]) << 20) for row in rows]
