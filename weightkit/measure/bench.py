"""All measurements of a machine, in some 15 seconds."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from weightkit.errors import MissingFileError
from weightkit.machine import JOBS, usable_cores
from weightkit.measure.ceilings import Ceilings
from weightkit.measure.cores import copy_rate, dequant_rate, sha256_rate
from weightkit.measure.disk import MOST_BYTES, measure_disk
from weightkit.measure.gpu import measure_gpu

#: Of each disk measurement; the others take a share of it.
SECONDS = 2.5
_SHARE = 0.3


def measure(folder: Path, *, seconds: float = SECONDS, most_bytes: int = MOST_BYTES) -> Ceilings:
    """Measure this machine, and the disk of ``folder``.

    Args:
        folder: where scratch files of at most ``most_bytes`` are written; it never shows them.
        seconds: of each of three disk measurements; six others of the cores and four of a GPU take 0.3 of it each.

    Raises:
        MissingFileError: no such folder.
        SpaceError, WriteError: too little is free, or it cannot be written to.
    """
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise MissingFileError(what, where=folder, fix="Name a folder on the disk that is to be measured.")
    cores, short = usable_cores(), seconds * _SHARE
    load = os.getloadavg()[0]
    disk = measure_disk(folder, jobs=JOBS, seconds=seconds, most_bytes=most_bytes)
    return Ceilings(
        folder=str(folder.absolute()),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=cpu_name(),
        cores=cores,
        load=load,
        direct=disk.direct,
        scratch_bytes=disk.scratch_bytes,
        read=disk.read,
        write=disk.write,
        both_read=disk.both_read,
        both_write=disk.both_write,
        copy_one=copy_rate(1, short),
        copy_all=copy_rate(cores, short),
        sha256_one=sha256_rate(1, short),
        sha256_all=sha256_rate(max(cores, JOBS), short),
        dequant_one=dequant_rate(1, short),
        dequant_all=dequant_rate(cores, short),
        gpu=measure_gpu(short),
    )


def cpu_name() -> str:
    """The processor, as Linux says; elsewhere its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
