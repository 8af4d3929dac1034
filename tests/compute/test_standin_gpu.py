"""The stand-in for a GPU refuses what a GPU does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from standin_gpu import GPU, StandIn, standin_gpu


@pytest.fixture
def gpu() -> Iterator[StandIn]:
    with standin_gpu() as gpu:
        yield gpu


@pytest.mark.usefixtures("gpu")
def test_it_computes() -> None:
    here = torch.arange(6.0).view(2, 3)
    there = here.to(GPU)
    assert (there.device, there.is_cuda) == (GPU, True)
    there.add_(there.new_ones(3)).mul_(torch.tensor(2.0))
    assert here.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert there[[1, 0], :2].cpu().tolist() == [[8.0, 10.0], [2.0, 4.0]]
    assert (float(there.sum()), bool((there > 1).all()), there.argmax().item()) == (42.0, True, 5)
    assert torch.zeros(2, device=GPU).device == torch.empty_like(there).device == GPU
    here.copy_(there)
    assert torch.equal(here, there.cpu())
    assert torch.equal(here, there.to("cpu"))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "mixed",
    [
        lambda here, there: there + here,
        lambda here, there: here.mul_(there),
        lambda here, there: here @ there,
        lambda here, there: torch.where(there > 0, there, here),
        lambda here, there: here[there.long()],
        lambda here, there: torch.cat([there, here]),
        lambda here, there: torch.ones(2, device="cuda:0"),
        lambda here, there: here.to(torch.device("cuda")),
    ],
)
def test_two_devices_do_not_meet(mixed: Callable[..., object]) -> None:
    here = torch.ones(2, 2)
    with pytest.raises(AssertionError, match="cuda:"):
        mixed(here, here.to(GPU))


def test_kernels_take_what_lies_there(gpu: StandIn) -> None:
    module = ModuleType("module")
    module.double = None  # type: ignore[attr-defined]
    gpu.replace(module, "double", lambda grid, tensor: tensor.mul_(2))
    there = torch.ones(2, 3).to(GPU)
    with pytest.raises(AssertionError, match="double is launched on cuda:0"):
        module.double[(1,)](there)
    with torch.cuda.device(GPU):
        module.double[(1,)](there)
        with pytest.raises(AssertionError, match="argument 0 lies on the CPU"):
            module.double[(1,)](torch.ones(2))
        with pytest.raises(AssertionError, match="argument 0 has gaps"):
            module.double[(1,)](there.T)
    assert there.tolist() == [[2.0] * 3] * 2
    assert gpu.launched == ["double"]


def test_it_leaves_cuda_as_it_was(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch starts CUDA when it first meets its name, and must not note that it had."""
    started = list[None]()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: started.append(None))
    assert (torch.zeros(2, device=GPU) + torch.ones(2).to(GPU)).tolist() == [1.0, 1.0]
    assert started == []
