"""One process measured: wall, CPU and memory; and the machine that it ran on."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import mmap
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]
CORES = len(os.sched_getaffinity(0))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPO), "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Run:
    """What one run took. The memory is the process's own, without that of its children; 0 where it was too short."""

    wall_s: float
    cpu_s: float
    rss_bytes: int
    anonymous_bytes: int


class RunError(Exception):
    """A run that did not end well: its exit code and the end of what it printed."""


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def set_cache(folder: Path, cache: str) -> None:
    """Bring a folder's files into the page cache (``warm``), or out of it (``cold``)."""
    if cache == "warm" and resident_share(folder) == 1:
        return
    buffer = bytearray(8 << 20)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            if cache == "cold":
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.readinto(buffer):
                    pass


def resident_share(folder: Path) -> float:
    """How much of the folder is in the page cache, by mincore. (A read that may not wait starts reading ahead.)"""
    libc, cached, pages = ctypes.CDLL(None, use_errno=True), 0, 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            whole = np.frombuffer(memory, np.uint8)
            there = np.empty(-(-len(whole) // mmap.PAGESIZE), np.uint8)
            address, count = ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(len(whole))
            if libc.mincore(address, count, ctypes.c_void_p(there.ctypes.data)) != 0:
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            cached += int((there & 1).sum())
            pages += len(there)
            del whole
    return cached / max(1, pages)


def measure(command: list[str], out: Path | None, log: Path, limit_s: float) -> Run:
    """Run a command until it ends and what it wrote into ``out`` is on the disk.

    The kernel's own high-water mark is read from /proc every 20 ms: wait4's would begin with what this process lends
    its children.

    Raises:
        RunError: it was stopped after ``limit_s`` seconds, ended with another exit code than 0, or left no ``out``.
    """
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=ENVIRONMENT, start_new_session=True
        )
        sampler = _Sampler(process.pid)
        killer = threading.Timer(limit_s, _kill, [process])
        sampler.start()
        killer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # stopped itself: what it started must not go on
            os.killpg(process.pid, signal.SIGKILL)
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        killer.cancel()
        if process.returncode == 0 and out is not None and out.exists():
            sync_files(out)
        wall_s = time.monotonic() - started
    sampler.stop.set()
    sampler.join()
    if process.returncode == -signal.SIGKILL and wall_s >= limit_s:
        raise RunError(f"stopped after {wall_s:.0f} s")
    if process.returncode != 0 or (out is not None and not out.exists()):
        tail = log.read_text(errors="replace").strip().splitlines()[-6:]
        raise RunError(f"exit {process.returncode}: " + " | ".join(tail))
    return Run(wall_s, usage.ru_utime + usage.ru_stime, sampler.highest["VmHWM"], sampler.highest["RssAnon"])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started: its session was made for it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


class _Sampler(threading.Thread):
    """The largest VmHWM and RssAnon of a process, in bytes, looked at every 20 ms."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.path = Path(f"/proc/{pid}/status")
        self.stop = threading.Event()
        self.highest = {"VmHWM": 0, "RssAnon": 0}

    def run(self) -> None:
        while not self.stop.wait(0.02):
            try:
                lines = self.path.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                key, _, value = line.partition(":")
                if key in self.highest:
                    self.highest[key] = max(self.highest[key], int(value.split()[0]) << 10)


def hash_rate(seconds: float = 1.0) -> float:
    """Bytes a second of SHA-256 on all cores at once, from memory, by the library that Python has."""
    done = [0] * CORES

    def work(number: int, until: float) -> None:
        buffer, digest = bytes(4 << 20), hashlib.sha256()
        while time.monotonic() < until:
            digest.update(buffer)
            done[number] += len(buffer)

    started = time.monotonic()
    threads = [threading.Thread(target=work, args=(number, started + seconds)) for number in range(CORES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.monotonic() - started)


def torch_bytes(log: Path, device: str) -> int:
    """Peak RSS of ``import torch`` and nothing else; for ``cuda``, with a context on the device."""
    code = "import time, torch\n"
    code += "torch.zeros(1, device='cuda')\n" if device == "cuda" else ""
    return measure([sys.executable, "-c", code + "time.sleep(0.2)"], None, log, 120).rss_bytes


def cuda_is_there(python: str = sys.executable) -> bool:
    code = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def machine() -> str:
    described = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in described if "model name" in line), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = []
    for name in ("torch", "triton", "numba", "numpy", "safetensors"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    gpu = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu = ", " + subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"{time.strftime('%Y-%m-%d')}, {CORES} cores ({cpu}), {memory:.0f} GiB{gpu}, load {os.getloadavg()[0]:.1f}, "
        f"Linux {platform.release()}, Python {platform.python_version()}, {', '.join(versions)}"
    )
