"""What a smoke test found: checks, and the verdict over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weightkit.errors import printable

_WORDS = {True: "ok", False: "NOT OK", None: "not checked"}


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: what was tried, such as ``finite logits``.
        ok: how it went; None where it could not be tried, or there is nothing to judge it by.
        detail: what was found; of None, why. Lines after the first are shown indented.
        figures: what was measured, by name; plain values that JSON can hold.
    """

    name: str
    ok: bool | None
    detail: str
    figures: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain values by field. Figures that are not finite are text (``nan``, ``inf``): JSON has no numbers for
        them."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "figures": _plain(self.figures)}


@dataclass(frozen=True)
class Verdict:
    """All checks of one target.

    Attributes:
        title: what was tested, such as a path or an address.
        checks: in the order in which they were made.
    """

    title: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed, and at least one was made."""
        judged = [check.ok for check in self.checks if check.ok is not None]
        return bool(judged) and all(judged)

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return {"title": self.title, "ok": self.ok, "checks": [check.to_json() for check in self.checks]}

    def render(self) -> str:
        """Text for a terminal: a line a check, its further lines below it, and the verdict."""
        name_width = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{printable(self.title)}:"]
        for check in self.checks:
            first, *more = printable(check.detail).splitlines() or [""]
            lines.append(f"  {_WORDS[check.ok]:11}  {check.name:{name_width}}  {first}".rstrip())
            lines += [f"  {'':11}  {'':{name_width}}  {line}" for line in more]
        return "\n".join([*lines, self._conclusion()])

    def _conclusion(self) -> str:
        failed = [check.name for check in self.checks if check.ok is False]
        if failed:
            return f"Not ok: {', '.join(failed)}."
        if not self.ok:
            return "Not ok: nothing could be checked."
        left = sum(check.ok is None for check in self.checks)
        passed = len(self.checks) - left
        return f"Ok: {passed} check{'s' * (passed > 1)} passed" + (f", {left} not made." if left else ".")


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
