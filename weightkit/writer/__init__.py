"""The one writer: a plan as data, and its execution with bounded memory, a journal and checksums."""

from weightkit.writer.api import write
from weightkit.writer.executor import Executor, LocalExecutor, Written, execute
from weightkit.writer.plan import Plan, PlannedFile, make_plan
from weightkit.writer.summary import Summary, summarize

__all__ = [
    "Executor",
    "LocalExecutor",
    "Plan",
    "PlannedFile",
    "Summary",
    "Written",
    "execute",
    "make_plan",
    "summarize",
    "write",
]
