"""Servers that drop, refuse, change or corrupt what is read from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from bucket import Store
from faulty_hub import Cut, Fault, FaultyHub, Flip, IgnoreRange, Redirect, Reset, Stall, Status, rate_limited
from folders import tree
from web_server import Web

import weightkit as wk
from weightkit.errors import ChecksumError, RepositoryError, SourceChangedError, UnreachableError, WeightkitError
from weightkit.writer import Written

FILES = [f"model-{n:05}-of-000003.safetensors" for n in (1, 2, 3)]
LOCK = "weightkit.lock.json"


@pytest.fixture(scope="session")
def stripped(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("stripped") / "out"
    wk.write(wk.strip_mtp(wk.open_checkpoint(tiny_source)), target, progress=False)
    return content(target)


def content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != LOCK}


def strip(address: str, target: Path, spool_bytes: int | None = None) -> Written:
    checkpoint = wk.strip_mtp(wk.open_checkpoint(address))
    return wk.write(checkpoint, target, progress=False, spool_bytes=spool_bytes)


@pytest.mark.parametrize("spool_bytes", [None, 0])
@pytest.mark.parametrize(
    "fault",
    [
        Cut(after=70_000),
        Reset(after=70_000),
        Status(500),
        Status(503),
        rate_limited(0),
        rate_limited(1, style="ratelimit"),
        Redirect(uses=1),
    ],
    ids=lambda fault: type(fault).__name__ + str(getattr(fault, "code", "")),
)
def test_what_passes_is_waited_for(
    fault: Fault, spool_bytes: int | None, hub: FaultyHub, stripped: dict[str, bytes], tmp_path: Path
) -> None:
    checkpoint = wk.strip_mtp(wk.open_checkpoint("hf://org/tiny"))
    hub.fail(fault, path="*.safetensors", route="body", times=3)
    wk.write(checkpoint, tmp_path / "out", progress=False, spool_bytes=spool_bytes)
    assert content(tmp_path / "out") == stripped


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("spool_bytes", [None, 0])
def test_a_stalled_stream_is_dropped(
    spool_bytes: int | None, hub: FaultyHub, stripped: dict[str, bytes], tmp_path: Path
) -> None:
    test_what_passes_is_waited_for(Stall(after=70_000), spool_bytes, hub, stripped, tmp_path)


def test_bodies_that_end_early(web: Web, stripped: dict[str, bytes], tmp_path: Path) -> None:
    web.cuts = [50_000, 1, 90_000, 0]
    web.statuses = [(FILES[2], 429, {"Retry-After": "0"}), (FILES[1], 502, {})]
    strip(web.url, tmp_path / "out")
    assert content(tmp_path / "out") == stripped
    assert web.cuts == []


def test_a_server_that_stays_broken(hub: FaultyHub, tmp_path: Path) -> None:
    checkpoint = wk.strip_mtp(wk.open_checkpoint("hf://org/tiny"))
    hub.fail(Status(500), path=FILES[1], times=None)
    with pytest.raises(
        UnreachableError, match=r"model-00002-of-000003.safetensors: cannot be read, 4 times \(HTTP 500\)"
    ):
        wk.write(checkpoint, tmp_path / "out", progress=False)


def test_one_wrong_byte_once(hub: FaultyHub, stripped: dict[str, bytes], tmp_path: Path) -> None:
    checkpoint = wk.strip_mtp(wk.open_checkpoint("hf://org/tiny"))
    hub.fail(Flip(at=900_000), path=FILES[0], times=1)
    written = wk.write(checkpoint, tmp_path / "out", progress=False)
    assert content(tmp_path / "out") == stripped
    assert len(written.verified) == 3


def test_one_wrong_byte_always(hub: FaultyHub, tmp_path: Path) -> None:
    """The file is named, nothing is made from it, and the target is not complete."""
    checkpoint = wk.strip_mtp(wk.open_checkpoint("hf://org/tiny"))
    hub.fail(Flip(at=900_000), path=FILES[0], times=None)
    with pytest.raises(ChecksumError, match="the content of the source file is not what is recorded for it") as caught:
        wk.write(checkpoint, tmp_path / "out", progress=False)
    assert str(caught.value.where).endswith(FILES[0])
    assert not (tmp_path / "out" / FILES[0]).exists()
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


def test_a_file_that_is_replaced_in_a_bucket(store: Store, tiny_source: Path, tmp_path: Path) -> None:
    other = bytearray((tiny_source / FILES[1]).read_bytes())
    other[-1] ^= 1
    for spool_bytes in (None, 0):
        checkpoint = wk.strip_mtp(wk.open_checkpoint("s3://bucket/models/tiny"))
        store.put(f"models/tiny/{FILES[1]}", bytes(other))
        with pytest.raises(SourceChangedError, match=FILES[1]):
            wk.write(checkpoint, tmp_path / f"out{spool_bytes}", progress=False, spool_bytes=spool_bytes)
        store.put(f"models/tiny/{FILES[1]}", (tiny_source / FILES[1]).read_bytes())


def test_a_file_that_goes_away_in_a_bucket(store: Store, tmp_path: Path) -> None:
    checkpoint = wk.strip_mtp(wk.open_checkpoint("s3://bucket/models/tiny"))
    store.delete(f"models/tiny/{FILES[1]}")
    with pytest.raises(RepositoryError, match=FILES[1]):
        wk.write(checkpoint, tmp_path / "out", progress=False)


@pytest.mark.parametrize("tags", [True, False])
def test_a_file_that_is_replaced_on_a_web_server(tags: bool, web: Web, tiny_source: Path, tmp_path: Path) -> None:
    """Entity tags tell it; without them the size, or the checksum."""
    folder = tmp_path / "web"
    folder.mkdir()
    for path in tiny_source.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    web.folder, web.tags = folder, tags
    checkpoint = wk.strip_mtp(wk.open_checkpoint(web.url))
    other = bytearray((folder / FILES[1]).read_bytes())
    other[-1] ^= 1
    (folder / FILES[1]).write_bytes(bytes(other))
    expected: type[WeightkitError] = SourceChangedError if tags else ChecksumError
    with pytest.raises(expected, match=FILES[1]):
        wk.write(checkpoint, tmp_path / "out", progress=False)
    (folder / FILES[1]).write_bytes(bytes(other) + b"\0")
    with pytest.raises(SourceChangedError, match="changed after it was opened"):
        wk.write(checkpoint, tmp_path / "out2", progress=False, spool_bytes=0)


def test_a_server_that_begins_to_ignore_ranges(hub: FaultyHub, tmp_path: Path) -> None:
    checkpoint = wk.strip_mtp(wk.open_checkpoint("hf://org/tiny"))
    hub.fail(IgnoreRange(), path=FILES[0], times=None)
    with pytest.raises(UnreachableError, match="ignores Range"):
        wk.write(checkpoint, tmp_path / "out", progress=False)


def test_a_changed_source_is_not_spliced_into_an_old_write(store: Store, tiny_source: Path, tmp_path: Path) -> None:
    """What an earlier run left is of other versions: the rerun says so, whatever the sizes are."""
    checkpoint = wk.strip_mtp(wk.open_checkpoint("s3://bucket/models/tiny"))
    store.delete(f"models/tiny/{FILES[2]}")
    with pytest.raises(RepositoryError):
        wk.write(checkpoint, tmp_path / "out", progress=False)
    other = bytearray((tiny_source / FILES[2]).read_bytes())
    other[-1] ^= 1
    store.put(f"models/tiny/{FILES[2]}", bytes(other))
    with pytest.raises(WeightkitError, match=r"its source changed since: model-00003-of-\d+\.safetensors"):
        strip("s3://bucket/models/tiny", tmp_path / "out")
