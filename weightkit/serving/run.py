"""Start an engine, wait until it is ready, test it, and stop it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weightkit.errors import WeightkitError, raise_all
from weightkit.manifests import Manifest
from weightkit.serving.client import TIMEOUT_S, Client
from weightkit.serving.demo import smoke_demo
from weightkit.serving.endpoint import smoke_endpoint
from weightkit.serving.launch import Launch
from weightkit.serving.machine import machine_problems
from weightkit.serving.process import EngineProcess, interrupts, wait_for
from weightkit.smoke import Verdict
from weightkit.units import human_seconds

READY_S = 3600.0
"""Reading 700 GB from a slow disk takes that long."""
HEALTH_S = 10.0
EVERY_S = 0.5


@dataclass(frozen=True)
class Ran:
    """What came of it.

    Attributes:
        verdict: of the smoke test.
        log: the engine's output.
        ready_s: seconds until it was ready; of the demo, until it was done.
        pid: of the process group that was left running; None where it was stopped.
    """

    verdict: Verdict
    log: Path
    ready_s: float
    pid: int | None

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return {
            "verdict": self.verdict.to_json(),
            "log": str(self.log),
            "ready_s": self.ready_s,
            "pid": self.pid,
        }


def run(
    launch: Launch,
    *,
    manifest: Manifest | None = None,
    keep: bool = False,
    ready_s: float = READY_S,
    timeout_s: float = TIMEOUT_S,
    log: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Ran:
    """Carry a launch out on this machine.

    Args:
        launch: the command.
        manifest: whose answers the engine must give; None: general questions.
        keep: leave a server running once it was ready.
        ready_s: how long it may take to be ready.
        timeout_s: what one request of the smoke test may take.
        log: where its output goes; default: a new file among the temporary ones.
        tell: gets a line on each step, and the log's last line while the engine starts.

    Raises:
        WeightkitError: all problems of the launch and of this machine, before anything is started.
        EngineError: the engine ended by itself, or was not ready in time.
    """
    problems: list[WeightkitError] = [*launch.problems, *machine_problems(launch)]
    raise_all(f"{launch.engine.title} cannot be started here", problems)
    path = log or _new_log(launch)
    tell(f"Log: {path}")
    with interrupts():
        if launch.endpoint is None:
            started = time.monotonic()
            verdict = smoke_demo(launch, path, manifest=manifest, timeout_s=ready_s, tell=tell)
            return Ran(verdict, path, time.monotonic() - started, None)
        with EngineProcess(launch.argv, launch.env, path) as process:
            seconds = _wait(launch, process, ready_s, tell)
            tell(f"{launch.engine.title} is ready after {human_seconds(seconds)}: {launch.endpoint}")
            verdict = smoke_endpoint(launch.endpoint, manifest=manifest, timeout_s=timeout_s)
            process.kept = keep
            return Ran(verdict, path, seconds, process.pid if keep else None)


def _wait(launch: Launch, process: EngineProcess, ready_s: float, tell: Callable[[str], None]) -> float:
    path = launch.engine.health or "/health"
    with Client(launch.endpoint or "", timeout_s=HEALTH_S) as client:
        return wait_for(process, lambda: client.healthy(path), timeout_s=ready_s, every_s=EVERY_S, tell=tell)


def _new_log(launch: Launch) -> Path:
    handle = tempfile.NamedTemporaryFile(prefix=f"weightkit-{launch.engine.name}-", suffix=".log", delete=False)  # noqa: SIM115
    handle.close()
    return Path(handle.name)
