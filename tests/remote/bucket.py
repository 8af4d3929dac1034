"""A bucket of a server that speaks S3's protocol, as its owner changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Store:
    """A bucket of moto's server. ``put`` and ``delete`` change it."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=key, Body=content)

    def put_folder(self, prefix: str, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket="bucket", Key=key)
