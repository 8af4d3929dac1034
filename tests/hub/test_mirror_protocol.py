"""The mirror's answers, byte by byte: ranges, conditions, listings, and everything that it must not give away."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from mirrored import files_of, write_lock, write_locked
from raw_http import get
from tiny import write_tiny

from weightkit.hub.mirror import Catalog, open_repository, serve
from weightkit.hub.mirror.app import build_app
from weightkit.hub.mirror.server import endpoint_of, in_thread, listen

NAME = "org/name"
SHARD = "model-00001-of-000003.safetensors"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no test changes."""
    return write_locked(tmp_path_factory.mktemp("mirror") / "checkpoint")


@pytest.fixture(scope="module")
def endpoint(shared: Path) -> Iterator[str]:
    with serve({NAME: shared}) as running:
        yield running


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder to be changed."""
    return write_locked(tmp_path / "own")


def hf(endpoint: str, path: str, revision: str = "main") -> str:
    return f"{endpoint}/{NAME}/resolve/{revision}/{quote(path)}"


def ms(endpoint: str, path: str) -> str:
    return f"{endpoint}/api/v1/models/{NAME}/repo?Revision=master&FilePath={quote(path, safe='')}"


@pytest.mark.parametrize("url", [hf, ms])
def test_every_file_by_both_protocols(endpoint: str, shared: Path, url: object) -> None:
    for path, content in files_of(shared).items():
        got = get(url(endpoint, path))  # type: ignore[operator]
        assert (got.status, got.body) == (200, content), path
        assert got.headers["Content-Length"] == str(len(content))


@pytest.mark.parametrize(
    ("asked", "span"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=5-9", (5, 10)),
        ("bytes=100-", (100, None)),
        ("bytes=-7", (-7, None)),
        ("bytes=-999999999999", (0, None)),
        ("bytes=3-999999999999", (3, None)),
        ("Bytes = 5 - 9", (5, 10)),
    ],
)
@pytest.mark.parametrize("url", [hf, ms])
def test_ranges(endpoint: str, shared: Path, asked: str, span: tuple[int, int | None], url: object) -> None:
    content = (shared / SHARD).read_bytes()
    expected = content[slice(*span)]
    start = len(content) + span[0] if span[0] < 0 else span[0]
    for method in ("GET", "HEAD"):
        got = get(url(endpoint, SHARD), {"Range": asked}, method=method)  # type: ignore[operator]
        assert got.status == 206
        assert got.headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/{len(content)}"
        assert got.headers["Content-Length"] == str(len(expected))
        assert got.body == (expected if method == "GET" else b"")


@pytest.mark.parametrize(
    "asked", ["bytes=1-2,5-6", "bytes=9-5", "items=0-5", "bytes=", "bytes=-", "bytes=x-y", "bytes=" + "0" * 200 + "-5"]
)
def test_what_is_no_single_range_gets_the_whole(endpoint: str, shared: Path, asked: str) -> None:
    got = get(hf(endpoint, SHARD), {"Range": asked})
    assert (got.status, got.body) == (200, (shared / SHARD).read_bytes())


@pytest.mark.parametrize("beyond", [0, 1, 10**30])
def test_a_range_behind_the_end(endpoint: str, shared: Path, beyond: int) -> None:
    size = (shared / SHARD).stat().st_size
    got = get(hf(endpoint, SHARD), {"Range": f"bytes={size + beyond}-"})
    assert (got.status, got.headers["Content-Range"], got.body) == (416, f"bytes */{size}", b"")
    assert get(hf(endpoint, SHARD), {"Range": "bytes=-0"}).status == 416


def test_an_empty_file(tmp_path: Path) -> None:
    folder = write_locked(tmp_path / "a")
    (folder / "empty.txt").touch()
    write_lock(folder)
    with serve({NAME: folder}) as endpoint:
        assert (get(hf(endpoint, "empty.txt")).status, get(hf(endpoint, "empty.txt")).error) == (200, None)
        assert get(hf(endpoint, "empty.txt"), {"Range": "bytes=0-"}).status == 416


def test_conditions(endpoint: str, shared: Path) -> None:
    content = (shared / SHARD).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()}"'
    url = hf(endpoint, SHARD)
    assert get(url, {"Range": "bytes=10-", "If-Range": tag}).body == content[10:]
    assert get(url, {"Range": "bytes=10-", "If-Range": '"other"'}).status == 200
    assert get(url, {"Range": "bytes=10-", "If-Range": "Tue, 24 Nov 2026 08:00:00 GMT"}).status == 200
    unchanged = get(url, {"If-None-Match": f'"x", {tag}'})
    assert (unchanged.status, unchanged.body, unchanged.headers["ETag"]) == (304, b"", tag)


def test_etags_are_those_of_git_and_sha256(endpoint: str, shared: Path) -> None:
    for path, content in files_of(shared).items():
        got = get(hf(endpoint, path), method="HEAD")
        if path.endswith(".safetensors"):
            expected = hashlib.sha256(content).hexdigest()
            assert got.headers["X-Linked-Etag"] == f'"{expected}"'
            assert got.headers["X-Linked-Size"] == str(len(content))
        else:
            done = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True)
            expected = done.stdout.decode().strip()
            assert got.headers["X-Linked-Etag"] is None
        assert got.headers["ETag"] == f'"{expected}"'
        assert (got.status, got.body, got.headers["Content-Length"]) == (200, b"", str(len(content)))
        assert got.headers["Accept-Ranges"] == "bytes"
        assert len(got.headers["X-Repo-Commit"]) == 40


def test_listings_agree_with_the_files(endpoint: str, shared: Path) -> None:
    contents = files_of(shared)
    commit = get(f"{endpoint}/api/models/{NAME}/revision/main").json()["sha"]
    tree = get(f"{endpoint}/api/models/{NAME}/tree/{commit}?recursive=true").json()
    files = {entry["path"]: entry for entry in tree if entry["type"] == "file"}
    assert [entry["path"] for entry in tree if entry["type"] == "directory"] == ["inference"]
    siblings = {e["rfilename"]: e for e in get(f"{endpoint}/api/models/{NAME}?blobs=true").json()["siblings"]}
    listed = get(f"{endpoint}/api/v1/models/{NAME}/repo/files?Revision={commit}&Recursive=True").json()["Data"]["Files"]
    scope = {entry["Path"]: entry for entry in listed}
    assert files.keys() == siblings.keys() == scope.keys() == contents.keys()
    for path, content in contents.items():
        sha256 = hashlib.sha256(content).hexdigest()
        assert (scope[path]["Sha256"], scope[path]["Size"]) == (sha256, len(content))
        assert files[path]["size"] == siblings[path]["size"] == len(content)
        assert files[path]["oid"] == siblings[path]["blobId"]
        if path.endswith(".safetensors"):
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
            assert files[path]["lfs"] == {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
            assert siblings[path]["lfs"]["sha256"] == sha256
        else:
            assert "lfs" not in files[path]
            assert f'"{files[path]["oid"]}"' == get(hf(endpoint, path), method="HEAD").headers["ETag"]
    assert all(sibling.keys() == {"rfilename"} for sibling in get(f"{endpoint}/api/models/{NAME}").json()["siblings"])


def test_one_folder_at_a_time(endpoint: str) -> None:
    at = f"{endpoint}/api/models/{NAME}/tree/main"
    top = {entry["path"]: entry["type"] for entry in get(at).json()}
    assert top["inference"] == "directory"
    assert "inference/model.py" not in top
    assert [entry["path"] for entry in get(f"{at}/inference").json()] == ["inference/model.py"]
    assert get(f"{at}/nowhere").headers["X-Error-Code"] == "EntryNotFound"
    files = get(f"{endpoint}/api/v1/models/{NAME}/repo/files?Root=inference").json()["Data"]["Files"]
    assert [entry["Path"] for entry in files] == ["inference/model.py"]
    shallow = get(f"{endpoint}/api/v1/models/{NAME}/repo/files").json()["Data"]["Files"]
    assert {entry["Path"]: entry["Type"] for entry in shallow}["inference"] == "tree"


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_pages(shared: Path, endpoint: str, limit: int) -> None:
    url, seen, pages = f"{endpoint}/api/models/{NAME}/tree/main?recursive=true&limit={limit}", [], 0
    while url:
        got = get(url)
        seen += [entry["path"] for entry in got.json()]
        pages += 1
        assert len(got.json()) <= limit
        link = got.headers["Link"]
        url = link.partition("<")[2].partition(">")[0] if link else ""
        assert not link or link.endswith('; rel="next"')
    entries = len(files_of(shared)) + 1
    assert (len(seen), len(set(seen)), pages) == (entries, entries, -(-entries // limit))


@pytest.mark.parametrize("odd", ["limit=0", "limit=-1", "limit=x", "cursor=x", "cursor=99999999999999999999"])
def test_odd_pages_do_no_harm(endpoint: str, odd: str) -> None:
    assert get(f"{endpoint}/api/models/{NAME}/tree/main?{odd}").status == 200


def test_paths_info(endpoint: str) -> None:
    url = f"{endpoint}/api/models/{NAME}/paths-info/main"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    got = get(url, form, method="POST", data=b"paths=config.json&paths=inference&paths=../../etc/passwd&expand=False")
    assert [(entry["path"], entry["type"]) for entry in got.json()] == [
        ("config.json", "file"),
        ("inference", "directory"),
    ]
    got = get(url, {"Content-Type": "application/json"}, method="POST", data=b'{"paths": ["config.json", 5]}')
    assert [entry["path"] for entry in got.json()] == ["config.json"]
    for data in (b"{", b"[]", b'{"paths": 5}', b"[" * 100_000):
        assert get(url, {"Content-Type": "application/json"}, method="POST", data=data).json() == []
    assert get(url, form, method="POST", data=b"paths=config.json&" * 200_000).json() == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/api/models/no/such", "RepoNotFound"),
        ("/no/such/resolve/main/config.json", "RepoNotFound"),
        (f"/api/models/{NAME}/revision/other", "RevisionNotFound"),
        (f"/{NAME}/resolve/{'0' * 40}/config.json", "RevisionNotFound"),
        (f"/{NAME}/resolve/main/nothing", "EntryNotFound"),
        (f"/{NAME}/resolve/main/inference", "EntryNotFound"),
    ],
)
def test_what_is_not_there(endpoint: str, path: str, code: str) -> None:
    for method in ("GET", "HEAD"):
        got = get(endpoint + path, method=method)
        assert (got.status, got.headers["X-Error-Code"]) == (404, code)
        assert got.headers["X-Error-Message"]


def test_what_is_not_there_by_modelscope(endpoint: str) -> None:
    for path in ("no/such/repo/files", f"{NAME}/repo?FilePath=nothing", f"{NAME}/repo/files?Revision=other", "no/such"):
        got = get(f"{endpoint}/api/v1/models/{path}")
        assert (got.status, got.json()["Success"]) == (404, False)
    assert get(f"{endpoint}/api/v1/repos/internalAccelerationInfo").status == 404


OUTSIDE = [
    "../outside.txt",
    "..%2Foutside.txt",
    "%2e%2e/outside.txt",
    "%2e%2e%2foutside.txt",
    "inference/../../outside.txt",
    "inference/..%2f..%2foutside.txt",
    "..\\outside.txt",
    "..%5Coutside.txt",
    "%252e%252e%252foutside.txt",
    "/etc/passwd",
    "%2Fetc%2Fpasswd",
    "config.json%00",
    "config.json/",
    "./config.json",
    "inference//model.py",
    "",
    ".",
    "..",
    "%c0%ae%c0%ae/outside.txt",
    ".env",
    ".weightkit/journal",
    ".git/config",
    "weightkit.lock.json",
    "later.txt",
    "half.partial",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_but_the_listing_is_ever_served(own: Path, path: str) -> None:
    for name in (".env", ".weightkit/journal", ".git/config", "later.txt", "half.partial", "../outside.txt"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text("SECRET")
    with serve({NAME: own}) as endpoint:
        urls = [
            f"{endpoint}/{NAME}/resolve/main/{path}",
            f"{endpoint}/api/v1/models/{NAME}/repo?Revision=master&FilePath={path}",
            f"{endpoint}/{path}",
            f"{endpoint}/api/models/{NAME}/tree/main/{path}",
        ]
        for url in urls:
            got = get(url)
            assert got.status != 200 or path in ("", ".", "config.json/", "/"), url
            assert b"SECRET" not in got.body
            assert b"root:" not in got.body


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "POST"])
def test_read_only(endpoint: str, shared: Path, method: str) -> None:
    before = files_of(shared)
    for path in (f"/{NAME}/resolve/main/config.json", f"/api/models/{NAME}", f"/api/models/{NAME}/tree/main", "/"):
        assert get(endpoint + path, method=method, data=b"x").status == 405
    assert get(f"{endpoint}/api/repos/create", method=method, data=b"{}").status == 404
    assert files_of(shared) == before


@pytest.mark.parametrize("change", ["written to", "replaced", "link out", "link in", "gone", "pipe", "folder"])
def test_a_file_that_changed_after_it_was_verified(own: Path, tmp_path: Path, change: str) -> None:
    path, secret = own / SHARD, tmp_path / "secret"
    with serve({NAME: own}) as endpoint:
        assert get(hf(endpoint, SHARD)).status == 200
        content = path.read_bytes()
        secret.write_bytes(b"S" * len(content))
        if change == "written to":
            with path.open("r+b") as file:
                file.write(b"S")
        else:
            path.unlink()
        if change == "replaced":
            path.write_bytes(content)
        elif change == "link out":
            path.symlink_to(secret)
        elif change == "link in":
            path.symlink_to(own / "model-00002-of-000003.safetensors")
        elif change == "pipe":
            os.mkfifo(path)
        elif change == "folder":
            path.mkdir()
        for method in ("GET", "HEAD"):
            got = get(hf(endpoint, SHARD), method=method)
            assert got.status == 503
            assert "verified" in got.headers["X-Error-Message"] or "read any more" in got.headers["X-Error-Message"]
            assert b"SSSS" not in got.body
        answer = get(ms(endpoint, SHARD))
        assert (answer.status, answer.json()["Success"]) == (503, False)
        assert get(hf(endpoint, "config.json")).status == 200


def test_a_folder_on_the_way_becomes_a_link(own: Path, tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/model.py").write_text("y = 2\n")
    with serve({NAME: own}) as endpoint:
        (own / "inference").rename(own / "kept")
        (own / "inference").symlink_to(tmp_path / "evil")
        assert get(hf(endpoint, "inference/model.py")).status == 503


def slow_get(endpoint: str, path: str) -> socket.socket:
    """A connection that has asked for a file and read nothing but the first bytes."""
    parts = urlsplit(endpoint)
    connection = socket.create_connection((parts.hostname, parts.port))
    connection.sendall(f"GET /{NAME}/resolve/main/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    connection.recv(1)
    return connection


def drain(connection: socket.socket) -> bytes:
    """What comes until the other side ends it."""
    connection.settimeout(120)
    received = bytearray()
    while chunk := connection.recv(1 << 20):
        received += chunk
    return bytes(received)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint with 64 MB in one more shard."""
    folder = tmp_path / "large"
    write_tiny(folder)
    (folder / "large.safetensors").write_bytes(bytes(64 << 20))
    write_lock(folder)
    return folder


def test_a_file_that_changes_while_it_is_sent_ends_short(large: Path) -> None:
    with serve({NAME: large}) as endpoint:
        connection = slow_get(endpoint, "large.safetensors")
        with (large / "large.safetensors").open("r+b") as file:
            file.write(b"x")
        assert len(drain(connection)) < 64 << 20
        assert get(hf(endpoint, "large.safetensors")).status == 503


def test_a_file_replaced_while_it_is_sent_arrives_whole(large: Path) -> None:
    path = large / "large.safetensors"
    with serve({NAME: large}) as endpoint:
        connection = slow_get(endpoint, path.name)
        path.with_name("new").write_bytes(b"x" * (64 << 20))
        path.with_name("new").replace(path)
        assert drain(connection).endswith(bytes(64 << 20))


def open_descriptors(path: Path) -> int:
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(link.readlink()))
        except FileNotFoundError:
            continue
    return links.count(str(path))


def test_clients_that_leave_cost_nothing(large: Path) -> None:
    path = large / "large.safetensors"
    with serve({NAME: large}) as endpoint:
        for _ in range(20):
            slow_get(endpoint, path.name).close()
        deadline = time.monotonic() + 120
        while open_descriptors(path.resolve()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert open_descriptors(path.resolve()) == 0


def test_many_at_once(large: Path) -> None:
    results: list[tuple[int, str]] = []

    def one(running: str) -> None:
        got = get(hf(running, "large.safetensors"))
        results.append((got.status, hashlib.sha256(got.body).hexdigest()))

    with serve({NAME: large}) as endpoint:
        threads = [threading.Thread(target=one, args=(endpoint,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [(200, hashlib.sha256(bytes(64 << 20)).hexdigest())] * 8


def test_leaving_ends_it_at_once_whoever_is_served(large: Path) -> None:
    with serve({NAME: large}) as endpoint:
        connection = slow_get(endpoint, "large.safetensors")
        started = time.monotonic()
    assert time.monotonic() - started < 100  # the client reads no more, so that it would never end
    connection.close()


def test_front_page_and_names(shared: Path, own: Path) -> None:
    both = Catalog(
        [open_repository(shared, [NAME, "other/name"], progress=False), open_repository(own, ["own/x"], progress=False)]
    )
    with listen("127.0.0.1", 0) as listener, in_thread(build_app(both), listener):
        endpoint = endpoint_of(listener)
        page = get(f"{endpoint}/").body.decode()
        assert all(name in page for name in (NAME, "other/name", "own/x", f"HF_ENDPOINT={endpoint}"))
        assert [entry["id"] for entry in get(f"{endpoint}/api/models").json()] == [NAME, "other/name", "own/x"]
        sha = {name: get(f"{endpoint}/api/models/{name}").json()["sha"] for name in (NAME, "other/name", "own/x")}
        assert sha[NAME] == sha["other/name"] == sha["own/x"]  # the same bytes are the same commit
