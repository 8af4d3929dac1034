"""When to try again, and how long to wait first."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TypeVar

from weightkit.errors import Interrupted

Result = TypeVar("Result")
#: A server that asks for a longer wait is not waited for at once; the next attempt asks again.
LONGEST_WAIT_S = 900.0
#: ``RateLimit: "api";r=0;t=55`` of draft-ietf-httpapi-ratelimit-headers: r requests left, window ends in t seconds.
_RATE_LIMIT = re.compile(r"\br\s*=\s*(\d+)\s*;\s*t\s*=\s*(\d+)")


class Hiccup(Exception):  # noqa: N818 - not an error yet
    """An attempt failed in a way that another may not.

    Args:
        reason: for people.
        after_s: how long the server asks to wait.
        unreachable: whether nothing was answered at all.
    """

    def __init__(self, reason: str, *, after_s: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.after_s, self.unreachable = reason, after_s, unreachable


class Stopped(Exception):  # noqa: N818 - asked for
    """This fetch is being stopped."""


@dataclass(frozen=True)
class Patience:
    """How failures are met.

    Attributes:
        attempts: in a row without a byte of progress, for one file on each hub, before it is given up.
        backoff_s: wait after the first of them; doubled for each further one, and taken by a random half to whole.
        longest_backoff_s: no wait of our own is longer.
        connect_s: for a connection.
        stall_s: without a byte; then the stream is dropped and resumed.
        outage_s: how long a hub that does not answer at all is tried, whatever ``attempts`` says.
    """

    attempts: int = 6
    backoff_s: float = 0.5
    longest_backoff_s: float = 30.0
    connect_s: float = 10.0
    stall_s: float = 20.0
    outage_s: float = 180.0

    def wait_s(self, failures: int, hiccup: Hiccup) -> float:
        """How long to wait after so many failures in a row: what the server asks for, up to ``LONGEST_WAIT_S``, or
        more."""
        backoff: float = min(self.backoff_s * 2.0 ** (failures - 1), self.longest_backoff_s)
        backoff *= random.uniform(0.5, 1.0)  # so that many clients do not come back at once
        return max(backoff, min(hiccup.after_s or 0.0, LONGEST_WAIT_S))

    def is_over(self, failures: int, since: float, hiccup: Hiccup) -> bool:
        """Whether to give up after so many failures in a row, the first of them at ``since`` (monotonic)."""
        if failures < self.attempts:
            return False
        return not hiccup.unreachable or time.monotonic() - since >= self.outage_s

    def ask(self, question: Callable[[], Result], stop: threading.Event) -> Result:
        """The answer to a question about metadata, asked again after hiccups.

        Raises the last ``Hiccup``, ``Stopped``, or what the question raises.
        """
        failures = 0
        while True:
            try:
                return question()
            except Hiccup as hiccup:
                failures += 1
                # Nothing has begun yet: a user who is offline is to know it soon.
                if failures >= (min(self.attempts, 3) if hiccup.unreachable else self.attempts):
                    raise
                if stop.wait(self.wait_s(failures, hiccup)):
                    raise Stopped from hiccup


def wait_from_headers(headers: Mapping[str, str]) -> float | None:
    """Seconds that ``Retry-After`` (seconds or a date) or ``RateLimit`` asks to wait; None where neither does."""
    lower = {key.lower(): value for key, value in headers.items()}
    after = lower.get("retry-after", "").strip()
    if after.replace(".", "", 1).isdigit():
        return float(after)
    if after:
        try:
            when = parsedate_to_datetime(after)
        except ValueError:
            when = None
        if when is not None:
            now = datetime.now(timezone.utc)
            return max(0.0, (when.replace(tzinfo=when.tzinfo or timezone.utc) - now).total_seconds())
    limit = _RATE_LIMIT.search(lower.get("ratelimit", ""))
    return float(limit[2]) if limit is not None and limit[1] == "0" else None


class Throttle:
    """A token bucket that threads share: no more than ``rate`` bytes a second, with a quarter of a second's burst."""

    def __init__(self, rate: float | None, stop: threading.Event) -> None:
        self._rate, self._stop = rate, stop
        self._lock = threading.Lock()
        self._free_at = 0.0

    def piece(self, largest: int) -> int:
        """How much to read at once."""
        return largest if self._rate is None else max(1024, min(largest, int(self._rate / 16)))

    def took(self, count: int) -> None:
        """Wait until ``count`` bytes that were read fit the rate."""
        if self._rate is None:
            return
        now = time.monotonic()
        with self._lock:
            self._free_at = max(self._free_at, now - 0.25) + count / self._rate
            wait = self._free_at - now
        if wait > 0 and self._stop.wait(wait):
            raise Stopped


def interrupted(where: object) -> Interrupted:
    """What a stopped fetch ends with."""
    return Interrupted("stopped; what was fetched is kept", where=where, fix="Run the same command again to continue.")
