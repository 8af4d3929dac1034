"""The Triton kernels twice: as Triton's interpreter runs them, anywhere, and as a GPU does, where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from interpreted import interpreted_copy, on_gpu

from weightkit.kernels import fp8_dequant


@pytest.fixture(scope="session")
def interpreted_kernels() -> Iterator[ModuleType]:
    with interpreted_copy("fp8_dequant") as module:
        yield module


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, interpreted_kernels: ModuleType) -> ModuleType:
    """The module under test; ``device`` says where its tensors belong."""
    if request.param == "interpreter":
        return interpreted_kernels
    return on_gpu(fp8_dequant)


@pytest.fixture
def device(kernels: ModuleType) -> torch.device:
    return torch.device("cpu" if kernels.interpreted() else "cuda")
