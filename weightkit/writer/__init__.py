"""The one writer: a plan as data, and its execution with bounded memory, a journal and checksums."""

from weightkit.writer.api import write
from weightkit.writer.execute import Written, execute
from weightkit.writer.plan import Plan, PlannedFile, make_plan

__all__ = ["Plan", "PlannedFile", "Written", "execute", "make_plan", "write"]
