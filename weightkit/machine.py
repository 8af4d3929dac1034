"""What the machine has: usable cores, memory, free disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

#: Files in work at once where the user names no number: enough for a disk. Few cores hash them in pairs.
JOBS = 8
_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def free_disk_bytes(target: Path) -> int:
    """Bytes that a user may still write on the filesystem of ``target``, which need not exist yet."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def available_memory_bytes() -> int:
    """Bytes that this process may still allocate: what the system has, within the control group's limit."""
    room = _cgroup_room_bytes()
    return _system_bytes() if room is None else min(_system_bytes(), room)


def _system_bytes() -> int:
    """``MemAvailable`` of Linux; elsewhere all physical memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_room_bytes() -> int | None:
    """Room under a cgroup v2 limit, where there is one; cached file pages are given back under pressure."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text())
        return max(0, int(limit) - used + int(stat["active_file"]) + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return None
