"""The measured rates of a machine, as data. All are bytes a second."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path

from weightkit.durable import write_whole
from weightkit.errors import FormatError

#: Where a measurement lies: in the folder whose disk was measured.
FILE_NAME = "weightkit-bench.json"


@dataclass(frozen=True, slots=True)
class GpuCeilings:
    """Of one GPU.

    Attributes:
        name: as the driver says.
        up, down: pinned transfers to the device and back.
        copy: a copy on the device, its reads and writes counted.
        dequant: FP8 to BF16 on the device, reads and writes counted (3 bytes an element).
    """

    name: str
    up: float
    down: float
    copy: float
    dequant: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a machine reached.

    Attributes:
        folder: on whose disk.
        measured_at: ISO 8601, UTC.
        cpu: the processor's name.
        cores: that this process may use.
        load: processes that wanted a core when it began (the load average of a minute): what else ran there lowers
            everything.
        direct: whether the disk was read and written past the page cache (O_DIRECT).
        scratch_bytes: of the files it was measured with.
        read, write: of the disk; what is written is synced.
        both_read, both_write: the same, side by side.
        copy_one, copy_all: bytes copied in memory, by one core and by all.
        sha256_one, sha256_all: bytes hashed.
        dequant_one, dequant_all: FP8 bytes made BF16 (numba).
        gpu: the first one, where there is any.
    """

    folder: str
    measured_at: str
    cpu: str
    cores: int
    load: float
    direct: bool
    scratch_bytes: int
    read: float
    write: float
    both_read: float
    both_write: float
    copy_one: float
    copy_all: float
    sha256_one: float
    sha256_all: float
    dequant_one: float
    dequant_all: float
    gpu: GpuCeilings | None = None

    def to_json(self) -> dict[str, object]:
        """Plain values by field, rates in bytes a second."""
        return {"unit": "bytes/s"} | asdict(self)


def save(ceilings: Ceilings, folder: Path) -> Path:
    """Write ``weightkit-bench.json`` into ``folder``. Returns its path."""
    path = folder / FILE_NAME
    write_whole(path, json.dumps(ceilings.to_json(), indent=2).encode() + b"\n", durable=False)
    return path


def load(path: Path) -> Ceilings:
    """Read what ``save`` wrote. Raises ``FormatError`` for anything else."""
    try:
        data = json.loads(path.read_text())
        gpu = data.get("gpu")
        rest = {field.name: data[field.name] for field in fields(Ceilings) if field.name != "gpu"}
        found = Ceilings(**rest, gpu=GpuCeilings(**gpu) if gpu is not None else None)
        rates = [
            getattr(found, field.name) for field in fields(Ceilings) if field.type == "float" and field.name != "load"
        ]
        usable = all(isfinite(rate) for rate in rates) and min(rates) > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _no_measurement(path) from exc
    if not usable:
        raise _no_measurement(path)
    return found


def find(place: Path) -> Path | None:
    """The nearest measurement in ``place`` or above it on the same filesystem; ``place`` need not exist yet."""
    folders = [folder for folder in (place.absolute(), *place.absolute().parents) if folder.is_dir()]
    device = folders[0].stat().st_dev
    for folder in folders:
        if folder.stat().st_dev != device:
            return None
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    return None


def _no_measurement(path: Path) -> FormatError:
    return FormatError(
        "not a measurement that `weightkit bench` wrote", where=path, fix="Delete it, and measure again."
    )
