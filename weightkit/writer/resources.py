"""What the machine has: free disk, usable memory, cores."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MAX_JOBS = 8
_CGROUP = Path("/sys/fs/cgroup")


def default_jobs() -> int:
    """Workers where the user names no number: the usable cores, at most 8."""
    return min(MAX_JOBS, len(os.sched_getaffinity(0)))


def free_disk_bytes(target: Path) -> int:
    """Bytes that a user may still write on the filesystem of ``target``, which need not exist yet."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def available_memory_bytes() -> int | None:
    """Bytes that this process may still allocate: the system's, within the control group's limit. None where
    unknown."""
    known = [value for value in (_system_available(), _cgroup_available()) if value is not None]
    return min(known, default=None)


def _system_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) << 10 if "MemAvailable" in fields else None


def _cgroup_available() -> int | None:
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        reclaimable = sum(
            int(line.split()[1])
            for line in (_CGROUP / "memory.stat").read_text().splitlines()
            if line.split()[0] in ("inactive_file", "active_file")
        )
    except (OSError, ValueError, IndexError):
        return None
    return None if limit == "max" else int(limit) - int(used) + reclaimable
