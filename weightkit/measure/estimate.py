"""From rates and bytes to seconds: a lower bound, as if every stage ran at its ceiling and all went on side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from weightkit.machine import JOBS
from weightkit.measure.ceilings import Ceilings


@dataclass(frozen=True, slots=True)
class Work:
    """What a command does, in bytes.

    Attributes:
        command: as it is typed.
        reads_bytes, writes_bytes: from and to the disk.
        hashed_bytes: by SHA-256.
        dequantized_bytes: FP8 bytes that are made BF16 on the cores.
    """

    command: str
    reads_bytes: int
    writes_bytes: int
    hashed_bytes: int
    dequantized_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a command takes at best.

    Attributes:
        command: as it is typed.
        seconds: of the slowest stage.
        bound_by: that stage: ``reading``, ``writing``, ``reading and writing``, ``hashing``, ``dequantizing`` or
            ``cores``, which is all that the cores do.
        bytes_per_s: read and written.
    """

    command: str
    seconds: float
    bound_by: str
    bytes_per_s: float

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return asdict(self)


def estimate(work: Work, ceilings: Ceilings, *, jobs: int | None = None) -> Estimate:
    """The slowest stage of ``work`` where ``jobs`` files (default: ``JOBS``) are in work at once."""
    stages = stages_of(work, ceilings, jobs or JOBS)
    bound_by = max(stages, key=lambda stage: stages[stage])
    seconds = stages[bound_by]
    return Estimate(work.command, seconds, bound_by, (work.reads_bytes + work.writes_bytes) / seconds if seconds else 0)


def stages_of(work: Work, ceilings: Ceilings, jobs: int) -> dict[str, float]:
    """Seconds of each stage by itself. A file is hashed by one thread, so that no more cores hash than files are in
    work; what is read goes through the page cache and is copied once by the cores."""
    hashing = work.hashed_bytes / min(ceilings.sha256_all, jobs * ceilings.sha256_one)
    dequantizing = work.dequantized_bytes / min(ceilings.dequant_all, jobs * ceilings.dequant_one)
    cores = work.hashed_bytes / ceilings.sha256_all + work.dequantized_bytes / ceilings.dequant_all
    stages = {
        "reading": work.reads_bytes / ceilings.read,
        "writing": work.writes_bytes / ceilings.write,
        "hashing": hashing,
        "dequantizing": dequantizing,
        "cores": cores + work.reads_bytes / ceilings.copy_all,
    }
    if work.reads_bytes and work.writes_bytes:
        both = ceilings.both_read + ceilings.both_write
        stages["reading and writing"] = (work.reads_bytes + work.writes_bytes) / both
    return stages
