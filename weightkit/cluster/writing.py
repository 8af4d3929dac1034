"""The files of a plan, filled by the nodes of a Ray cluster. See ``weightkit.writer.executor.Executor``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from weightkit.checkpoint.tensors import LazyTensor, Stored, stored_parts
from weightkit.cluster.connection import connect, nodes
from weightkit.cluster.crew import Crew, Needs, require_room
from weightkit.cluster.filling import Order, Place, look, write_file
from weightkit.cluster.news import News
from weightkit.compute.engines import DeviceName
from weightkit.errors import PlanError
from weightkit.remote.address import endpoints, is_address
from weightkit.version import build
from weightkit.writer.executor import Run, peak_memory_bytes
from weightkit.writer.plan import Plan, PlannedFile

#: What a worker's process takes besides its buffers: Python and Ray; numba, torch or CUDA where it computes.
PLAIN_BYTES, COMPUTING_BYTES = 300 << 20, 1 << 30


class RayExecutor:
    """Writes a plan's files as tasks of a Ray cluster: ``wk.write(..., executor=wk.RayExecutor())``.

    Source and target lie on a filesystem that all nodes see under the same paths, which is checked.

    Args:
        address: ``HOST:PORT`` of the cluster's head; ``local`` starts a cluster of this machine; None takes what
            ``RAY_ADDRESS`` names, or what runs on this machine.
        jobs: files in work at once on each node; default its CPUs, at most 8.
        device: where tensors are computed: ``auto`` takes GPUs on nodes that have them, and the CPU of a node whose GPU
            cannot be used or fails; ``cuda`` takes such nodes alone whose GPU works, and leaves out the others. Both
            say once of each such node what is wrong there; of several GPUs of a node only the broken ones are left out.
            Where no GPU of the cluster works, ``cuda`` is a ``DeviceError``, which names them all.
    """

    work = staticmethod(write_file)

    def __init__(self, address: str | None = None, *, jobs: int | None = None, device: DeviceName = "auto") -> None:
        if jobs is not None and jobs < 1:
            raise PlanError("not a number of jobs", where="--jobs", expected="at least 1", found=jobs)
        self.address, self.jobs, self.device = address, jobs, device

    def require(self, plan: Plan) -> None:
        """Raises ``ClusterError``: no cluster; ``DeviceError``, ``SpaceError``: none of its nodes can do the work."""
        ray = connect(self.address)
        require_room(nodes(ray), self._needs(plan), self.jobs)

    def write_files(self, run: Run) -> None:
        """All files that are not done. A worker or a node that dies costs the file that it had in work."""
        plan = run.plan
        ray, target = connect(self.address), plan.target.absolute()
        run.hold.announce()
        place = Place(target, run.hold.name)
        paths = {path: absolute(path) for path in plan.stamps}
        stamps = {paths[path]: stamp for path, stamp in plan.stamps.items()}
        crew = Crew(
            ray,
            self.work,
            self._needs(plan),
            jobs=self.jobs,
            look=(look, (place, stamps, build())),
            revoke=run.hold.revoke,
            tell=run.bar.tell,
        )
        errands = []
        for file in plan.files:
            if run.is_done(file):
                run.bar.add(file.size_bytes)
                run.bar.part_done()
            else:
                errands.append(_Writing(run, file, place, paths))
        crew.carry_out(errands)

    def _needs(self, plan: Plan) -> Needs:
        buffers = peak_memory_bytes(plan, 1)
        if not plan.computed_tensors:
            return Needs(PLAIN_BYTES + buffers)
        return Needs(COMPUTING_BYTES + buffers, self.device)


class _Writing:
    """The errand of one file, in the process that holds the target. ``paths`` are absolute, by the plan's."""

    def __init__(self, run: Run, file: PlannedFile, place: Place, paths: Mapping[str, str]) -> None:
        self._run, self._file, self._place, self._paths = run, file, place, paths
        self.name, self.size_bytes = file.name, file.size_bytes
        self._shown = self._read = 0
        self._counted: int | None = None  # bytes of this attempt that were there, or are counted as written

    def order(self, device: DeviceName) -> Order:
        """Only what this file is made from travels, not the plan."""
        tensors = {name: anchored(tensor, self._paths) for name, tensor in self._file.tensors.items()}
        used = {part.path for tensor in self._file.tensors.values() for part in stored_parts(tensor)}
        stamps = {self._paths[path]: self._run.plan.stamps[path] for path in used if path in self._paths}
        partial = self._place.target / self._run.partial(self._file).name
        self._counted = None
        before = self._run.history.get(self.name)
        return Order(self._place, replace(self._file, tensors=tensors), partial, before, stamps, device, endpoints())

    def heard(self, news: News) -> None:
        """Journal what is durable; give a file that is whole its name."""
        self._show(news.position)
        self._run.count(read=news.read_bytes - self._read)
        self._read = news.read_bytes
        if news.durable is not None:
            self._run.record(self._file, news.durable)
            self._count(news, news.durable.bytes)
        if isinstance(news.result, str):
            self._run.place(self._file, news.result)
            self._count(news, self.size_bytes)

    def lost(self) -> None:
        """What is not durable will be written again."""
        self._show(self._safe_bytes())
        self._read = 0

    def _safe_bytes(self) -> int:
        before = self._run.history.get(self.name)
        return before.bytes if before is not None and not before.done else 0

    def _count(self, news: News, position: int) -> None:
        """Bytes up to ``position`` are written for good: what is written again after a death is counted once."""
        counted = news.kept_bytes if self._counted is None else self._counted
        self._run.count(written=max(0, position - counted))
        self._counted = max(counted, position)

    def _show(self, position: int) -> None:
        self._run.bar.add(position - self._shown)
        self._shown = position


def anchored(tensor: LazyTensor, paths: Mapping[str, str]) -> LazyTensor:
    """The tensor with other paths: tasks run in other folders than the command that made the plan."""
    if isinstance(tensor, Stored):
        return replace(tensor, path=paths.get(tensor.path) or absolute(tensor.path))
    changed: dict[str, Any] = {}
    for item in fields(tensor):
        value = getattr(tensor, item.name)
        if isinstance(value, tuple) and value and is_dataclass(value[0]):
            changed[item.name] = tuple(anchored(part, paths) for part in value)
        elif is_dataclass(value):
            changed[item.name] = anchored(value, paths)  # type: ignore[arg-type]
    return replace(tensor, **changed)


def absolute(path: str) -> str:
    """The path from the root, unless it is an address."""
    return path if is_address(path) else str(Path(path).absolute())
