"""Kernels are launched on the device of their tensors, whatever the thread's current one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from weightkit.kernels import fp8_dequant, fp8_gemm, gptq_format, gptq_solve, int4_gemm

Made = dict[str, torch.Tensor]


def random(device: str) -> Made:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 0x78, (256, 384), dtype=torch.uint8, generator=generator)
    words = torch.randint(-(2**31), 2**31, (48, 256), generator=generator).to(torch.int32)
    made = {
        "x": torch.randn(5, 384, generator=generator).bfloat16(),
        "codes": codes,
        "block_scale": torch.rand(2, 3, generator=generator) + 0.1,
        "words": words,
        "group_scales": (torch.rand(3, 256, generator=generator) * 0.01).half(),
        "zeros": gptq_format.pack_zeros(3, 256),
        "g_idx": torch.arange(384, dtype=torch.int32) // 128,
        "weight": torch.randn(384, 64, generator=generator),
        "rows": torch.randn(512, 384, generator=generator).bfloat16(),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def solved(made: Made) -> torch.Tensor:
    weight, hessian = made["weight"], made["rows"].new_zeros(384, 384, dtype=torch.float32)
    gptq_solve.add_gram(hessian, made["rows"])
    importance = hessian.diagonal().contiguous()
    scales = gptq_solve.search_scales(weight, importance, group_size=128, bits=4)
    factor = gptq_solve.factorize(hessian, act_order=True, damping=0.01)
    return gptq_solve.solve(weight, scales, factor, group_size=128, bits=4)


CALLS: dict[str, Callable[[Made], torch.Tensor]] = {
    "fp8_linear": lambda made: fp8_gemm.fp8_linear(made["x"], made["codes"], made["block_scale"]),
    "fp8_experts": lambda made: fp8_gemm.fp8_experts(made["x"], [made["codes"]] * 2, [made["block_scale"]] * 2, [2, 3]),
    "int4_linear": lambda made: int4_gemm.int4_linear(made["x"], made["words"], made["group_scales"], group_size=128),
    "int4_experts": lambda made: int4_gemm.int4_experts(
        made["x"], [made["words"]] * 2, [made["group_scales"]] * 2, [2, 3], group_size=128
    ),
    "fp8_dequant": lambda made: fp8_dequant.dequant(made["codes"], made["block_scale"]),
    "fp8_dequant_many": lambda made: fp8_dequant.dequant_many([made["codes"]] * 2, [made["block_scale"]] * 2)[1],
    "gptq_dequant": lambda made: gptq_format.dequant(made["words"], made["zeros"], made["group_scales"], made["g_idx"]),
    "gptq_solve": solved,
}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_on_a_device_that_is_not_the_current_one(name: str) -> None:
    with torch.cuda.device(0):
        expected, found = (CALLS[name](random(device)) for device in ("cuda:0", "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert found.device == torch.device("cuda", 1)
    assert torch.equal(expected.cpu(), found.cpu())


def test_gptq_solve_launches_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: each launch happens while the device of its first tensor is the current one."""
    current, launched = list[torch.Tensor](), list[str]()

    @contextmanager
    def on_device(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return self.launch

        def launch(self, first: torch.Tensor, *_: Any, **__: Any) -> None:
            assert current == [first]
            launched.append(self.name)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    names = [name for name in vars(gptq_solve) if name.endswith("_kernel")]
    for name in names:
        monkeypatch.setattr(gptq_solve, name, Kernel(name))
    monkeypatch.setattr(gptq_solve, "on_device", on_device)
    monkeypatch.setattr(gptq_solve, "_kernels_run", lambda _: True)
    gptq_solve.add_gram(empty(256, 256), empty(9, 256, dtype=torch.bfloat16))
    gptq_solve.search_scales(empty(256, 8), empty(256), group_size=128, bits=4)
    gptq_solve.reorder(empty(256, 256), empty(256, dtype=torch.int64), empty())
    factor = gptq_solve.Factor(empty(256, dtype=torch.int64), empty(256, 256), 0.01, 0)
    gptq_solve.solve(empty(256, 8), empty(2, 8), factor, group_size=128, bits=4)
    assert set(launched) == set(names)
