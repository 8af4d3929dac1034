"""What the commands of the road do to a model, in the bytes that measured rates apply to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from weightkit.family import blueprint
from weightkit.measure import Work
from weightkit.sizing.plan import Machine, plan
from weightkit.sizing.routes import Route
from weightkit.sizing.source import read_source

#: Commands whose time is not that of disk and cores.
_COMPUTED = ("quantize",)


def works_of(what: str | Path, *, ranks: int = 8) -> tuple[Work, ...]:
    """Fetching, verifying, stripping, casting and sharding a model, as ``sizing.plan`` counts bytes; fetching as if
    the network kept up. Everything that is written is hashed. Raises as ``sizing.plan``."""
    source = read_source(what)
    records = blueprint(source.arch).values()
    fp8 = sum(record.size_bytes for record in records if record.dtype == "F8_E4M3" and not record.mtp)
    main = sum(record.size_bytes for record in records if not record.mtp)
    held = sum(record.size_bytes for record in records)
    return tuple(_works(plan(what, Machine(gpus=ranks)).routes, fp8, main, held))


def _works(routes: Iterable[Route], fp8: int, main: int, held: int) -> Iterator[Work]:
    """All conversions read the main model; no less from the disk however much the page cache keeps for other ranks."""
    yield Work("verify", held, 0, held)
    for route in routes:
        if route.command == "fetch":
            yield Work("fetch, network aside", 0, route.writes_bytes, route.writes_bytes)
        elif route.command.split()[0] not in _COMPUTED:
            converted = fp8 if "--to bf16" in route.command else 0
            yield Work(route.command, main, route.writes_bytes, route.writes_bytes, converted)
