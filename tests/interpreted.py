"""Modules whose kernels Triton's interpreter runs, on CPU tensors, beside those that the package imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton.language  # noqa: F401 - first here, or a copy would have Triton's own functions interpreted

import weightkit

SHARED = ("conversions", "partial_sums")
"""What modules of kernels import kernels from, each after those that it imports: copied with them."""

_COPIES = count()
"""Numbers of copies: several of one module may be in use at a time."""


@contextmanager
def interpreted_copy(name: str) -> Iterator[ModuleType]:
    """A second copy of a module of kernels, interpreted: Triton looks at the variable when it decorates them."""
    importlib.import_module(f"weightkit.kernels.{name}")  # with all that it imports: only the copies are interpreted
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for shared in SHARED:
            patch.setitem(sys.modules, f"weightkit.kernels.{shared}", _copied(shared))
        module = _copied(name)
    yield module
    del sys.modules[module.__name__]


def _copied(name: str) -> ModuleType:
    path = Path(weightkit.__file__).parent / "kernels" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_interpreted_{next(_COPIES)}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_gpu(module: ModuleType) -> ModuleType:
    """The module itself, where its kernels run on a GPU; else the test is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if module.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    return module
