"""The Triton kernels twice: as Triton's interpreter runs them, anywhere, and as a GPU does, where there is one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import weightkit


@pytest.fixture(scope="session")
def interpreted_kernels() -> Iterator[ModuleType]:
    """A second copy of the module, whose kernels are interpreted.

    Triton looks at ``TRITON_INTERPRET`` when it decorates a kernel, so the variable need only be set while the copy is
    executed; the module other tests import stays as it is.
    """
    name = "fp8_dequant_interpreted"
    path = Path(weightkit.__file__).parent / "kernels" / "fp8_dequant.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, interpreted_kernels: ModuleType) -> ModuleType:
    """The module under test; ``device`` says where its tensors belong."""
    if request.param == "interpreter":
        return interpreted_kernels
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from weightkit.kernels import fp8_dequant

    if fp8_dequant.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    return fp8_dequant


@pytest.fixture
def device(kernels: ModuleType) -> torch.device:
    return torch.device("cpu" if kernels.interpreted() else "cuda")
