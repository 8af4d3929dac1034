"""Experts' products cut into several launches: with the config of all jobs, each job's bits are those of one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from interpreted import interpreted_copy, on_gpu

from weightkit.kernels import fp8_gemm, gemm_plan, int4_gemm

N, K = 40, 1024
COUNTS = [2, 1, 1, 1]
Product = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is interpreted has room for 4 programs: one for each job, two for a job alone."""
    real = gemm_plan._processors
    monkeypatch.setattr(gemm_plan, "_processors", lambda device: 1 if device.type == "cpu" else real(device))


@pytest.fixture(scope="module", params=["int4", "fp8"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, kind: str) -> Iterator[ModuleType]:
    if request.param == "interpreter":
        with interpreted_copy(f"{kind}_gemm") as module:
            yield module
        return
    yield on_gpu({"int4": int4_gemm, "fp8": fp8_gemm}[kind])


def operands(kind: str, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = np.random.default_rng(5)
    found = []
    for _ in COUNTS:
        if kind == "int4":
            codes = torch.from_numpy(random.integers(-(2**31), 2**31, (K // 8, N)).astype(np.int32))
            scales = torch.from_numpy(random.uniform(0.001, 0.1, (K // 128, N)).astype(np.float16))
        else:
            codes = torch.from_numpy(random.normal(size=(N, K)).astype(np.float32)).to(torch.float8_e4m3fn)
            scales = torch.from_numpy(random.uniform(0.001, 0.1, (1, K // 128)).astype(np.float32))
        found.append((codes.to(device), scales.to(device)))
    return found


def test_bits_do_not_depend_on_what_shares_the_launch(kernels: ModuleType, kind: str) -> None:
    device = torch.device("cpu" if kernels.interpreted() else "cuda")
    pairs, x = operands(kind, device), torch.randn(sum(COUNTS), K, generator=torch.Generator().manual_seed(1))
    x = x.bfloat16().to(device)
    starts = [sum(COUNTS[:job]) for job in range(len(COUNTS))]
    product = kernels.int4_experts if kind == "int4" else kernels.fp8_experts
    more = {"group_size": 128} if kind == "int4" else {}
    config = kernels.experts_config(COUNTS, (N, K), device)
    assert config.splits > 0

    def in_chunks(size: int) -> torch.Tensor:
        parts = []
        for first in range(0, len(COUNTS), size):
            jobs = slice(first, first + size)
            codes, scales = zip(*pairs[jobs], strict=True)
            parts.append(product(x, codes, scales, COUNTS[jobs], starts=starts[jobs], config=config, **more))
        return torch.cat(parts)

    codes, scales = zip(*pairs, strict=True)
    whole = product(x, codes, scales, COUNTS, **more)
    assert torch.equal(in_chunks(len(COUNTS)), whole)
    assert torch.equal(in_chunks(3), whole)
    assert torch.equal(in_chunks(1), whole)


def test_a_launch_of_few_jobs_would_split_otherwise() -> None:
    """Else the test above shows nothing: alone, a job is given more splits than all together leave for it."""
    cpu = torch.device("cpu")
    for module in (int4_gemm, fp8_gemm):
        assert module.experts_config([1], (N, K), cpu).splits > module.experts_config(COUNTS, (N, K), cpu).splits


@pytest.mark.parametrize("shared_bytes", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("tokens", [1, 32, 64, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_fp8_tile_fits_the_shared_memory(
    shared_bytes: int, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the compiler gave for all of these: buffers for a step fewer than stages, or for all on Hopper, the
    weights of a step in F32, and up to a KiB for scales. F32, 32 tokens and four stages took 104.8 KiB."""
    launched = list[int]()

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, num_stages, **__: launched.append(num_stages)

    monkeypatch.setattr(gemm_plan, "_shared_bytes", lambda _: shared_bytes)
    monkeypatch.setattr(gemm_plan, "_processors", lambda _: 132)
    monkeypatch.setattr(fp8_gemm, "_matrix_kernel", Kernel())
    monkeypatch.setattr(fp8_gemm, "sum_parts", lambda *_: None)
    monkeypatch.setattr(fp8_gemm, "interpreted", lambda: False)
    x = torch.empty(tokens, 7168, dtype=dtype, device="meta")
    codes = torch.empty(2048, 7168, dtype=torch.uint8, device="meta")
    fp8_gemm._launch(x, [codes], [torch.empty(16, 56, device="meta")], None, None, None)
    (stages,), config = launched, fp8_gemm.choose_config(tokens)
    step = config.depth * (config.tokens * dtype.itemsize + config.columns)
    weights = config.depth * config.columns * 4 if dtype == torch.float32 else 0
    buffers = stages if shared_bytes > 200 << 10 else stages - 1
    assert buffers * step + weights + 1024 <= shared_bytes
