"""Rooms import only from those below them, stay light where they promise it, and the package exports what it says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weightkit

ROOT = Path(weightkit.__file__).parent
README = ROOT.parent / "README.md"

#: From the top down. A module belongs to the longest of these names that begins its own; rooms of one line stand side
#: by side and do not import each other.
ORDER = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("serving",),
    ("smoke",),
    ("hub",),
    ("workspace",),
    ("cluster",),
    ("examine", "sizing"),
    ("manifests.pico",),  # its training and evaluation: imported by nothing
    ("quantization",),
    ("generation",),
    ("model",),
    ("writer",),
    ("measure",),
    ("transforms",),
    ("ranks",),
    ("layouts", "compute"),
    ("sha256",),
    ("kernels",),
    ("family",),
    ("manifests.pico.questions",),
    ("manifests", "manifests.pico.architecture"),
    ("checkpoint",),
    ("direct_io", "durable", "machine", "progress", "remote", "units"),
    ("errors", "version"),
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
#: May be imported without torch, numba, LLVM or what brings them.
LIGHT = (
    "weightkit",
    "weightkit.checkpoint",
    "weightkit.cluster",
    "weightkit.family",
    "weightkit.layouts",
    "weightkit.measure",
    "weightkit.sha256",
    "weightkit.transforms",
    "weightkit.examine",
    "weightkit.serving",
    "weightkit.sizing",
    "weightkit.workspace",
    "weightkit.writer",
    "weightkit.cli",
)
HEAVY = {"torch", "numba", "llvmlite", "triton", "transformers", "tokenizers", "ray"}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its dotted name without ``weightkit.``, links followed."""
    for folder in (ROOT, *(path for path in ROOT.iterdir() if path.is_symlink())):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), path


def room_of(module: str) -> str:
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next(name for name in names if name in LEVELS)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every import from this package, those within functions and for type checkers among them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("weightkit."):
                yield node.lineno, name.removeprefix("weightkit.")


def test_every_module_has_a_room() -> None:
    strangers = [name for name, _ in modules() if name and not any(f"{name}.".startswith(f"{r}.") for r in LEVELS)]
    assert strangers == []
    assert {room_of(name) for name, _ in modules() if name} == set(LEVELS)


def test_imports_go_downward_only() -> None:
    wrong = []
    for module, path in modules():
        if not module:
            continue  # weightkit/__init__.py names the homes of what it exports
        room = room_of(module)
        for line, name in imported(path):
            other = room_of(name) if name.split(".")[0] in {key.split(".")[0] for key in LEVELS} else None
            if other is not None and other != room and LEVELS[other] <= LEVELS[room]:
                wrong.append(f"{module}:{line} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("module", LIGHT)
def test_light_rooms_import_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_what_the_package_exports() -> None:
    assert weightkit.__all__ == sorted(weightkit._HOMES)
    documented = re.findall(r"^    (\w+)  +\w", weightkit.__doc__ or "", re.MULTILINE)
    assert sorted(documented) == weightkit.__all__
    assert set(weightkit.__all__) <= set(dir(weightkit))
    for name in weightkit.__all__:
        assert getattr(weightkit, name).__doc__, name


def test_a_type_checker_sees_what_the_package_exports() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    names = [alias.name for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(names) == weightkit.__all__


def test_the_readme_uses_only_what_is_exported() -> None:
    used = set(re.findall(r"\bwk\.(\w+)", README.read_text()))
    assert used
    assert used <= set(weightkit.__all__)
