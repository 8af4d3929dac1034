"""Answers that say 200 or 206 and are of something else: their bytes do not stay, and the fetch goes on or names it."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
from faulty_hub import FaultyHub, Status
from fetching import FIRST, SIZE, WEIGHTS, get, require_whole

from weightkit.checkpoint.lock import read_lock
from weightkit.errors import FetchError

PORTAL = "<html>log in to the hotel's network</html>"
ODD = {
    "portal": Status(200, {"Content-Type": "text/html"}, PORTAL),
    "longer": Status(200, {}, "x" * (SIZE + 100)),
    "as-long": Status(200, {}, "x" * SIZE),
    "no-range": Status(206, {}, PORTAL),
    "another-range": Status(206, {"Content-Range": f"bytes 5-{SIZE - 1}/{SIZE}"}, "x" * (SIZE - 5)),
    "another-total": Status(206, {"Content-Range": f"bytes 0-9/{SIZE + 7}"}, "x" * 10),
    "compressed-that-is-not": Status(200, {"Content-Encoding": "gzip"}, PORTAL),
    "not-satisfiable": Status(416, {"Content-Range": f"bytes */{SIZE}"}, ""),
    "to-itself": Status(302, {"Location": f"/org/name/resolve/main/{FIRST}"}, ""),
    "to-a-file": Status(302, {"Location": "file:///etc/passwd"}, ""),
    "to-no-host": Status(302, {"Location": "http://[::1"}, ""),
}


@pytest.mark.parametrize("name", ODD)
def test_once(name: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.fail(ODD[name], path=FIRST)
    get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)


@pytest.mark.parametrize("name", ["portal", "as-long", "another-range", "compressed-that-is-not", "to-a-file"])
def test_always(name: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.fail(ODD[name], path=FIRST, times=None)
    with pytest.raises(FetchError, match=FIRST) as failure:
        get(tmp_path / "target")
    assert WEIGHTS[1] not in str(failure.value)
    assert not (tmp_path / "target" / FIRST).exists()
    assert read_lock(tmp_path / "target") is None
    fetch_hub.clear()
    get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)


def test_retry_after_as_a_date(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    then = datetime.now(timezone.utc) + timedelta(seconds=2)
    fetch_hub.fail(Status(429, {"Retry-After": format_datetime(then, usegmt=True)}, "slow down"), path=FIRST)
    started = time.monotonic()
    get(tmp_path / "target", jobs=1)
    assert time.monotonic() - started >= 0.9  # a date has whole seconds
    require_whole(tmp_path / "target", fetch_source)
