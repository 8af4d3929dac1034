"""Numbers for people: decimal units, as disks and hubs count."""

from __future__ import annotations

import re


def human_bytes(count: float) -> str:
    """``690.2 GB``; three or four significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.95 or (unit == "B" and abs(count) < 1000):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def exact_bytes(count: int) -> str:
    """``1.37 TB (1,368,979,721,216 bytes)``, for errors: what is read at a glance, and what can be held to."""
    return f"{human_bytes(count)} ({count:,} bytes)"


def human_binary_bytes(count: float) -> str:
    """``641.3 GiB``, as GPUs count; GiB is the largest unit, so that what is compared has the same."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(count) >= 0.9995 * (1 << power):
            return f"{count / (1 << power):,.1f} {unit}"
    return f"{count:.0f} B"


def counted(count: int, noun: str) -> str:
    """``1 file``, ``1,024 files``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def human_seconds(seconds: float) -> str:
    """``0.4 s``, ``2 min 5 s``, ``3 h 12 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate("KMGT", start=1)
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """``24GiB``, ``96 GB`` or a plain number of bytes. Raises ``ValueError`` for anything else."""
    match = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!r} is no size, such as 24GiB or 96GB")
    return int(float(match[1]) * units[match[2].lower()])
