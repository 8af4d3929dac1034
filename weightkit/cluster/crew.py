"""Tasks on the nodes of a cluster: sent, listened to, and sent again where a worker or a node died.

Which node gets a task is decided here, not by Ray's scheduler: so many at once on each node, the node with the most
room first. Ray starts the processes, counts CPUs, GPUs and memory, and says what died.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from weightkit.cluster.connection import Node, nodes
from weightkit.cluster.news import News
from weightkit.cluster.sight import INSTALL
from weightkit.compute.engines import DeviceName, reason
from weightkit.errors import ClusterError, DeviceError, Interrupted, SpaceError, WeightkitError, raise_all
from weightkit.machine import JOBS
from weightkit.units import counted, human_bytes

#: A file is tried so often before the run gives up on it.
ATTEMPTS = 4
#: Under ``auto`` a GPU is given to a file so often: it may be what ends the processes.
GPU_ATTEMPTS = 2
#: How often the list of nodes is asked for; how long one that failed gets no work; how long a node that is gone may be
#: silent; how long to wait for a node where none is left.
NODES_EVERY_S = 1.0
BENCH_S = 5.0
SILENCE_S = 30.0
NO_NODE_S = 60.0
#: How long tasks that were told to stop may take to tell what they have done.
STOP_S = 10.0
#: How long a task may take to begin before that is said.
BEGIN_S = 60.0
#: How long a node may take to start its first process and look for the files.
LOOK_S = 120.0


class Errand(Protocol):
    """What one task is for."""

    name: str
    size_bytes: int

    def order(self, device: DeviceName) -> object:
        """What the task gets, which then computes on ``device``. Asked anew for each attempt."""
        ...

    def heard(self, news: News) -> None:
        """News of it, the last among them unless it is an error."""
        ...

    def lost(self) -> None:
        """An attempt is over without a result."""
        ...


@dataclass(frozen=True)
class Needs:
    """Of one task.

    Attributes:
        memory_bytes: of its process.
        device: where it computes; None where it does not.
    """

    memory_bytes: int
    device: DeviceName | None = None


@dataclass(frozen=True)
class Room:
    """How many tasks at once a node has room for, and the share of a GPU that each of them gets."""

    node: Node
    tasks: int
    gpus: float


def room_on(node: Node, needs: Needs, jobs: int | None) -> Room:
    """What a node has room for, by its CPUs and memory; ``jobs`` tasks at most, by default 8."""
    tasks = min(jobs or JOBS, int(node.cpus), int(node.memory_bytes // max(1, needs.memory_bytes)))
    if needs.device in (None, "cpu") or not tasks:
        return Room(node, tasks, 0.0)
    if node.gpus < 1:
        return Room(node, 0 if needs.device == "cuda" else tasks, 0.0)
    return Room(node, tasks, _share(tasks, int(node.gpus)))


def _share(tasks: int, gpus: int) -> float:
    """The part of one GPU that each task gets, so that all have a place: no task lies on two of them."""
    return int(1000 / max(1, -(-tasks // gpus))) / 1000


def require_room(found: Sequence[Node], needs: Needs, jobs: int | None) -> None:
    """Raise what is missing where no node has room for a task."""
    if any(room_on(node, needs, jobs).tasks for node in found):
        return
    if needs.device == "cuda" and not any(node.gpus for node in found):
        raise DeviceError(
            "no node of the cluster has a GPU",
            where="--device",
            found=", ".join(node.name for node in found) or "no node",
            fix="Use --device auto or cpu: the bits are the same.",
        )
    if any(node.cpus >= 1 for node in found):
        raise SpaceError(
            "no node of the cluster has the memory for one task",
            expected=human_bytes(needs.memory_bytes),
            found=", ".join(f"{node.name} {human_bytes(node.memory_bytes)}" for node in found),
        )
    raise ClusterError(
        "no node of the cluster has a CPU to give",
        found=", ".join(node.name for node in found) or "no node",
        fix="Start nodes with --num-cpus of at least 1.",
    )


@dataclass
class _Task:
    """One attempt of an errand. ``stream`` is Ray's, of its news."""

    errand: Errand
    node: Node
    stream: Any
    device: DeviceName
    heard_at: float = field(default_factory=time.monotonic)
    has_begun: bool = False


class Crew:
    """Carries errands out, each by a task.

    A node whose GPU cannot be used, or fails on the way, gets no more work for it in this run, which is said once.
    Under ``auto`` its CPU goes on, and so does a file that met the failure. Under ``cuda`` the node is left out, as one
    without a GPU is: who has waited for a cluster is served better by the other nodes than by an error. Where no
    node's GPU works, that is the error.

    Of several GPUs of a node the others go on. Which of them a task gets, Ray decides, and knows of no broken one:
    under ``auto`` tasks that get it compute on the CPU, under ``cuda`` one that failed on it keeps it until the run is
    over (see ``weightkit.cluster.filling.write_file``), so that no other does.

    Args:
        ray: connected.
        work: what a task does with its order: a generator of news.
        needs: of one task.
        jobs: tasks at once on a node; default 8, and no more than its CPUs.
        look: what each node is asked before it gets work, and with what arguments; it raises what is wrong there.
        revoke: tells tasks to stop by themselves; without it they are cancelled.
        tell: a line for people.
    """

    def __init__(
        self,
        ray: Any,
        work: Callable[[Any], Iterator[News]],
        needs: Needs,
        *,
        jobs: int | None = None,
        look: tuple[Callable[..., object], Sequence[object]],
        revoke: Callable[[], None] | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._ray, self._work, self._needs, self._jobs = ray, ray.remote(work), needs, jobs
        self._look, self._seen = ray.remote(look[0]), [ray.put(argument) for argument in look[1]]
        self._revoke, self._tell = revoke, tell
        self._rooms: dict[str, Room] = {}  # by id of a node, of those that see the files
        self._looking: dict[Any, Room] = {}  # by Ray's reference to the answer
        self._known: set[str] = set()
        self._benched: dict[str, float] = {}
        self._attempts: Counter[str] = Counter()
        self._broken: dict[str, str] = {}  # by id of a node, what became of its GPUs
        self._broken_gpus: defaultdict[str, set[str]] = defaultdict(set)  # by id of a node
        self._kept: Counter[str] = Counter()  # by id of a node, tasks that keep a broken GPU to themselves
        self._kept_waiting: set[str] = set()  # nodes of which it is said that a task there does not begin
        self._on_cpu: set[str] = set()  # names of errands that met a failing GPU
        self._refusals: list[WeightkitError] = []
        self._waiting: deque[Errand] = deque()
        self._tasks: dict[Any, _Task] = {}
        self._alive: set[str] = set()
        self._asked_at = self._had_room_at = 0.0
        self._begun = False  # from then on a node that does not see the files is left out, and stops nothing

    def carry_out(self, errands: Iterable[Errand]) -> None:
        """All of them, the largest first.

        Raises:
            WeightkitError: the first failure of a task, its place with the node's name; all others are stopped then.
            ClusterError: nodes that do not see the files, or none that is left.
            DeviceError: under ``cuda``, no node is left whose GPU works.
        """
        self._waiting.extend(sorted(errands, key=lambda errand: -errand.size_bytes))
        if not self._waiting:
            return
        try:
            self._first_nodes()
            self._begun, self._had_room_at = True, time.monotonic()
            while self._waiting or self._tasks:
                self._send()
                self._listen(0.2)
                self._ask_for_nodes()
        except BaseException:
            self._stop()
            raise

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _ask_for_nodes(self) -> None:
        """Which are alive; new ones are asked whether they see the files."""
        now = time.monotonic()
        if now - self._asked_at < NODES_EVERY_S:
            return
        self._asked_at = now
        found = nodes(self._ray)
        self._alive = {node.id for node in found}
        for node in found:
            if node.id not in self._known and (room := room_on(node, self._needs, self._jobs)).tasks:
                self._known.add(node.id)
                answer = self._look.options(num_cpus=0, **on_node(self._ray, node)).remote(*self._seen)
                self._looking[answer] = room
        for answer in self._ray.wait(list(self._looking), timeout=0)[0] if self._looking else []:
            self._looked(answer, self._looking.pop(answer))

    def _first_nodes(self) -> None:
        """Ask the nodes that there are, and wait for their answers. Raises what they find wrong."""
        require_room(nodes(self._ray), self._needs, self._jobs)
        until = time.monotonic() + LOOK_S
        while self._looking or not self._known:
            self._ask_for_nodes()
            if self._looking:
                self._ray.wait(list(self._looking), timeout=NODES_EVERY_S)
            if time.monotonic() > until:
                break
            self._asked_at = 0.0
        raise_all("nodes of the cluster cannot do the work", self._refusals)

    def _looked(self, answer: Any, room: Room) -> None:
        """A node that sees everything gets work from now on."""
        try:
            self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as exc:
            refusal = of_node(exc, room.node)
            self._refusals.append(refusal)
            if self._begun:
                self._tell(f"A new node gets no work. {refusal}")
        except self._ray.exceptions.RayError as exc:  # it is gone again
            self._tell(f"A node gets no work. {of_node(exc, room.node)}")
        else:
            self._rooms[room.node.id] = room

    def _free(self) -> Room | None:
        """The node with the most room that is left; None where all are busy."""
        busy, now = Counter(task.node.id for task in self._tasks.values()), time.monotonic()
        rooms = [
            room for id, room in self._rooms.items() if id in self._alive and self._benched.get(id, 0.0) + BENCH_S < now
        ]
        if rooms or self._tasks:
            self._had_room_at = now
        elif self._broken and not self._rooms and not self._looking:
            raise DeviceError(
                "no node of the cluster has a GPU that works",
                where="--device",
                found=", ".join(self._broken.values()),
                fix="Use --device auto or cpu: the bits are the same. What was written is kept.",
            )
        elif now - self._had_room_at > NO_NODE_S:
            raise ClusterError(
                "no node of the cluster is left",
                found=f"{counted(len(self._waiting), 'file')} to go",
                fix="Start nodes and run the same command again: it continues where it stopped.",
            )
        best = max(rooms, key=lambda room: room.tasks - busy[room.node.id], default=None)
        return best if best is not None and busy[best.node.id] < best.tasks else None

    # --- tasks --------------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        while self._waiting and (room := self._free()) is not None:
            errand = self._waiting.popleft()
            device = self._device(errand, room)
            options = {
                "num_returns": "streaming",
                "num_cpus": 1,
                "num_gpus": 0 if device == "cpu" else room.gpus,
                **on_node(self._ray, room.node),
            }
            task = self._work.options(memory=self._needs.memory_bytes, name=f"weightkit {errand.name}", **options)
            stream = task.remote(errand.order(device))
            self._tasks[stream] = _Task(errand, room.node, stream, device)

    def _device(self, errand: Errand, room: Room) -> DeviceName:
        """Where an errand is computed on a node."""
        if not room.gpus or self._needs.device is None:
            return "cpu"
        if self._needs.device == "auto" and (
            errand.name in self._on_cpu or self._attempts[errand.name] >= GPU_ATTEMPTS
        ):
            return "cpu"
        return self._needs.device

    def _listen(self, timeout_s: float) -> None:
        """Hear what there is to hear, or wait a little for it."""
        if not self._tasks:
            time.sleep(timeout_s)
            return
        ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=timeout_s)
        if ready:  # all that have news, so that those at the end of the list have their turn
            ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        for stream in ready:
            self._hear(self._tasks[stream])
        now = time.monotonic()
        for task in list(self._tasks.values()):
            if task.node.id not in self._alive and now - task.heard_at > SILENCE_S:
                self._lose(task, "its node is gone")
            elif not task.has_begun and now - task.heard_at > BEGIN_S:
                self._tell_of_waiting(task)

    def _tell_of_waiting(self, task: _Task) -> None:
        if task.node.id not in self._kept_waiting:
            self._kept_waiting.add(task.node.id)
            self._tell(
                f"{task.node.name}: {task.errand.name} waits to begin there. Others may use the CPUs, GPUs or memory"
                " of the node (`ray status` shows it)."
            )

    def _hear(self, task: _Task) -> None:
        errors = self._ray.exceptions
        try:
            news: News = self._ray.get(next(task.stream))
        except StopIteration:
            return self._lose(task, "it ended without a word")
        except errors.RayTaskError as exc:  # raised by the task, and none of ours
            del self._tasks[task.stream]
            raise of_node(exc, task.node) from exc
        except errors.RayError as exc:
            return self._lose(task, type(exc).__name__)
        task.heard_at, task.has_begun = time.monotonic(), True
        if news.is_last:
            del self._tasks[task.stream]
        if news.durable is not None or news.error is None:
            task.errand.heard(news)
        if news.gpu_failure is not None and news.error is None:
            self._leave_gpu(task.node, news.gpu, news.gpu_failure)
        if isinstance(news.error, Interrupted):  # it thought that it was to stop
            self._again(task, "it stopped")
        elif type(news.error) is DeviceError and task.device != "cpu":
            self._on_cpu.add(task.errand.name)
            self._leave_gpu(task.node, news.gpu, reason(news.error))
            self._leave_place(task, reason(news.error))
            self._again(task, reason(news.error), bench=False)
        elif news.error is not None:
            raise _placed(news.error, task.node)
        return None

    def _leave_gpu(self, node: Node, gpu: str | None, why: str) -> None:
        """Count on a broken GPU of a node no more; ``gpu`` None: on none of its GPUs."""
        found = self._broken_gpus[node.id]
        if node.id in self._broken or gpu in found:
            return
        if gpu is not None:
            found.add(gpu)
            if len(found) < node.gpus:
                others = "The others compute; the bytes are the same."
                self._tell(f"{node.name}: GPU {gpu} cannot be used ({why}). {others}")
                return
        self._leave_gpus(node, why)

    def _leave_gpus(self, node: Node, why: str) -> None:
        """Give no task a GPU of a node any more."""
        self._broken[node.id] = f"{node.name} ({why})"
        if self._needs.device == "cuda":
            self._rooms.pop(node.id, None)
            self._tell(f"{node.name}: the GPU cannot be used ({why}). The node gets no more work.")
        else:
            self._rooms[node.id] = replace(self._rooms[node.id], gpus=0.0)
            self._tell(f"{node.name}: the GPU cannot be used ({why}). The CPU computes there; the bytes are the same.")

    def _leave_place(self, task: _Task, why: str) -> None:
        """Under ``cuda`` a task that failed keeps its CPU, its memory and its share of the GPU."""
        room = self._rooms.get(task.node.id)
        if task.device != "cuda" or room is None:
            return
        node = room.node
        self._kept[node.id] += 1
        left = room_on(node, self._needs, int(node.cpus)).tasks - self._kept[node.id]
        places = int(1 / room.gpus) * (int(node.gpus) - len(self._broken_gpus[node.id]))
        self._rooms[node.id] = replace(room, tasks=min(room.tasks, left, places))
        if self._rooms[node.id].tasks < 1:
            self._leave_gpus(node, why)

    def _lose(self, task: _Task, why: str) -> None:
        del self._tasks[task.stream]
        with suppress(Exception):  # where it lives after all
            self._ray.cancel(task.stream, force=True)
        self._asked_at = min(self._asked_at, time.monotonic() - NODES_EVERY_S)
        self._again(task, why)

    def _again(self, task: _Task, why: str, *, bench: bool = True) -> None:
        errand, name = task.errand, task.node.name
        errand.lost()
        self._attempts[errand.name] += 1
        if bench and why not in _WORKER_DIED:
            self._benched[task.node.id] = time.monotonic()
        if self._attempts[errand.name] >= ATTEMPTS:
            raise ClusterError(
                f"given up after {ATTEMPTS} attempts ({why})",
                where=f"{errand.name} (on {name})",
                fix="If the system ends workers for want of memory, use a smaller --jobs. The same command continues.",
            )
        self._tell(f"{errand.name}: lost on {name} ({why}); sent again")
        self._waiting.appendleft(errand)

    def _stop(self) -> None:
        """Have all tasks stop, and hear what they have done until then; a second Ctrl-C cuts that short."""
        with suppress(KeyboardInterrupt):
            if self._revoke is not None:
                with suppress(OSError):  # the failure that stops the run is the one to tell
                    self._revoke()
                until = time.monotonic() + STOP_S
                with suppress(self._ray.exceptions.RayError):  # the cluster itself is gone
                    while self._tasks and time.monotonic() < until:
                        self._hear_last(until)
        for task in self._tasks.values():
            with suppress(Exception):
                self._ray.cancel(task.stream, force=True)
        self._tasks.clear()

    def _hear_last(self, until: float) -> None:
        ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=max(0.0, until - time.monotonic()))
        for stream in ready:
            task = self._tasks[stream]
            try:
                news: News = self._ray.get(next(stream))
                if news.is_last:
                    del self._tasks[stream]
                if news.durable is not None or news.error is None:
                    task.errand.heard(news)
                if news.error is not None:
                    task.errand.lost()
            except (StopIteration, OSError, WeightkitError, self._ray.exceptions.RayError):
                self._tasks.pop(stream, None)  # the failure that stops the run is the one to tell


#: Deaths of a process that say nothing against its node.
_WORKER_DIED = ("WorkerCrashedError", "OutOfMemoryError")
#: What Python says where it cannot unpickle what another weightkit pickled.
_OTHER_CODE = ("cannot import name", "No module named", "Can't get attribute")


def on_node(ray: Any, node: Node) -> dict[str, Any]:
    """Options of a task that runs there and nowhere else, once."""
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)
    return {"scheduling_strategy": strategy, "max_retries": 0}


def of_node(error: Exception, node: Node) -> WeightkitError:
    """What a task raised, or what became of it, with its node."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, WeightkitError):
        return _placed(cause, node)
    if isinstance(cause, ImportError):
        return ClusterError(
            f"weightkit cannot be imported there ({cause})",
            where=node.name,
            fix=INSTALL,
        )
    told = str(cause if cause is not None else error).strip() or type(error).__name__
    if any(words in told for words in _OTHER_CODE):  # what Ray says where it cannot unpickle
        return ClusterError(f"another weightkit ({told.splitlines()[0]})", where=node.name, fix=INSTALL)
    return ClusterError(
        f"{type(cause or error).__name__}: {told.splitlines()[0]}",
        where=node.name,
        fix="Ray's logs of that node, in /tmp/ray/session_latest/logs, say more.",
    )


def _placed(error: WeightkitError, node: Node) -> WeightkitError:
    """The error, its place with the node's name."""
    error.where = f"on {node.name}" if error.where is None else f"{error.where} (on {node.name})"
    return error
