"""What a plan will cost, for people and for scripts."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass

from weightkit.checkpoint.tensors import LazyTensor, is_plain, size_bytes, stored_parts
from weightkit.errors import FormatError
from weightkit.machine import JOBS, available_memory_bytes, free_disk_bytes, usable_cores
from weightkit.measure import Ceilings, Work, estimate, find, load
from weightkit.remote.address import is_address
from weightkit.units import counted, human_bytes, human_seconds
from weightkit.writer.executor import peak_memory_bytes
from weightkit.writer.plan import Plan
from weightkit.writer.sourcing import Sourcing, plan_sourcing
from weightkit.writer.target import inspect_target, space_needed


@dataclass(frozen=True)
class Summary:
    """A plan's cost. ``left_bytes`` is what is still to be written; ``state`` is ``new``, ``continue`` or ``complete``.
    Where ``needed_disk_bytes`` are not free, or memory is less than its peak, a run is refused.

    ``estimated_s``, of what is left at the rates that ``weightkit bench`` measured (``estimated_from``), is a lower
    bound; None where nothing was measured, or the work is not of the kind that was.

    Of a remote source, ``spooled_files`` of ``spooled_bytes`` are fetched whole and verified, at most ``spool_bytes``
    on the disk at a time; ``unverified_files`` are read by ranges.
    """

    target: str
    state: str
    files: int
    side_files: int
    tensors: int
    converted_tensors: int
    read_bytes: int
    write_bytes: int
    left_bytes: int
    needed_disk_bytes: int
    free_disk_bytes: int
    jobs: int
    peak_memory_bytes: int
    available_memory_bytes: int
    plan_sha256: str
    estimated_s: float | None = None
    estimated_from: str | None = None
    spooled_files: int = 0
    spooled_bytes: int = 0
    spool_bytes: int = 0
    unverified_files: int = 0

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return asdict(self)

    def render(self) -> str:
        """Aligned lines for a terminal."""
        memory = human_bytes(self.available_memory_bytes)
        rows = {
            "target": f"{self.target} ({self.state})",
            "files": f"{self.files}, and {counted(self.side_files, 'side file')}",
            "tensors": f"{self.tensors:,}, {self.converted_tensors:,} of them converted",
            "read": human_bytes(self.read_bytes),
            "write": f"{human_bytes(self.write_bytes)}, {human_bytes(self.left_bytes)} left",
            "free disk": human_bytes(self.free_disk_bytes) + self._short(self.needed_disk_bytes, self.free_disk_bytes),
            "memory": f"{human_bytes(self.peak_memory_bytes)} of buffers for {counted(self.jobs, 'job')};"
            f" {memory} available" + self._short(self.peak_memory_bytes, self.available_memory_bytes),
        }
        if self.spooled_files:
            rows["fetch"] = (
                f"{counted(self.spooled_files, 'file')}, {human_bytes(self.spooled_bytes)}, each verified whole;"
                f" at most {human_bytes(self.spool_bytes)} on the disk at a time"
            )
        if self.unverified_files:
            rows["ranges"] = f"of {counted(self.unverified_files, 'remote file')}, not verified whole"
        if self.estimated_s is not None:
            rows["time"] = f"at least {human_seconds(self.estimated_s)}, estimated from {self.estimated_from}"
        return "\n".join(f"{key:<10} {value}" for key, value in rows.items())

    @staticmethod
    def _short(needed: int, there: int) -> str:
        """What stands in the way, which a run would refuse to start for."""
        return f" - too little: {human_bytes(needed)} needed" if needed > there else ""


def summarize(
    plan: Plan,
    *,
    jobs: int | None = None,
    force: bool = False,
    spool_bytes: int | None = None,
    elsewhere: bool = False,
) -> Summary:
    """The cost of a plan as things stand; arguments as of ``execute``.

    Args:
        elsewhere: an executor other than this process will write the files.

    Raises ``TargetError`` where it could not be carried out, ``SpaceError`` for a spool that is too small.
    """
    state = inspect_target(plan, force=force)
    sourcing = Sourcing({}, jobs=jobs or JOBS)
    if not state.complete:
        sourcing = plan_sourcing(
            plan, state.files, jobs=jobs, limit_bytes=spool_bytes, elsewhere=elsewhere, force=force
        )
    jobs = sourcing.jobs
    done = sum(state.files[file.name].bytes for file in plan.files if file.name in state.files)
    left = 0 if state.complete else plan.bytes_written - done
    needed = space_needed(plan, state.files, force=force) + sourcing.lacking_bytes(plan.target)
    estimated_s, estimated_from = _estimated(plan, left, jobs)
    return Summary(
        target=str(plan.target),
        state="complete" if state.complete else "continue" if state.files else "new",
        files=len(plan.files),
        side_files=len(plan.side_files),
        tensors=plan.tensors,
        converted_tensors=plan.computed_tensors,
        read_bytes=plan.bytes_read,
        write_bytes=plan.bytes_written,
        left_bytes=left,
        needed_disk_bytes=0 if state.complete else max(0, needed),
        free_disk_bytes=free_disk_bytes(plan.target),
        jobs=jobs,
        peak_memory_bytes=peak_memory_bytes(plan, jobs),
        available_memory_bytes=available_memory_bytes(),
        plan_sha256=plan.hash,
        estimated_s=estimated_s,
        estimated_from=estimated_from,
        spooled_files=len(sourcing.spooled),
        spooled_bytes=sourcing.spooled_bytes,
        spool_bytes=sourcing.limit_bytes,
        unverified_files=len(sourcing.unverified),
    )


def _estimated(plan: Plan, left: int, jobs: int) -> tuple[float | None, str | None]:
    """Seconds of what is left of a plan, and from which measurement, where there is one that applies."""
    path = find(plan.target)
    if path is None:
        return None, None
    with suppress(FormatError):
        ceilings, work = load(path), _work(plan)
        if work is not None and plan.bytes_written and _is_of(ceilings):
            seconds = estimate(work, ceilings, jobs=min(jobs, len(plan.files))).seconds
            return seconds * left / plan.bytes_written, f"{path} of {ceilings.measured_at[:10]}"
    return None, None


def _is_of(ceilings: Ceilings) -> bool:
    """Whether it was measured on as many cores as there are here: a disk may be shared by several machines."""
    return ceilings.cores == usable_cores()


def _work(plan: Plan) -> Work | None:
    """All that a plan does; None where a network, a GPU or a conversion whose rate is not measured is part of it."""
    if any(is_address(path) for path in plan.stamps):
        return None
    dequantized = 0
    for file in plan.files:
        for tensor in file.tensors.values():
            if not is_plain(tensor):
                codes = _codes(tensor)
                if codes is None:
                    return None
                dequantized += codes
    return Work(plan.target.name, plan.source_bytes, plan.bytes_written, plan.bytes_written, dequantized)


def _codes(tensor: LazyTensor) -> int | None:
    """Bytes of FP8 that a computed tensor is made from; None where it is not a dequantization."""
    parts = list(stored_parts(tensor))
    if tensor.dtype == "F8_E4M3" or not all(part.dtype in ("F8_E4M3", "F32") for part in parts):
        return None
    return sum(size_bytes(part) for part in parts if part.dtype == "F8_E4M3")
