"""A build is told from another of the same version, however it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from weightkit import __version__, version
from weightkit.cluster.sight import require_build
from weightkit.errors import ClusterError


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Some code with a linked folder, as in a checkout."""
    (tmp_path / "checkout" / "kernels").mkdir(parents=True)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "kernels").symlink_to(tmp_path / "checkout" / "kernels")
    (tmp_path / "package" / "kernels" / "one.py").write_text("ONE = 1\n")
    shutil.copy(version.__file__, tmp_path / "package" / "version.py")
    return tmp_path / "package"


def build_of(package: Path) -> str:
    command = [sys.executable, "-c", "import version; print(version.build())"]
    return subprocess.run(command, cwd=package, capture_output=True, text=True, check=True).stdout.strip()


def test_the_code_counts_and_how_it_lies_does_not(package: Path, tmp_path: Path) -> None:
    before = build_of(package)
    assert before.startswith(f"{__version__} (")
    shutil.copytree(package, tmp_path / "installed", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "installed" / "notes.txt").write_text("no code")
    assert build_of(tmp_path / "installed") == before
    (package / "kernels" / "one.py").write_text("ONE = 2\n")
    assert build_of(package) != before


def test_another_build_of_the_same_version_is_refused() -> None:
    require_build(version.build())
    with pytest.raises(ClusterError, match="another weightkit") as caught:
        require_build(f"{__version__} (000000000000)")
    assert version.build() in str(caught.value)
