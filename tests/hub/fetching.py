"""A small repository, a hub that has it, and a fetch from it that tries again at once."""

from __future__ import annotations

import hashlib
import random
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from faulty_hub import FaultyHub

from weightkit.checkpoint.lock import read_lock
from weightkit.hub import Fetched, Grain, Patience, fetch

NAME = "org/name"
WEIGHTS = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
FIRST = WEIGHTS[0]
SIZE = 1_500_000
CHUNK, SEGMENT = 64 << 10, 512 << 10
GRAIN = Grain(SEGMENT, CHUNK)
#: Quick to try again, and slow to take a server for dead: this one may share two cores with much else.
PATIENCE = Patience(attempts=4, backoff_s=0.02, longest_backoff_s=0.1, connect_s=60, stall_s=60, outage_s=0.5)
#: Where a stream does stall. Others may seem to, too, so that it is tried often.
HASTY = replace(PATIENCE, attempts=100, stall_s=0.6)


def write_repository(folder: Path) -> Path:
    """Three weight files of random bytes, small files, one in a folder, one empty."""
    (folder / "inference").mkdir(parents=True)
    for seed, name in enumerate(WEIGHTS):
        (folder / name).write_bytes(random.Random(seed).randbytes(SIZE + seed))
    (folder / "config.json").write_text('{"model_type": "test"}\n')
    (folder / "inference/model.py").write_text("x = 1\n")
    (folder / "empty.txt").write_bytes(b"")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Relative path to content, without what fetch keeps for itself."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.relative_to(folder).parts[0].startswith((".weightkit", "weightkit."))
    }


def get(target: Path, **options: Any) -> Fetched:
    """Fetch from Hugging Face's protocol, unless said otherwise."""
    given = {"hub": "huggingface", "progress": False, "patience": PATIENCE, "grain": GRAIN} | options
    return fetch(given.pop("model", NAME), target, **given)


def require_whole(target: Path, source: Path) -> None:
    """The target holds what the source does, nothing is left of the work, and the lock has every file."""
    assert content(target) == content(source)
    assert not (target / ".weightkit").exists()
    lock = read_lock(target)
    assert lock is not None
    assert set(lock.files) == set(content(source))


def kept_bytes(target: Path, source: Path, segment_bytes: int = SEGMENT) -> int:
    """Bytes of an unfinished fetch that lie in the target: of whole files, and of others as far as their maps say,
    whose form ``weightkit.hub.partial`` has."""
    kept = 0
    for path, data in content(source).items():
        if (target / path).exists():
            kept += len(data)
            continue
        segments = max(1, -(-len(data) // segment_bytes))
        with suppress(FileNotFoundError):  # not begun, or done just now
            raw = (target / ".weightkit/parts" / hashlib.sha256(path.encode()).hexdigest()[:32]).read_bytes()
            kept += sum(struct.unpack_from(f"<{segments}Q", raw.ljust(32 + 8 * segments, b"\0"), 32))
    return kept


def total(source: Path) -> int:
    return sum(map(len, content(source).values()))


def weights_sent(hub: FaultyHub) -> int:
    return hub.sent_bytes("*.safetensors")


def weights_size() -> int:
    return sum(SIZE + seed for seed in range(len(WEIGHTS)))
