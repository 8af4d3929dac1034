"""Which weightkit this is: apart from the package, so that what the package imports can say it."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

__version__ = "0.1.0"


@cache
def build() -> str:
    """The version and a digest of the code, such as ``0.1.0 (3f2a91c05b7d)``: two checkouts of one version differ."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for name in sorted(_modules(root)):
        digest.update(name.encode() + b"\0" + hashlib.sha256((root / name).read_bytes()).digest())
    return f"{__version__} ({digest.hexdigest()[:12]})"


def _modules(root: Path) -> list[str]:
    return [
        (Path(folder) / name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root, followlinks=True)  # kernels are a link in a checkout
        for name in names
        if name.endswith(".py")
    ]
