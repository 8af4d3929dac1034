"""The tests' hub does what it says: each fault, seen by a client that knows nothing but sockets and HTTP."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from faulty_hub import (
    Cut,
    Delay,
    FaultyHub,
    Flip,
    IgnoreRange,
    NoLength,
    Redirect,
    Reset,
    Short,
    Stall,
    Status,
    Swap,
    Throttle,
    gated,
    rate_limited,
    spawn_hub,
)
from raw_http import Got, get

Url = Callable[[FaultyHub], str]
NAME = "org/name"
BIG = "model.safetensors"
SIZE = 3_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "inference").mkdir(parents=True)
    (folder / BIG).write_bytes(random.Random(0).randbytes(SIZE))
    (folder / "config.json").write_text("{}")
    (folder / "inference/model.py").write_text("x = 1\n")
    (folder / ".hidden").write_text("no")
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[FaultyHub]:
    with FaultyHub({NAME: folder}) as running:
        yield running


def body_url(hub: FaultyHub, path: str = BIG) -> str:
    return f"{hub.endpoint}/{NAME}/resolve/main/{path}"


def modelscope_url(hub: FaultyHub, path: str = BIG) -> str:
    return f"{hub.endpoint}/api/v1/models/{NAME}/repo?Revision=master&FilePath={path}"


def test_without_faults(hub: FaultyHub, folder: Path) -> None:
    for url in (body_url(hub), modelscope_url(hub)):
        assert get(url).body == (folder / BIG).read_bytes()
    assert hub.sent_bytes(BIG) == 2 * SIZE
    assert [e.protocol for e in hub.requests(route="body")] == ["huggingface", "modelscope"]
    assert get(body_url(hub, ".hidden")).status == 404
    assert get(f"{hub.endpoint}/api/models/no/such").status == 404


@pytest.mark.parametrize("url", [body_url, modelscope_url])
def test_cut_at_a_place_each_time(hub: FaultyHub, folder: Path, url: Url) -> None:
    hub.fail(Cut(at=1_000_000), times=2)
    whole = (folder / BIG).read_bytes()
    first = get(url(hub))
    second = get(url(hub), {"Range": "bytes=900000-"})
    third = get(url(hub), {"Range": "bytes=1000000-"})
    assert (first.error, first.body) == ("short", whole[:1_000_000])
    assert (second.error, second.body) == ("short", whole[900_000:1_000_000])
    assert (third.error, third.body) == (None, whole[1_000_000:])
    assert hub.sent_bytes() == 1_000_000 + 100_000 + 2_000_000


def test_reset(hub: FaultyHub) -> None:
    hub.fail(Reset(after=500_000))
    got = get(body_url(hub))
    assert got.error == "ConnectionResetError"
    assert len(got.body) <= 500_000
    assert get(body_url(hub)).error is None


def test_short_is_well_formed(hub: FaultyHub, folder: Path) -> None:
    hub.fail(Short(by=7), times=2)
    whole = (folder / BIG).read_bytes()
    first, second = get(body_url(hub)), get(body_url(hub), {"Range": "bytes=10-"})
    assert (first.error, first.body) == (None, whole[:-7])
    assert (second.body, second.headers["Content-Range"]) == (whole[10:-7], f"bytes 10-{SIZE - 8}/{SIZE}")


def test_flip_only_where_the_byte_is_sent(hub: FaultyHub, folder: Path) -> None:
    hub.fail(Flip(at=2_000_000))
    whole = (folder / BIG).read_bytes()
    assert get(body_url(hub), {"Range": "bytes=0-99"}).body == whole[:100]
    bad = get(body_url(hub)).body
    assert [at for at in range(SIZE) if bad[at] != whole[at]] == [2_000_000]
    assert get(body_url(hub)).body == whole


def test_statuses_by_route_and_protocol(hub: FaultyHub) -> None:
    hub.fail(rate_limited(3, style="ratelimit"), route="tree", protocol="huggingface", skip=1)
    tree, files = f"{hub.endpoint}/api/models/{NAME}/tree/main", f"{hub.endpoint}/api/v1/models/{NAME}/repo/files"
    assert get(tree).status == 200
    assert get(files).status == 200
    limited = get(tree)
    assert (limited.status, limited.headers["RateLimit"], limited.headers["Retry-After"]) == (
        429,
        '"api";r=0;t=3',
        None,
    )
    assert get(tree).status == 200
    hub.fail(Status(503), route="head")
    assert get(body_url(hub), method="HEAD").status == 503
    hub.fail(gated(), route="*", times=None)
    assert {get(url).status for url in (tree, files, body_url(hub), modelscope_url(hub))} == {403}
    hub.clear()
    hub.fail(Status(500), path="config.json", times=None)
    assert get(body_url(hub, "config.json")).status == 500
    assert get(body_url(hub)).status == 200


def test_stall_delay_and_throttle(hub: FaultyHub) -> None:
    hub.fail(Stall(after=100, seconds=0.4))
    hub.fail(Delay(0.3), path="config.json")
    hub.fail(Throttle(100_000), path="inference/*")
    started = time.monotonic()
    assert len(get(body_url(hub)).body) == SIZE
    assert 0.4 <= time.monotonic() - started < 300
    started = time.monotonic()
    get(body_url(hub, "config.json"))
    assert time.monotonic() - started >= 0.3
    hub.fail(Throttle(1_000_000))
    started = time.monotonic()
    get(body_url(hub), {"Range": "bytes=0-299999"})
    assert 0.25 < time.monotonic() - started < 300


def test_range_ignored_and_length_left_out(hub: FaultyHub) -> None:
    hub.fail(IgnoreRange())
    hub.fail(NoLength(), skip=1)
    got = get(body_url(hub), {"Range": "bytes=5-"})
    assert (got.status, len(got.body), got.headers["Content-Range"]) == (200, SIZE, None)
    got = get(body_url(hub), {"Range": "bytes=5-"})
    assert (got.status, len(got.body), got.headers["Content-Length"]) == (206, SIZE - 5, None)


@pytest.mark.parametrize("url", [body_url, modelscope_url])
def test_signed_redirect_expires(hub: FaultyHub, folder: Path, url: Url) -> None:
    hub.fail(Redirect(uses=1), times=None, path=BIG)
    hub.fail(Cut(at=1_000_000), route="signed")
    location = get(url(hub), {"Authorization": "Bearer x"})
    assert location.status == 302
    host = urlsplit(location.headers["Location"])
    assert host.hostname == "localhost"
    assert host.port != urlsplit(hub.endpoint).port
    assert get(location.headers["Location"]).error == "short"
    assert get(location.headers["Location"]).status == 403
    fresh = get(url(hub))
    rest = get(fresh.headers["Location"], {"Range": "bytes=1000000-"})
    assert rest.body == (folder / BIG).read_bytes()[1_000_000:]
    assert [e.authorization for e in hub.requests(server="storage")] == [None, None, None]
    hub.clear()
    hub.fail(Redirect(lifetime_s=60))
    assert get(get(url(hub)).headers["Location"]).status == 200
    hub.clear()
    hub.fail(Redirect(lifetime_s=0.2))
    short = get(url(hub)).headers["Location"]
    time.sleep(0.25)
    assert get(short).status == 403


def test_swap_midway(hub: FaultyHub, folder: Path) -> None:
    whole, commit = (folder / BIG).read_bytes(), hub.commit(NAME)
    hub.fail(Swap(after=1_000_000))
    old = get(body_url(hub))
    assert (old.error, old.body) == ("short", whole[:1_000_000])
    tag = {"If-Range": old.headers["ETag"], "Range": "bytes=1000000-"}
    new = get(body_url(hub).replace("main", commit), tag)
    assert (new.status, len(new.body)) == (200, SIZE)
    assert new.headers["ETag"] == f'"{hashlib.sha256(new.body).hexdigest()}"' != old.headers["ETag"]
    assert hub.commit(NAME) == commit
    moved = hub.replace(NAME, BIG)
    assert moved == hub.commit(NAME) != commit
    assert get(body_url(hub).replace("main", commit)).headers["X-Repo-Commit"] == commit


def test_listings_that_lie(hub: FaultyHub) -> None:
    hub.edit_listing(BIG, sha256="0" * 64)
    hub.edit_listing("config.json", size=5, oid="1" * 40)
    hub.add_to_listing("../../outside", b"gotcha")
    at = f"{hub.endpoint}/api"
    tree = {entry["path"]: entry for entry in get(f"{at}/models/{NAME}/tree/main?recursive=true").json()}
    info = get(f"{at}/models/{NAME}?blobs=true").json()["siblings"]
    siblings = {entry["rfilename"]: entry for entry in info}
    files = {
        entry["Path"]: entry
        for entry in get(f"{at}/v1/models/{NAME}/repo/files?Recursive=True").json()["Data"]["Files"]
    }
    assert tree[BIG]["lfs"]["oid"] == siblings[BIG]["lfs"]["sha256"] == files[BIG]["Sha256"] == "0" * 64
    assert tree["config.json"]["oid"] == siblings["config.json"]["blobId"] == "1" * 40
    assert tree["config.json"]["size"] == siblings["config.json"]["size"] == files["config.json"]["Size"] == 5
    assert all("../../outside" in listing for listing in (tree, siblings, files))
    assert get(f"{hub.endpoint}/{NAME}/resolve/main/..%2F..%2Foutside").body == b"gotcha"


def test_down_and_up_on_the_same_port(hub: FaultyHub) -> None:
    before = hub.endpoint
    hub.stop()
    assert get(body_url(hub)).error == "ConnectionRefusedError"
    hub.start()
    assert hub.endpoint == before
    assert get(body_url(hub)).status == 200


def test_stop_cuts_what_is_under_way(hub: FaultyHub) -> None:
    hub.fail(Throttle(1000, 256))  # most of an hour
    got: list[Got] = []
    thread = threading.Thread(target=lambda: got.append(get(body_url(hub))))
    thread.start()
    while not hub.sent_bytes():
        time.sleep(0.01)
    started = time.monotonic()
    hub.stop()
    thread.join(120)
    assert time.monotonic() - started < 100
    assert got[0].error is not None


def test_token(folder: Path) -> None:
    with FaultyHub({NAME: folder}, token="secret") as hub:
        assert get(body_url(hub)).status == 401
        assert get(body_url(hub), {"Authorization": "Bearer secret"}).status == 200
        hub.fail(Redirect(), times=None)
        assert get(get(body_url(hub), {"Authorization": "Bearer secret"}).headers["Location"]).status == 200


def test_in_a_process_of_its_own(folder: Path) -> None:
    with spawn_hub({NAME: folder}) as hub:
        hub.fail(Cut(after=10), path=BIG)
        url = f"{hub.endpoint}/{NAME}/resolve/main/{BIG}"
        assert len(get(url).body) == 10
        assert len(get(url).body) == SIZE
        assert hub.sent_bytes() == SIZE + 10
        assert [e.status for e in hub.log] == [200, 200]
