"""Plan and execute in one call, for notebooks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from weightkit.checkpoint import Checkpoint
from weightkit.compute import start_engine
from weightkit.compute.engines import DeviceName
from weightkit.layouts import FileSet, lay_out_published
from weightkit.writer.executor import Executor, Written, execute
from weightkit.writer.plan import make_plan


def write(
    what: Checkpoint | FileSet,
    target: str | Path,
    *,
    jobs: int | None = None,
    device: DeviceName = "auto",
    executor: Executor | None = None,
    progress: bool = True,
    force: bool = False,
    spool_bytes: int | None = None,
) -> Written:
    """Write a checkpoint (in the published layout) or a file set (``shard``'s result) into the folder ``target``.

    Args:
        what: from ``open_checkpoint`` and any transforms.
        target: a folder; made where it is not there. A stopped write into it is continued.
        jobs: files in work at once.
        device: where FP8 is dequantized: ``auto``, ``cuda`` or ``cpu``. The bits do not depend on it.
        executor: who fills the files, such as a ``RayExecutor`` with jobs and device of its own; default this process.
        progress: show a bar.
        force: replace what an earlier write left in the target.
        spool_bytes: of a remote source, most disk for its files on their way; see ``execute``.

    Raises: as ``execute`` and ``make_plan``.
    """
    plan = make_plan(lay_out_published(what) if isinstance(what, Checkpoint) else what, target)
    return execute(
        plan,
        jobs=jobs,
        engine=partial(start_engine, device) if executor is None else None,
        executor=executor,
        progress=progress,
        force=force,
        spool_bytes=spool_bytes,
    )
