"""Plan and carry out a fetch in one call."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weightkit.durable import FULL, no_space, only_writer
from weightkit.errors import PlanError, TargetError
from weightkit.hub.line import READ_BYTES, Shared
from weightkit.hub.partial import Grain
from weightkit.hub.plan import FetchPlan, make_shared, plan_fetch, require_space
from weightkit.hub.run import Run, seal
from weightkit.hub.state import Record
from weightkit.machine import JOBS
from weightkit.progress import Progress
from weightkit.remote.patience import Patience, Throttle
from weightkit.units import human_bytes, human_seconds


@dataclass(frozen=True)
class Fetched:
    """What a fetch did.

    Attributes:
        target: the folder.
        hub, repo, revision, commit: where the files are from.
        files: in the target.
        size_bytes: of these.
        fetched_bytes: that came over the network, by hub; what was fetched twice counts twice.
        notes: what happened on the way.
        wall_s: seconds.
    """

    target: Path
    hub: str
    repo: str
    revision: str
    commit: str
    files: int
    size_bytes: int
    fetched_bytes: Mapping[str, int]
    wall_s: float
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, object]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"target": str(self.target), "fetched_bytes": dict(self.fetched_bytes), "notes": [*self.notes]}

    def render(self) -> str:
        """For people."""
        held = f"{self.target}: {self.files:,} files, {human_bytes(self.size_bytes)}, all verified"
        total = sum(self.fetched_bytes.values())
        if not total:
            return f"{held}; nothing to fetch ({human_seconds(self.wall_s)})"
        hubs = ", ".join(f"{human_bytes(count)} from {name}" for name, count in self.fetched_bytes.items() if count)
        return f"{held}; {hubs} in {human_seconds(self.wall_s)} ({human_bytes(total / max(self.wall_s, 1e-9))}/s)"


def fetch(
    model: str,
    target: str | Path | None = None,
    *,
    hub: str = "auto",
    revision: str | None = None,
    jobs: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    no_mtp: bool = False,
    check: bool = False,
    max_rate: float | None = None,
    token: str | None = None,
    progress: bool = True,
    patience: Patience | None = None,
    grain: Grain | None = None,
) -> Fetched:
    """Fetch a model from Hugging Face or ModelScope; every file is verified, and a stopped fetch is continued.

    Args:
        model: a manifest's name, such as ``deepseek-v3``, or a repository, ``owner/name``.
        target: a folder; default the model's place in the workspace.
        hub: ``auto`` (the faster one serves, the other steps in), ``huggingface``, ``modelscope``, or ``both`` at once.
        revision: branch, tag or commit; default the manifest's, or the hub's main branch. It is pinned to a commit
            first, and a later run into the same target keeps that commit.
        jobs: streams at once; files, or ranges of one; default 8.
        include, exclude: shell patterns of paths.
        no_mtp: leave out files that hold MTP tensors alone. Index and config then say so, so that the folder verifies.
        check: hash files again that did not change since they were verified, and mend those that are damaged.
        max_rate: bytes a second, all streams together.
        token: for the hub; default what its client has.
        progress: show a bar.
        patience: how failures are met.
        grain: how files are divided.

    Raises:
        PlanError, HubError, TargetError, SpaceError: before anything is written.
        FetchError: files that did not come; all others are in place.
        SpaceError, TargetError: of a disk that fails on the way.
        Interrupted: by Ctrl-C.
        After any of these the next run continues.
    """
    if jobs is not None and jobs < 1:
        raise PlanError("not a number of jobs", where="--jobs", expected="at least 1", found=jobs)
    if max_rate is not None and not max_rate > 0:
        raise PlanError("not a rate", where="--max-rate", expected="more than 0 bytes a second", found=max_rate)
    started, patience = time.monotonic(), patience or Patience()
    plan = plan_fetch(
        model,
        target,
        hub=hub,
        revision=revision,
        include=include,
        exclude=exclude,
        no_mtp=no_mtp,
        check=check,
        token=token,
        patience=patience,
    )
    return execute(
        plan,
        jobs=jobs,
        max_rate=max_rate,
        progress=progress,
        patience=patience,
        grain=grain,
        started=started,
    )


def execute(
    plan: FetchPlan,
    *,
    jobs: int | None = None,
    max_rate: float | None = None,
    progress: bool = True,
    patience: Patience | None = None,
    grain: Grain | None = None,
    started: float | None = None,
) -> Fetched:
    """Carry out a plan. Arguments and errors as of ``fetch``."""
    started, grain = time.monotonic() if started is None else started, grain or Grain()
    if plan.complete:
        return _result(plan, {}, started, plan.notes)
    require_space(plan)
    stop = threading.Event()
    shared = make_shared(plan.sources, patience or Patience(), stop)
    shared.throttle, shared.spread = Throttle(max_rate, stop), plan.spread
    shared.read_bytes = min(READ_BYTES, grain.chunk_bytes)
    try:
        plan.target.mkdir(parents=True, exist_ok=True)
        with only_writer(plan.target):
            notes = _run(plan, shared, jobs or JOBS, grain, progress)
    except OSError as exc:
        if exc.errno in FULL:
            raise no_space(plan.target) from exc
        raise TargetError(
            f"cannot be written ({exc.strerror})", where=exc.filename or plan.target, fix="Name another target."
        ) from exc
    given = {name: health.bytes_fetched for name, health in shared.health.items()}
    return _result(plan, given, started, [*plan.notes, *notes])


def _run(plan: FetchPlan, shared: Shared, jobs: int, grain: Grain, progress: bool) -> list[str]:
    """Do it, as the only writer. What is to be told."""
    plan.state.listings, plan.state.no_mtp = list(plan.listings), plan.no_mtp
    plan.state.skipped, plan.state.derived = list(plan.skipped), list(plan.derived)
    record = Record(plan.target, plan.state)
    todo = (*plan.unchecked, *plan.damaged, *plan.missing)
    total = sum(plan.files[path].size_bytes for path in todo)
    notes: list[str] = []
    with Progress(total, plan.target.name, shown=progress, parts=len(todo)) as bar:

        def tell(note: str) -> None:
            notes.append(note)
            bar.tell(note)

        shared.tell = tell
        for note in plan.notes:
            bar.tell(note)
        record.pin()
        run = Run(plan, record, shared, grain, bar)
        try:
            run.execute(jobs)
            seal(plan, record)
        finally:
            run.close()
            record.close()
    return notes


def _result(plan: FetchPlan, given: Mapping[str, int], started: float, notes: Sequence[str]) -> Fetched:
    listing, sizes = plan.listing, plan.size_bytes + sum(map(len, plan.derived.values()))
    return Fetched(
        target=plan.target,
        hub=listing.hub,
        repo=listing.repo,
        revision=listing.revision,
        commit=listing.commit,
        files=len(plan.files) + len(plan.derived),
        size_bytes=sizes,
        fetched_bytes=given,
        wall_s=time.monotonic() - started,
        notes=tuple(notes),
    )
