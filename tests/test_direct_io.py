"""Memory for direct reads and writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightkit.direct_io import ALIGNMENT, HUGE_PAGE_BYTES, direct_buffer

SMAPS = Path("/proc/self/smaps")


def mapping_of(address: int) -> dict[str, str]:
    """What the kernel says of the mapping that an address lies in."""
    found: dict[str, str] = {}
    inside = False
    for line in SMAPS.read_text().splitlines():
        name, _, value = line.partition(" ")
        if not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= address < last
        elif inside:
            found[name] = value.strip()
    return found


@pytest.mark.parametrize("size_bytes", [ALIGNMENT, HUGE_PAGE_BYTES - ALIGNMENT])
def test_a_small_buffer_is_aligned(size_bytes: int) -> None:
    buffer = direct_buffer(size_bytes)
    assert len(buffer) == size_bytes
    assert buffer.ctypes.data % ALIGNMENT == 0
    assert not buffer.any()


@pytest.mark.parametrize("size_bytes", [HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + ALIGNMENT])
def test_a_large_buffer_asks_for_huge_pages(size_bytes: int) -> None:
    """Only private memory gets them."""
    buffer = direct_buffer(size_bytes)
    assert len(buffer) == size_bytes
    assert buffer.ctypes.data % HUGE_PAGE_BYTES == 0
    assert not buffer.any()
    buffer[:] = 1
    flags = mapping_of(buffer.ctypes.data).get("VmFlags:", "").split() if SMAPS.exists() else []
    if not flags:
        pytest.skip("the kernel does not say what it knows of memory")
    assert "sh" not in flags
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags
