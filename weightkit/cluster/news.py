"""What a task tells the process that started it, while it works.

A task is a generator of ``News``, and its last word is its result or its error. The work itself runs in a thread beside
the generator, so that news are regular, and so that the task notices within a second that it is to stop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass

from weightkit.errors import Interrupted, WeightkitError
from weightkit.writer.journal import Progress

#: Seconds between two news, and between two looks whether to go on.
EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class News:
    """How far a task is.

    Attributes:
        position: bytes of its file that are done.
        kept_bytes: those of them that an earlier attempt had written.
        read_bytes: read so far.
        durable: how much of a written file is safe, where that is more than before.
        gpu: what its node calls the GPU that the task has; None where it has none, or sees all.
        gpu_failure: why the task computes on the CPU, though it was to take a GPU where there is one.
        result: what the task was for; with it, or an error, the task is over.
    """

    position: int = 0
    kept_bytes: int = 0
    read_bytes: int = 0
    durable: Progress | None = None
    gpu: str | None = None
    gpu_failure: str | None = None
    result: object = None
    error: WeightkitError | None = None

    @property
    def is_last(self) -> bool:
        return self.result is not None or self.error is not None


class Desk:
    """Where the work says how far it is; see ``weightkit.writer.files.Observer``. ``read_bytes``, ``gpu`` and
    ``gpu_failure`` are the work's own."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.read_bytes: Callable[[], int] = lambda: 0
        self.gpu: str | None = None
        self.gpu_failure: Callable[[], str | None] = lambda: None
        self._position = self._kept = 0
        self._durable: Progress | None = None
        self._lock = threading.Lock()

    def check_stop(self) -> None:
        """Raises ``Interrupted`` where the task is to stop."""
        if self.stop.is_set():
            raise Interrupted("stopped")

    def kept(self, count: int) -> None:
        self._kept = count
        self._position += count

    def wrote(self, count: int) -> None:
        self._position += count

    def durable(self, progress: Progress) -> None:
        with self._lock:
            self._durable = progress

    def news(self, result: object = None, error: WeightkitError | None = None) -> News:
        """What there is to tell now."""
        with self._lock:
            durable, self._durable = self._durable, None
        read, failure = self.read_bytes(), self.gpu_failure()
        return News(self._position, self._kept, read, durable, self.gpu, failure, result, error)


def tell(work: Callable[[Desk], object], goes_on: Callable[[], bool]) -> Generator[News, None, None]:
    """Do the work, and tell of it.

    Args:
        work: returns the result, which is not None; a ``WeightkitError`` is told, any other error is raised.
        goes_on: whether it is still wanted. A task that begins late, on a node taken for dead, may not be.
    """
    desk = Desk()
    if not goes_on():
        yield desk.news(error=Interrupted("stopped"))
        return
    outcome: list[object] = []

    def do() -> None:
        try:
            outcome.append(work(desk))
        except BaseException as exc:
            outcome.append(exc)

    thread = threading.Thread(target=do, name="weightkit", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(EVERY_S)
            if thread.is_alive():
                if not goes_on():
                    desk.stop.set()
                yield desk.news()
    finally:
        desk.stop.set()
        thread.join()
    (ended,) = outcome
    if isinstance(ended, WeightkitError):
        yield desk.news(error=ended)
    elif isinstance(ended, BaseException):
        raise ended
    else:
        yield desk.news(result=ended)
