"""The solver on a GPU, held against plain torch on the CPU before it makes an integer that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from weightkit.compute.bounds import beyond_roundings
from weightkit.compute.trial import LEAVE_OUT, first_use
from weightkit.errors import DeviceError
from weightkit.kernels import gptq_solve
from weightkit.quantization.packed import Packed
from weightkit.quantization.settings import Settings

COLUMNS, OUTPUTS, TOKENS = 3 * gptq_solve.BLOCK, 64, 512
"""Of the made-up linear map and its inputs: several blocks, and more tokens than columns, for a sound Hessian."""

HALF_STEP = 0.51
"""A code may be so far from what it rounds, in steps: a half, and what sums in F32 lose of a step of 8 bits."""

SLACK = 1e-3
"""Of a factor's ratios and of a scale's loss: well above what F32 loses, well below what a wrong one is off by."""


def try_solver(settings: Settings, device: torch.device, kernels: ModuleType = gptq_solve) -> None:
    """Make integers of a small made-up linear map, as ``settings`` say, and hold each step against its definition.

    Steps that round once are held against the CPU's bits; sums against what roundings explain; and each code against
    what it is to round, reckoned anew in F64 from the codes before it, so that a tie does no harm to what follows.

    Args:
        device: whose kernels are tried.
        kernels: ``weightkit.kernels.gptq_solve``.

    Raises:
        DeviceError: a step is off, or fails.
    """
    with first_use(device):
        for step, wrong in _steps(settings, device, kernels):
            count = int(wrong.sum())
            if count:
                raise DeviceError(
                    "the GPU quantizes otherwise than plain torch",
                    where=device,
                    found=f"{count:,} of {wrong.numel():,} {step} are off",
                    fix=LEAVE_OUT,
                )


def _steps(settings: Settings, device: torch.device, kernels: ModuleType) -> Iterator[tuple[str, torch.Tensor]]:
    """What each step makes, and where it is wrong: bool."""
    size = COLUMNS if settings.group_size == -1 else settings.group_size
    grid = {"group_size": size, "bits": settings.bits}
    weight, x = _made_up()
    there = weight.to(device)
    importance = x.float().square().sum(0)
    if settings.scales == "largest":
        scales = kernels.largest_scales(there, **grid)
    else:
        scales = kernels.search_scales(there, importance.to(device), **grid)
        yield "scales", _worse(weight, scales.cpu(), importance, grid)
    if settings.method == "rtn":
        codes = kernels.round_to_nearest(there, scales, **grid)
        yield "codes", _no_rounding(codes.cpu(), scales.cpu(), weight, grid)
    else:
        total = torch.zeros(COLUMNS, COLUMNS, device=device)
        kernels.add_gram(total, x.to(device))
        hessian = total.cpu().tril()
        yield "sums of inputs", beyond_roundings(hessian, x.T, x.T).tril()
        factor = kernels.factorize(total, act_order=settings.order == "act", damping=settings.damping)
        order, added = factor.order.cpu(), torch.tensor(factor.damping)
        ordered = kernels.reorder(total, factor.order, added.to(device)).cpu()
        yield "sums in their order", ordered != gptq_solve.reorder(hessian, order, added)
        ratios = factor.ratios.cpu().double().tril(-1)
        damped = gptq_solve.reorder(hessian.double(), order, factor.damping * hessian.double().diagonal().mean())
        cholesky = torch.linalg.cholesky(damped)
        yield "ratios", ~((cholesky / cholesky.diagonal()).tril(-1) - ratios).abs().le(SLACK)
        codes = kernels.solve(there, scales, factor, **grid)
        errors = weight - gptq_solve.values(codes.cpu(), scales.cpu(), **grid)
        wanted = torch.empty_like(weight, dtype=torch.float64)
        wanted[order] = weight[order].double() + ratios.T @ errors[order].double()
        yield "codes", _no_rounding(codes.cpu(), scales.cpu(), wanted, grid)
    packed, plain = (Packed.of(c, s, **grid) for c, s in ((codes, scales), (codes.cpu(), scales.cpu())))
    yield "words of packed codes", packed.qweight.cpu() != plain.qweight
    if settings.method == "gptq":  # later layers see what these make of their inputs
        bits = [part.weight(torch.bfloat16).cpu().view(torch.int16) for part in (packed, plain)]
        yield "weights of packed codes", bits[0] != bits[1]


def _made_up() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [COLUMNS, OUTPUTS] F32, transposed, its outputs of different sizes; inputs [TOKENS, COLUMNS] BF16."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(COLUMNS, OUTPUTS, generator=random) * torch.rand(OUTPUTS, generator=random).add(0.5)
    x = torch.randn(TOKENS, COLUMNS, generator=random) * torch.rand(COLUMNS, generator=random).add(0.5)
    return weight, (x + 0.3 * x.roll(1, dims=1)).bfloat16()


def _worse(weight: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor, grid: dict[str, int]) -> torch.Tensor:
    """[groups, N]: where a scale is none of F16's, or leaves more error than the one that the CPU finds. Which of two
    that are as good as each other is taken, the order of a sum decides; and where F16's numbers meet, the last bit of
    a division decides which of its neighbours the GPU tries in place of that one."""

    def losses(of: torch.Tensor) -> torch.Tensor:
        rounded = gptq_solve.values(gptq_solve.round_to_nearest(weight, of, **grid), of, **grid)
        loss = importance.double()[:, None] * (weight.double() - rounded).square()
        return torch.stack([part.sum(0) for part in loss.split(grid["group_size"])])

    found = gptq_solve.search_scales(weight, importance, **grid).half().view(torch.int16)
    near = [losses((found + step).view(torch.float16).float()) for step in (-1, 0, 1)]
    return ~losses(scales).le(torch.stack(near).amax(0) * (1 + SLACK)) | (scales.half().float() != scales)


def _no_rounding(codes: torch.Tensor, scales: torch.Tensor, wanted: torch.Tensor, grid: dict[str, int]) -> torch.Tensor:
    """[K, N]: where a code is not the one nearest to what is ``wanted``, of those that there are."""
    top = (1 << grid["bits"]) - 1
    each = scales.double().repeat_interleave(grid["group_size"], dim=0)[: len(codes)]
    exact = (wanted.double() / each + (1 << (grid["bits"] - 1))).clamp(0, top)
    return ~(codes.double() - exact).abs().le(HALF_STEP)
