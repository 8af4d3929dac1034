"""Numbers for people: decimal units, as disks and hubs count."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """``690.2 GB``; three or four significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.95 or (unit == "B" and abs(count) < 1000):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


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
