"""What a plan will cost, for people and for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from weightkit.machine import available_memory_bytes, default_jobs, free_disk_bytes
from weightkit.units import human_bytes
from weightkit.writer.executor import peak_memory_bytes
from weightkit.writer.plan import Plan
from weightkit.writer.target import inspect_target


@dataclass(frozen=True)
class Summary:
    """A plan's cost. ``left_bytes`` is what is still to be written; ``state`` is ``new``, ``continue`` or
    ``complete``."""

    target: str
    state: str
    files: int
    side_files: int
    tensors: int
    converted_tensors: int
    read_bytes: int
    write_bytes: int
    left_bytes: int
    free_disk_bytes: int
    jobs: int
    peak_memory_bytes: int
    available_memory_bytes: int
    plan_sha256: str

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return asdict(self)

    def render(self) -> str:
        """Aligned lines for a terminal."""
        memory = human_bytes(self.available_memory_bytes)
        rows = {
            "target": f"{self.target} ({self.state})",
            "files": f"{self.files}, and {self.side_files} side files",
            "tensors": f"{self.tensors:,}, {self.converted_tensors:,} of them converted",
            "read": human_bytes(self.read_bytes),
            "write": f"{human_bytes(self.write_bytes)}, {human_bytes(self.left_bytes)} left",
            "free disk": human_bytes(self.free_disk_bytes),
            "memory": f"{human_bytes(self.peak_memory_bytes)} of buffers for {self.jobs} jobs; {memory} available",
        }
        return "\n".join(f"{key:<10} {value}" for key, value in rows.items())


def summarize(plan: Plan, *, jobs: int | None = None, force: bool = False) -> Summary:
    """The cost of a plan as things stand. Raises ``TargetError`` where it could not be carried out."""
    jobs = jobs or default_jobs()
    state = inspect_target(plan, force=force)
    done = sum(state.files[file.name].bytes for file in plan.files if file.name in state.files)
    return Summary(
        target=str(plan.target),
        state="complete" if state.complete else "continue" if state.files else "new",
        files=len(plan.files),
        side_files=len(plan.side_files),
        tensors=plan.tensors,
        converted_tensors=plan.computed_tensors,
        read_bytes=plan.bytes_read,
        write_bytes=plan.bytes_written,
        left_bytes=0 if state.complete else plan.bytes_written - done,
        free_disk_bytes=free_disk_bytes(plan.target),
        jobs=jobs,
        peak_memory_bytes=peak_memory_bytes(plan, jobs),
        available_memory_bytes=available_memory_bytes(),
        plan_sha256=plan.hash,
    )
