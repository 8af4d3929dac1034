"""A measurement for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from weightkit.errors import printable
from weightkit.measure.ceilings import Ceilings
from weightkit.measure.estimate import Estimate
from weightkit.units import counted, human_bytes, human_seconds

_BOUND = "Bytes are those read and written. A bound, not a promise: while the machine is as it was, no run is faster."


def render(ceilings: Ceilings, model: str, estimates: Sequence[Estimate]) -> str:
    """Rates, then the estimates for ``model``."""
    lines = [_place(ceilings), "", *_rates(ceilings), "", f"{model}, estimated: the slowest stage at its measured rate"]
    for item in estimates:
        at = f"{human_bytes(item.bytes_per_s)}/s"
        lines.append(f"{item.command:<32} {human_seconds(item.seconds):>12}  {at:>12}  bound by {item.bound_by}")
    return "\n".join([*lines, _BOUND])


def _place(ceilings: Ceilings) -> str:
    past = "past the page cache" if ceilings.direct else "through the page cache: no O_DIRECT here"
    scratch = f"{human_bytes(ceilings.scratch_bytes)} of scratch, {past}"
    cpu = f"{counted(ceilings.cores, 'core')} of {printable(ceilings.cpu)}, load {ceilings.load:.1f} before"
    return f"{printable(ceilings.folder)}: {scratch}\n{cpu}"


def _rates(ceilings: Ceilings) -> list[str]:
    def row(title: str, **rates: float) -> str:
        return f"{title:<28} " + ", ".join(f"{human_bytes(rate)}/s {name}" for name, rate in rates.items())

    rows = [
        row("disk", read=ceilings.read, write=ceilings.write),
        row("disk, both at once", read=ceilings.both_read, write=ceilings.both_write),
        _cores("memory copy", ceilings.copy_one, ceilings.copy_all),
        _cores("SHA-256", ceilings.sha256_one, ceilings.sha256_all),
        _cores("FP8 to BF16, bytes of FP8", ceilings.dequant_one, ceilings.dequant_all),
    ]
    if ceilings.gpu is not None:
        gpu = ceilings.gpu
        rows += [
            row(f"{printable(gpu.name)}", up=gpu.up, down=gpu.down),
            f"{'device copy':<28} {human_bytes(gpu.copy)}/s",
            f"{'FP8 to BF16 kernel':<28} {human_bytes(gpu.dequant)}/s, 3 bytes an element",
        ]
    return rows


def _cores(title: str, one: float, every: float) -> str:
    return f"{title:<28} {human_bytes(one)}/s one core, {human_bytes(every)}/s all"
