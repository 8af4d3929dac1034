"""Every fault that the two clients were measured with, and more: each ends in the right bytes, or in a clear error and
a state that the next run continues from. What is fetched twice is counted."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_hub import (
    Cut,
    Fault,
    FaultyHub,
    Flip,
    Gather,
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
)
from fetching import (
    CHUNK,
    FIRST,
    GRAIN,
    HASTY,
    NAME,
    PATIENCE,
    SEGMENT,
    SIZE,
    WEIGHTS,
    content,
    get,
    require_whole,
    total,
    weights_sent,
    weights_size,
)

from weightkit.checkpoint.lock import read_lock
from weightkit.errors import (
    AccessError,
    ContentError,
    FetchError,
    ListingError,
    Problems,
    RepositoryError,
    SpaceError,
    UnreachableError,
    WeightkitError,
)
from weightkit.examine import verify
from weightkit.hub import Grain, Patience

HUBS = ["huggingface", "modelscope"]
#: Of random mixtures of faults. More: SEEDS=200.
SEEDS = int(os.environ.get("SEEDS", "6"))
#: What lies in buffers of the sockets when a stream is cut is sent and not received.
IN_FLIGHT = 300_000


@pytest.mark.parametrize("protocol", HUBS)
def test_no_fault(protocol: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    done = get(tmp_path / "target", hub=protocol)
    require_whole(tmp_path / "target", fetch_source)
    assert sum(done.fetched_bytes.values()) == total(fetch_source) == fetch_hub.sent_bytes()
    assert {exchange.protocol for exchange in fetch_hub.log} == {protocol}


# --- streams that end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", HUBS)
@pytest.mark.parametrize("fault", [Cut(after=200_000), Reset(after=200_000)], ids=["cut", "reset"])
def test_connection_ends_once(
    fault: Cut, protocol: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    fetch_hub.fail(fault, path=FIRST)
    get(tmp_path / "target", hub=protocol)
    require_whole(tmp_path / "target", fetch_source)
    assert weights_sent(fetch_hub) <= weights_size() + IN_FLIGHT


def test_connection_cut_after_so_much_each_time(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """More often than there are attempts: a stream that brought something is no failure."""
    fetch_hub.fail(Cut(after=60_000), path=FIRST, times=None)
    done = get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)
    assert done.fetched_bytes["huggingface"] == total(fetch_source)


def test_connection_cut_at_the_same_place_every_time(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """Nothing comes past the place: the file fails, with what came kept; the others are there; the next run goes on."""
    fetch_hub.fail(Cut(at=700_000), path=FIRST, times=None)
    with pytest.raises(FetchError, match=FIRST) as failure:
        get(tmp_path / "target")
    assert "1 of 6 files" in str(failure.value)
    assert set(content(tmp_path / "target")) == {*content(fetch_source), f"{FIRST}.partial"} - {FIRST}
    fetch_hub.settle()
    sent = weights_sent(fetch_hub)
    fetch_hub.clear()
    get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)
    assert weights_sent(fetch_hub) - sent <= SIZE - 700_000


def test_connection_cut_at_the_same_place_on_one_hub_only(
    fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    fetch_hub.fail(Cut(at=700_000), path=FIRST, times=None, protocol="huggingface")
    done = get(tmp_path / "target", hub="auto")
    require_whole(tmp_path / "target", fetch_source)
    assert sum(done.fetched_bytes.values()) == total(fetch_source)


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
def test_body_shorter_than_the_file(
    times: int | None, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    fetch_hub.fail(Short(by=1000), path="*.safetensors", times=times)
    get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)


def test_no_content_length_and_the_body_ends_early(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.fail(NoLength(), path=FIRST, times=None)
    fetch_hub.fail(Cut(after=300_000), path=FIRST)
    get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)


def test_stalled_stream_is_dropped_and_resumed(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.fail(Stall(after=100_000), path=FIRST)
    started = time.monotonic()
    done = get(tmp_path / "target", patience=HASTY)
    assert time.monotonic() - started < 600  # the stream stalls for an hour
    require_whole(tmp_path / "target", fetch_source)
    assert done.fetched_bytes["huggingface"] == total(fetch_source)


@pytest.mark.parametrize("grain", [GRAIN, Grain()], ids=["segments", "one request a file"])
def test_range_ignored_by_the_server(grain: Grain, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """The whole file comes instead; what precedes the byte that is due is skipped, not written twice."""
    fetch_hub.fail(IgnoreRange(), times=None)
    fetch_hub.fail(Cut(after=600_000), path=FIRST)
    done = get(tmp_path / "target", grain=grain)
    require_whole(tmp_path / "target", fetch_source)
    assert done.fetched_bytes["huggingface"] <= total(fetch_source) + 600_000


# --- answers that are refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", HUBS)
@pytest.mark.parametrize("style", ["retry-after", "ratelimit"])
@pytest.mark.parametrize("route", ["body", "metadata"])
def test_429_is_waited_for(
    route: str, style: str, protocol: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    if protocol == "modelscope" and route == "metadata" and style == "ratelimit":
        pytest.skip("its client keeps no headers but Retry-After")
    fetch_hub.fail(rate_limited(1, style=style), route=route)
    started = time.monotonic()
    get(tmp_path / "target", hub=protocol, jobs=1)
    assert time.monotonic() - started >= 1
    require_whole(tmp_path / "target", fetch_source)


@pytest.mark.parametrize("protocol", HUBS)
@pytest.mark.parametrize("code", [500, 502, 503, 504, 408])
def test_a_server_error_on_any_route(
    code: int, protocol: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    for route in ("info", "tree", "body"):
        fetch_hub.fail(Status(code), route=route, times=2)
    get(tmp_path / "target", hub=protocol, patience=Patience(5, 0.01, 0.05, 60, 60, 1))
    require_whole(tmp_path / "target", fetch_source)


def test_one_bad_file_of_many(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.fail(Status(500), path=WEIGHTS[1], times=None)
    with pytest.raises(FetchError) as failure:
        get(tmp_path / "target")
    assert WEIGHTS[1] in str(failure.value)
    assert "HTTP 500" in str(failure.value)
    assert WEIGHTS[0] not in str(failure.value)
    assert set(content(tmp_path / "target")) >= set(content(fetch_source)) - {WEIGHTS[1]}
    assert read_lock(tmp_path / "target") is None
    before = fetch_hub.sent_bytes()
    fetch_hub.clear()
    get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)
    assert fetch_hub.sent_bytes() - before == SIZE + 1


def test_all_failures_are_named_at_the_end(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    fetch_hub.fail(Status(500), path="model-*", times=None)
    fetch_hub.fail(Status(404), path="config.json", times=None)
    with pytest.raises(FetchError) as failure:
        get(tmp_path / "target")
    assert {problem.where for problem in failure.value.problems} == {
        *WEIGHTS,
        f"huggingface: {NAME}: config.json",
    }


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_expired_signature_gets_a_fresh_redirect(
    host: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    """A signed address that answers once: the resumed stream needs another."""
    fetch_hub.fail(Redirect(uses=1, host=host), times=None)
    fetch_hub.fail(Cut(after=100_000), route="signed", path=FIRST)
    fetch_hub.fail(Status(403), route="signed", path=WEIGHTS[1])
    done = get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)
    assert done.fetched_bytes["huggingface"] == total(fetch_source)


@pytest.mark.parametrize("protocol", HUBS)
def test_no_token_goes_to_the_host_of_a_redirect(
    protocol: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    fetch_hub.fail(Redirect(host="localhost"), times=None)
    fetch_hub._token = "secret"
    get(tmp_path / "target", hub=protocol, token="secret")
    require_whole(tmp_path / "target", fetch_source)
    storage = fetch_hub.requests(server="storage")
    assert len(storage) >= 6
    assert all(e.authorization is None and e.cookie is None for e in storage)
    assert all(e.authorization == "Bearer secret" for e in fetch_hub.requests(server="hub", route="body"))


def test_passwords_of_netrc_are_not_sent(
    fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(
        "machine 127.0.0.1 login me password hidden\nmachine localhost login me password x\n"
    )
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fetch_hub.fail(Redirect(), times=None)
    get(tmp_path / "target")
    assert not [e for e in fetch_hub.log if e.authorization and e.route in ("body", "signed")]


# --- bytes that are wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 777_777, SIZE - 1])
@pytest.mark.parametrize("protocol", HUBS)
def test_one_byte_flipped_once(
    protocol: str, place: int, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    """Only what comes up to the flipped byte is fetched again."""
    fetch_hub.fail(Flip(at=place), path=FIRST)
    done = get(tmp_path / "target", hub=protocol)
    require_whole(tmp_path / "target", fetch_source)
    again = sum(done.fetched_bytes.values()) - total(fetch_source)
    assert place < again <= place + 2 * CHUNK + (64 << 10)


def test_one_byte_flipped_always(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.fail(Flip(at=777_777), path=FIRST, times=None)
    with pytest.raises(FetchError) as failure:
        get(tmp_path / "target")
    assert isinstance(failure.value.problems[0], ContentError)
    assert "the same each time" in str(failure.value)
    assert FIRST not in content(tmp_path / "target")
    assert fetch_hub.sent_bytes(FIRST) <= 2 * SIZE + IN_FLIGHT
    fetch_hub.clear()
    done = get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)
    assert done.fetched_bytes["huggingface"] <= 777_777 + 2 * CHUNK


def test_one_byte_flipped_always_by_one_hub(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.fail(Flip(at=777_777), path=FIRST, times=None, protocol="huggingface")
    get(tmp_path / "target", hub="auto", jobs=1)
    require_whole(tmp_path / "target", fetch_source)


def test_the_second_download_is_the_bad_one(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """Flipped in the first pass at one place, in the second at another: two of three decide."""
    fetch_hub.fail(Flip(at=900_000), path=FIRST)
    fetch_hub.fail(Flip(at=100_000), path=FIRST, skip=1)
    get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)


@pytest.mark.parametrize("protocol", HUBS)
def test_object_replaced_midway(protocol: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """Same commit, same size, other bytes: nothing is spliced, and it is said."""
    fetch_hub.fail(Swap(after=300_000), path=FIRST)
    with pytest.raises(FetchError, match=r"another object|checksum is wrong"):
        get(tmp_path / "target", hub=protocol)
    assert FIRST not in content(tmp_path / "target")
    assert set(content(tmp_path / "target")) >= set(content(fetch_source)) - {FIRST}
    fetch_hub.replace(NAME, FIRST, (fetch_source / FIRST).read_bytes(), moves_branch=False)
    get(tmp_path / "target", hub=protocol)
    require_whole(tmp_path / "target", fetch_source)


def test_object_replaced_midway_with_a_new_commit(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """The pinned commit still has the old bytes: they are what comes."""
    fetch_hub.fail(Swap(after=300_000, moves_branch=True), path=FIRST)
    get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)
    again = get(tmp_path / "target")
    assert "has moved" in again.notes[0]
    require_whole(tmp_path / "target", fetch_source)


@pytest.mark.parametrize("protocol", HUBS)
def test_listing_with_a_wrong_checksum(protocol: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.edit_listing(FIRST, sha256="0" * 64)
    with pytest.raises(FetchError) as failure:
        get(tmp_path / "target", hub=protocol)
    assert isinstance(failure.value.problems[0], ContentError)
    assert FIRST in str(failure.value)
    assert FIRST not in content(tmp_path / "target")


def test_listing_with_a_wrong_git_id(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.edit_listing("config.json", oid="0" * 40)
    with pytest.raises(FetchError, match=r"config\.json"):
        get(tmp_path / "target")
    assert "config.json" not in content(tmp_path / "target")


@pytest.mark.parametrize("by", [-7, 7])
def test_listing_with_a_wrong_size(by: int, fetch_hub: FaultyHub, tmp_path: Path) -> None:
    fetch_hub.edit_listing(FIRST, size=SIZE + by)
    with pytest.raises(FetchError, match=FIRST):
        get(tmp_path / "target")
    assert FIRST not in content(tmp_path / "target")


@pytest.mark.parametrize(
    "path",
    ["../outside", "a/../../outside", "/etc/outside", "a//b", "a\\..\\b", ".weightkit/parts/x", ".weightkit.fetch.json",
     "config.json/inside", "x\x00y", "config.json.partial", "n" * 300],
)  # fmt: skip
@pytest.mark.parametrize("protocol", HUBS)
def test_hostile_paths_in_a_listing(protocol: str, path: str, fetch_hub: FaultyHub, tmp_path: Path) -> None:
    fetch_hub.add_to_listing(path)
    with pytest.raises(ListingError):
        get(tmp_path / "deep/target", hub=protocol)
    assert not (tmp_path / "deep").exists()
    assert not list(tmp_path.rglob("outside"))


def test_a_lock_that_was_uploaded_is_not_fetched(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.add_to_listing("weightkit.lock.json")
    get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)


# --- two hubs --------------------------------------------------------------------------------------------------------


def test_the_other_hub_goes_on_from_the_same_byte(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """One hub dies in the middle of everything: not a byte is fetched twice."""
    fetch_hub.fail(Cut(after=400_000), path="model-*", times=None, protocol="huggingface")
    fetch_hub.fail(Status(503), path="model-*", times=None, skip=3, protocol="huggingface")
    done = get(tmp_path / "target", hub="auto", grain=Grain())
    require_whole(tmp_path / "target", fetch_source)
    assert sum(done.fetched_bytes.values()) == total(fetch_source)
    assert all(done.fetched_bytes.values())


@pytest.mark.parametrize("fault", [Stall(after=50_000), rate_limited(800), Status(500)], ids=["stall", "429", "500"])
def test_the_other_hub_steps_in(fault: Fault, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.fail(fault, path="model-*", times=None, protocol="huggingface")
    started = time.monotonic()
    get(tmp_path / "target", hub="auto", patience=HASTY)
    require_whole(tmp_path / "target", fetch_source)
    assert time.monotonic() - started < 600  # neither a stalled stream nor a limit is waited for


def test_the_faster_hub_serves(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    fetch_hub.fail(Throttle(1000, 256), path="model-*", times=None, protocol="huggingface")
    started = time.monotonic()
    done = get(tmp_path / "target", hub="auto", jobs=4)
    require_whole(tmp_path / "target", fetch_source)
    assert done.fetched_bytes["modelscope"] > 5 * done.fetched_bytes["huggingface"]
    assert time.monotonic() - started < 400  # a segment would take 524 s


def test_both_hubs_at_once(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    streams = len(WEIGHTS) * -(-SIZE // SEGMENT)
    fetch_hub.fail(Gather(streams), path="model-*", times=None)  # none is done before the last is given to a hub
    done = get(tmp_path / "target", hub="both", jobs=streams)
    require_whole(tmp_path / "target", fetch_source)
    assert min(done.fetched_bytes.values()) > 0.2 * total(fetch_source)


def test_a_hub_with_another_file_does_not_serve_it(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """Of one that both list, but not alike, only the pinned hub's copy counts."""

    class Other(FaultyHub):
        pass

    other = tmp_path / "other"
    shutil.copytree(fetch_source, other)
    (other / FIRST).write_bytes(b"z" * SIZE)
    (other / "config.json").write_text('{"model_type": "text"}\n')  # same size
    with Other({NAME: other}) as second:
        os.environ["MODELSCOPE_ENDPOINT"] = second.endpoint  # the fixture puts it back
        get(tmp_path / "target", hub="auto")
        require_whole(tmp_path / "target", fetch_source)
        assert not second.sent_bytes(FIRST)
        assert not second.sent_bytes("config.json")


def test_small_files_of_another_hub_are_taken_only_if_they_are_the_same(
    fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    """The pinned hub gives git's id alone; the other hub's copy is held to it."""
    fetch_hub.fail(Status(500), path="config.json", times=None, protocol="huggingface")
    get(tmp_path / "target", hub="auto")
    require_whole(tmp_path / "target", fetch_source)


def test_both_hubs_down(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    fetch_hub.stop()
    with pytest.raises((UnreachableError, Problems)) as failure:
        get(tmp_path / "target", hub="auto")
    assert "huggingface" in str(failure.value)
    assert "modelscope" in str(failure.value)
    assert not (tmp_path / "target").exists()


def test_one_hub_down_from_the_start(
    fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, hub in (("HF_ENDPOINT", "modelscope"), ("MODELSCOPE_ENDPOINT", "huggingface")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "http://127.0.0.1:9")
            done = get(tmp_path / hub, hub="auto")
        require_whole(tmp_path / hub, fetch_source)
        assert done.hub == hub
        assert "does not answer" in done.notes[0]


def test_hub_goes_down_midway_and_comes_back(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """Everything fails in between; the next run continues."""
    fetch_hub.fail(Throttle(10_000, 1024), path="model-*", times=None)

    def stop_midway() -> None:
        until = time.monotonic() + 60
        while not weights_sent(fetch_hub) and time.monotonic() < until:
            time.sleep(0.01)
        fetch_hub.stop()

    stopping = threading.Thread(target=stop_midway)
    stopping.start()
    with pytest.raises(FetchError, match="could not be fetched"):
        get(tmp_path / "target")
    stopping.join()
    sent = fetch_hub.sent_bytes()
    fetch_hub.clear()
    fetch_hub.start()
    os.environ["HF_ENDPOINT"] = fetch_hub.endpoint
    get(tmp_path / "target")
    require_whole(tmp_path / "target", fetch_source)
    assert 0 < sent < total(fetch_source)
    assert fetch_hub.sent_bytes() <= total(fetch_source) + IN_FLIGHT


# --- the disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_not_enough_space_is_said_before_anything_is_written(
    fetch_hub: FaultyHub, small_disk: Path, fetch_source: Path
) -> None:
    with pytest.raises(SpaceError, match="not enough free space"):
        get(small_disk / "target")
    assert not list(small_disk.iterdir())
    assert not weights_sent(fetch_hub)


def test_disk_full_midway(
    fetch_hub: FaultyHub, small_disk: Path, fetch_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the space: all stops, what came stays, and the next run goes on."""
    monkeypatch.setattr("weightkit.hub.plan.free_disk_bytes", lambda target: 1 << 40)
    with pytest.raises(SpaceError, match="disk is full"):
        get(small_disk / "target")
    sent = weights_sent(fetch_hub)
    assert sent > 2_500_000
    subprocess.run(["mount", "-o", "remount,size=12m", small_disk], check=True)
    done = get(small_disk / "target")
    require_whole(small_disk / "target", fetch_source)
    assert done.fetched_bytes["huggingface"] < 0.5 * total(fetch_source)


def test_bit_rot_and_truncation_with_unchanged_mtime(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """Found by the next run, since ctime tells; mended by fetching only the damaged chunks."""
    target = tmp_path / "target"
    get(target)
    for name, damage in ((WEIGHTS[0], 0), (WEIGHTS[1], SIZE // 2), (WEIGHTS[2], -1)):
        before = (target / name).stat()
        with (target / name).open("r+b") as file:
            if damage < 0:
                file.truncate(SIZE - 100_000)
            else:
                file.seek(damage)
                file.write(b"?!")
        os.utime(target / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    done = get(target)
    require_whole(target, fetch_source)
    assert done.fetched_bytes["huggingface"] <= 2 * CHUNK + 2 * CHUNK + 100_000


def test_bit_rot_that_no_stamp_tells_is_found_by_check(
    fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    """A disk that lies changes no inode. ``verify`` and ``--check`` hash."""
    import json
    from dataclasses import asdict

    from weightkit.hub.state import FileStamp, with_check

    target = tmp_path / "target"
    get(target)
    with (target / FIRST).open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"?!")
    record = target / ".weightkit.fetch.json"
    value = json.loads(record.read_text())["record"]
    old = value["stamps"][FIRST]
    fresh = FileStamp.of((target / FIRST).stat(), old["sha256"], old["content"])
    value["stamps"][FIRST] = asdict(fresh) | {"prefixes": old["prefixes"], "chunk_bytes": old["chunk_bytes"]}
    record.write_bytes(with_check(value))
    assert get(target).fetched_bytes == {}
    assert any(FIRST in str(problem) for problem in verify(target, progress=False).problems)
    done = get(target, check=True)
    assert done.fetched_bytes["huggingface"] == CHUNK
    require_whole(target, fetch_source)


def test_missing_file_is_a_failure_of_verify_and_is_fetched(
    fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    get(target)
    (target / WEIGHTS[1]).unlink()
    assert any(WEIGHTS[1] in str(problem) for problem in verify(target, progress=False).problems)
    done = get(target)
    assert done.fetched_bytes["huggingface"] == SIZE + 1
    require_whole(target, fetch_source)


@pytest.mark.parametrize("damage", ["flip", "zeros", "truncate", "map", "longer"])
def test_damaged_partial_is_mended(damage: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """What a power cut or a bad disk does to a file that is half fetched: only what is damaged comes again."""
    target = tmp_path / "target"
    fetch_hub.fail(Cut(at=1_200_000), path=FIRST, times=None)
    with pytest.raises(FetchError):
        get(target)
    fetch_hub.clear()
    partial = target / f"{FIRST}.partial"
    with partial.open("r+b") as file:
        if damage == "flip":
            file.seek(200_000)
            file.write(b"?!")
        elif damage == "zeros":
            file.seek(1_000_000)
            file.write(bytes(200_000))
        elif damage == "truncate":
            file.truncate(1_000_000)
        elif damage == "longer":
            file.truncate(2 * SIZE)
    if damage == "map":
        for path in (target / ".weightkit/parts").iterdir():
            path.unlink()
    done = get(target)
    require_whole(target, fetch_source)
    again = done.fetched_bytes["huggingface"] - (SIZE - 1_200_000)
    assert again <= {"flip": CHUNK, "zeros": 5 * CHUNK, "truncate": 200_000 + CHUNK, "map": CHUNK, "longer": 0}[damage]


# --- refusals before the start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", HUBS)
def test_unknown_repository(protocol: str, fetch_hub: FaultyHub, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="no such repository"):
        get(tmp_path / "target", model="org/other", hub=protocol)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("protocol", HUBS)
def test_unknown_revision(protocol: str, fetch_hub: FaultyHub, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="revision"):
        get(tmp_path / "target", revision="v9", hub=protocol)


@pytest.mark.parametrize("code", [401, 403])
def test_gated_repository(code: int, fetch_hub: FaultyHub, tmp_path: Path) -> None:
    fetch_hub.fail(gated(code), route="*", times=None)
    with pytest.raises(AccessError, match="Accept its terms at"):
        get(tmp_path / "target")


def test_gated_files(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    """The listing is open to all, the files are not."""
    fetch_hub.fail(gated(), route=["body", "head"], times=None)
    with pytest.raises(FetchError) as failure:
        get(tmp_path / "target")
    assert all(isinstance(problem, AccessError) for problem in failure.value.problems)


def test_private_on_modelscope(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    fetch_hub.fail(Status(403), route="*", times=None)
    with pytest.raises(AccessError, match="modelscope login"):
        get(tmp_path / "target", hub="modelscope")


def test_an_answer_that_is_no_listing(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    fetch_hub.fail(
        Status(200, {"Content-Type": "text/html"}, "<html>log in to the hotel's network"), route="*", times=None
    )
    for hub in HUBS:
        with pytest.raises(WeightkitError):
            get(tmp_path / "target", hub=hub)
    assert not (tmp_path / "target").exists()


# --- all of it at once ------------------------------------------------------------------------------------------------


def random_fault(chance: random.Random) -> Fault:
    place = chance.randrange(SIZE)
    after = chance.randrange(SEGMENT)
    return chance.choice(
        [
            Cut(after=after),
            Cut(at=place),
            Reset(after=after),
            Flip(at=place),
            Short(by=chance.randrange(1, 100_000)),
            Stall(after=after),
            Status(chance.choice([500, 503, 429, 408])),
            rate_limited(1, style=chance.choice(["retry-after", "ratelimit"])),
            Redirect(uses=1),
            IgnoreRange(),
            NoLength(),
            Swap(after=after, moves_branch=True),
        ]
    )


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_faults_end_in_right_bytes(seed: int, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """Runs against a dozen random faults, until one ends well: never wrong bytes under a final name."""
    chance = random.Random(seed)
    target, hub = tmp_path / "target", chance.choice(["huggingface", "modelscope", "auto", "both"])
    for _ in range(chance.randrange(5, 15)):
        fetch_hub.fail(
            random_fault(chance),
            path=chance.choice(["model-*", *WEIGHTS, "config.json"]),
            times=chance.randrange(1, 4),
            skip=chance.randrange(4),
            protocol=chance.choice([None, "huggingface", "modelscope"]),
        )
    if hub != "huggingface":  # ModelScope has no commits: what moves there is gone
        fetch_hub._rules = [rule for rule in fetch_hub._rules if not isinstance(rule.fault, Swap)]
    expected = content(fetch_source)
    for _ in range(6):
        try:
            get(target, hub=hub, jobs=chance.randrange(1, 9), patience=replace(HASTY, attempts=PATIENCE.attempts))
            break
        except FetchError:
            found = content(target)
            assert all(found[path] == expected[path] for path in found if path in expected)
    require_whole(target, fetch_source)
    assert get(target, hub=hub).fetched_bytes == {}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_damage_of_what_lies_on_the_disk(
    seed: int, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    """Partial files, their maps and the records, damaged at random between two runs: the second one ends well."""
    chance = random.Random(seed)
    target = tmp_path / "target"
    for name in WEIGHTS:
        fetch_hub.fail(Cut(at=chance.randrange(SIZE)), path=name, times=None)
    with pytest.raises(FetchError):
        get(target)
    fetch_hub.clear()
    victims = [
        *target.glob("*.partial"),
        *(target / ".weightkit/parts").iterdir(),
        target / ".weightkit/stamps.jsonl",
        target / ".weightkit.fetch.json",
    ]
    for path in victims:
        raw = bytearray(path.read_bytes())
        for _ in range(chance.randrange(4)):
            if raw and chance.random() < 0.7:
                raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
            else:
                del raw[chance.randrange(len(raw) + 1) :]
        path.write_bytes(raw)
    done = get(target)
    require_whole(target, fetch_source)
    assert done.fetched_bytes["huggingface"] <= 2 * total(fetch_source)
    assert not verify_bytes(target)


def verify_bytes(target: Path) -> list[str]:
    """Files that are not what the lock says, by our own count."""
    lock = read_lock(target)
    assert lock is not None
    return [
        path
        for path, file in lock.files.items()
        if hashlib.sha256((target / path).read_bytes()).hexdigest() != file.sha256
    ]
