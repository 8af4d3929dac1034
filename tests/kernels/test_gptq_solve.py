"""GPTQ's solver: against the textbook in F64; its kernels, as Triton's interpreter and a GPU run them, against plain
torch; and compiled for an H100 without one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from interpreted import interpreted_copy

from weightkit.kernels import gptq_solve
from weightkit.kernels.gptq_solve import (
    add_gram,
    factorize,
    largest_scales,
    reorder,
    round_to_nearest,
    search_scales,
    solve,
    solve_reference,
    values,
)

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of codes, how many may differ where the same is computed in another precision or order: ties, and what follows from
#: them in an output's later columns.
TIES = 0.005


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small products are slower on several threads, and far slower where these are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(k: int, n: int, seed: int = 0) -> torch.Tensor:
    """[K, N] F32, of rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, n, generator=generator) * torch.exp(torch.randn(n, generator=generator))


def inputs(tokens: int, k: int, seed: int = 1) -> torch.Tensor:
    """[tokens, K] F32, correlated, with columns of very different size, exact in BF16."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(max(2, k // 2), k, generator=generator) * torch.exp(torch.randn(k, generator=generator))
    x = torch.randn(tokens, len(mix), generator=generator) @ mix + 0.3 * torch.randn(tokens, k, generator=generator)
    return x.bfloat16().float()


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    """The lower triangle; what lies above must not be read."""
    total = torch.zeros(x.shape[1], x.shape[1])
    add_gram(total, x)
    return total.tril() + torch.full_like(total, float("nan")).triu(1)


def differing(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The share of codes that differ."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == torch.uint8
    return (found.cpu() != expected.cpu()).double().mean().item()


# --- the solver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [True, False], ids=["act", "natural"])
@pytest.mark.parametrize(
    ("k", "n", "group_size", "bits"),
    [
        (128, 24, 128, 4),
        (256, 24, 64, 4),
        (144, 16, 16, 4),  # no multiple of a block
        (130, 8, 130, 4),  # one column more than a block and a half, whole columns in a group
        (200, 8, 64, 4),  # a last group that is cut short
        (129, 8, 43, 4),
        (1, 8, 1, 4),
        (256, 16, 32, 8),
        (1100, 8, 128, 4),  # more than a superblock
    ],
)
def test_the_codes_are_the_textbooks(k: int, n: int, group_size: int, bits: int, act_order: bool) -> None:
    """One Cholesky factorization in F32 gives what the factor of the inverse Hessian gives in F64."""
    weight, x = weights(k, n), inputs(2 * k + 8, k)
    hessian = hessian_of(x)
    grid = {"group_size": group_size, "bits": bits}
    scales = largest_scales(weight, **grid)
    factor = factorize(hessian, act_order=act_order, damping=0.01)
    found = solve(weight, scales, factor, **grid)
    exact = x.double().T @ x.double()
    added = 0.01 * exact.diagonal().mean().item()
    expected = solve_reference(weight, scales, exact, factor.order.flip(0), added, **grid)
    assert differing(found, expected) <= TIES
    if act_order:
        sizes = exact.diagonal()[factor.order.flip(0)]
        assert (sizes[:-1] >= sizes[1:] * (1 - 1e-6)).all()
    else:
        assert factor.order.tolist() == list(range(k - 1, -1, -1))


def test_by_hand() -> None:
    """Two columns of one output: the error of the first moves the second's target by H[0, 1] / H[1, 1]."""
    hessian = torch.tensor([[4.0, 0.0], [2.0, 2.0]])
    weight = torch.tensor([[1.3], [0.4]])  # column 0 first: rounds to 1, error 0.3; column 1 aims at 0.4 + 0.3 * 2 / 2
    factor = factorize(hessian, act_order=True, damping=1e-9)
    codes = solve(weight, torch.ones(1, 1), factor, group_size=2, bits=4)
    assert codes.tolist() == [[9], [9]]
    assert round_to_nearest(weight, torch.ones(1, 1), group_size=2, bits=4).tolist() == [[9], [8]]


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_better_than_rounding(bits: int) -> None:
    k, n = 192, 32
    weight, x = weights(k, n), inputs(1000, k)
    grid = {"group_size": 64, "bits": bits}
    scales = largest_scales(weight, **grid)
    solved = solve(weight, scales, factorize(hessian_of(x), act_order=True, damping=0.01), **grid)
    errors = [
        (x @ (weight - values(codes, scales, **grid))).norm()
        for codes in (solved, round_to_nearest(weight, scales, **grid))
    ]
    assert errors[0] < 0.5 * errors[1]


def test_columns_without_inputs_do_no_harm() -> None:
    """Dead columns are rounded to nearest; those beside them are solved as if alone."""
    x = inputs(300, 64)
    x[:, ::4] = 0
    weight, grid = weights(64, 8), {"group_size": 64, "bits": 4}
    scales = largest_scales(weight, **grid)
    found = solve(weight, scales, factorize(hessian_of(x), act_order=True, damping=0.01), **grid)
    rounded = round_to_nearest(weight, scales, **grid)
    assert torch.equal(found[::4], rounded[::4])
    assert not torch.equal(found, rounded)


# --- factorization ----------------------------------------------------------------------------------------------------


def test_the_factor_is_that_of_the_damped_hessian() -> None:
    hessian = hessian_of(inputs(100, 40))
    factor = factorize(hessian, act_order=True, damping=0.05)
    whole = hessian.tril().double() + hessian.tril(-1).double().T
    damped = whole + 0.05 * whole.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    cholesky = torch.linalg.cholesky(damped[factor.order][:, factor.order])
    expected = (cholesky / cholesky.diagonal()).tril(-1)
    torch.testing.assert_close(factor.ratios.tril(-1).double(), expected, rtol=1e-3, atol=1e-4)
    assert (factor.damping, factor.retries) == (0.05, 0)


def test_a_singular_hessian_takes_more_damping_and_says_so() -> None:
    x = inputs(3, 96)  # rank 3 of 96, in F32: no damping that small makes it positive
    factor = factorize(hessian_of(x), act_order=True, damping=1e-9)
    assert factor.retries == 1
    assert factor.damping == pytest.approx(1e-3)
    assert torch.isfinite(factor.ratios.tril(-1)).all()


def test_a_hessian_that_no_damping_makes_positive() -> None:
    hessian = -torch.eye(8)
    hessian[7, 0] = 1e6
    with pytest.raises(ArithmeticError, match="no Cholesky factor"):
        factorize(hessian, act_order=False, damping=0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    x = inputs(50, 16)
    x[7, 3] = value
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        factorize(hessian_of(x), act_order=True, damping=0.01)


def test_inputs_that_are_all_zero() -> None:
    factor = factorize(torch.zeros(8, 8), act_order=True, damping=0.01)
    assert torch.isfinite(factor.ratios.tril(-1)).all()


# --- scales -----------------------------------------------------------------------------------------------------------

GRIDS = [{"group_size": size, "bits": bits} for size in (16, 48, 50, 144) for bits in (4, 8)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"g{grid['group_size']}-int{grid['bits']}")


@grids
def test_largest_scales_span_the_largest_weight(grid: dict[str, int]) -> None:
    weight = weights(144, 8)
    weight[:16, 3] = 0
    top = (1 << grid["bits"]) - 1
    for group, part in enumerate(weight.split(grid["group_size"])):
        found = largest_scales(weight, **grid)[group]
        for n in range(8):
            largest = part[:, n].abs().max().item()
            expected = torch.tensor(largest * 2 / top).half().float() if largest else torch.tensor(1.0)
            torch.testing.assert_close(found[n], expected, rtol=2e-3, atol=0)
            assert found[n] == found[n].half().float()
    assert len(largest_scales(weight, **grid)) == -(-144 // grid["group_size"])


@grids
def test_searched_scales_are_never_worse_than_the_largest(grid: dict[str, int]) -> None:
    weight, importance = weights(144, 24), torch.rand(144, generator=torch.Generator().manual_seed(5))

    def losses(scales: torch.Tensor) -> torch.Tensor:
        rounded = values(round_to_nearest(weight, scales, **grid), scales, **grid)
        loss = importance[:, None].double() * (weight - rounded).double().square()
        return torch.stack([part.sum(0) for part in loss.split(grid["group_size"])])

    searched, largest = search_scales(weight, importance, **grid), largest_scales(weight, **grid)
    assert (losses(searched) <= losses(largest) * (1 + 1e-5)).all()
    assert (searched <= largest).all()
    assert torch.equal(searched, searched.half().float())
    if grid["bits"] == 4:
        assert losses(searched).sum() < 0.98 * losses(largest).sum()


def test_tiny_and_huge_weights_keep_scales_that_f16_holds() -> None:
    weight = torch.full((16, 3), 1e-12)
    weight[:, 1], weight[:, 2] = 4e5, 6e5
    scales = search_scales(weight, torch.ones(16), group_size=16, bits=4)
    assert scales[0, 0] == 2.0**-24
    assert torch.isfinite(scales[0, 1])
    assert torch.isinf(largest_scales(weight, group_size=16, bits=4)[0, 2])
    assert torch.isfinite(scales[0, 2])  # a smaller grid reaches far enough


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e7], ids=str)
def test_search_finds_no_scale_for_what_has_none(value: float, kernels: ModuleType, device: torch.device) -> None:
    weight = weights(32, 8)
    weight[17, 3] = value
    for found in (
        search_scales(weight, torch.ones(32), group_size=16, bits=4),
        kernels.search_scales(weight.to(device), torch.ones(32, device=device), group_size=16, bits=4).cpu(),
    ):
        assert torch.isinf(found).nonzero().tolist() == [[1, 3]]


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted_solver() -> Iterator[ModuleType]:
    """A second copy of the module, whose kernels are interpreted, and run wherever the tensors lie.

    They call functions of Triton's own, which are interpreted only where Triton was imported so.
    """
    if isinstance(tl.sum, triton.JITFunction):
        pytest.skip("run by test_the_interpreter, in a process of its own")
    with interpreted_copy("gptq_solve") as module:
        module._kernels_run = lambda _: True  # type: ignore[attr-defined]
        yield module


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """The module under test; tensors belong where ``device`` says."""
    if request.param == "interpreter":
        module: ModuleType = request.getfixturevalue("interpreted_solver")
        return module
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not isinstance(tl.sum, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set")
    return gptq_solve


def test_the_interpreter() -> None:
    """The kernels' tests below as Triton's interpreter runs them, which it must be told before it is imported."""
    if not isinstance(tl.sum, triton.JITFunction):
        pytest.skip("this is that process")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreter-", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 26


@pytest.fixture
def device(kernels: ModuleType) -> torch.device:
    return torch.device("cuda" if kernels is gptq_solve else "cpu")


@pytest.mark.parametrize(
    ("k", "n", "start", "end"),
    [(256, 20, 128, 256), (144, 16, 0, 128), (144, 17, 128, 144), (129, 5, 1, 129), (129, 5, 0, 1), (3, 1, 1, 2)],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_round_columns_kernel(
    k: int, n: int, start: int, end: int, bits: int, kernels: ModuleType, device: torch.device
) -> None:
    weight = weights(k, n)
    target = weight + 0.02 * weights(k, n, seed=3)
    scales = largest_scales(weight, group_size=16, bits=bits)
    group_of = (torch.randperm(k, generator=torch.Generator().manual_seed(4)) // 16).to(torch.int32)
    ratios = 0.1 * torch.randn(k, k, generator=torch.Generator().manual_seed(6))
    results = []
    for module, where in ((gptq_solve, torch.device("cpu")), (kernels, device)):
        codes = torch.full((k, n), 77, dtype=torch.uint8, device=where)
        errors = torch.full((k, n), 77.0, device=where)
        operands = [tensor.to(where, copy=True) for tensor in (weight, target, scales, group_of, ratios)]
        module.round_columns(*operands, codes, errors, start, end, bits)
        results.append((codes.cpu(), errors.cpu()))
    (expected, expected_errors), (found, found_errors) = results
    assert differing(found[start:end], expected[start:end]) <= TIES
    same = found == expected
    torch.testing.assert_close(found_errors[same], expected_errors[same], rtol=1e-4, atol=1e-5)
    for tensor in (found, found_errors):
        assert (tensor[:start] == 77).all()
        assert (tensor[end:] == 77).all()


@pytest.mark.parametrize(("tokens", "k"), [(64, 128), (1, 16), (100, 144), (65, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_gram_kernel(tokens: int, k: int, dtype: torch.dtype, kernels: ModuleType, device: torch.device) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies BF16's bits")
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    before = torch.randn(k, k, generator=torch.Generator().manual_seed(2))
    total = before.to(device, copy=True)
    kernels.add_gram(total, x.to(device))
    expected = before.double() + x.double().T @ x.double()
    torch.testing.assert_close(total.cpu().double().tril(), expected.tril(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [1, 16, 144, 300])
def test_reorder_kernel(k: int, kernels: ModuleType, device: torch.device) -> None:
    hessian = hessian_of(inputs(20, k))
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    whole = hessian.tril() + hessian.tril(-1).T
    expected = whole[order][:, order] + 0.75 * torch.eye(k)
    assert torch.equal(reorder(hessian, order, torch.tensor(0.75)), expected)
    found = kernels.reorder(hessian.to(device), order.to(device), torch.tensor(0.75, device=device))
    assert torch.equal(found.cpu(), expected)


@grids
def test_search_scales_kernel(grid: dict[str, int], kernels: ModuleType, device: torch.device) -> None:
    """The same scale but where two are as good as each other, which the order of a sum decides."""
    weight, importance = weights(144, 40), torch.rand(144, generator=torch.Generator().manual_seed(5))
    weight[:16, 3] = 0
    expected = search_scales(weight, importance, **grid)
    found = kernels.search_scales(weight.to(device), importance.to(device), **grid).cpu()
    assert (found != expected).double().mean() <= 0.01
    assert ((found - expected).abs() <= 0.45 * expected).all()


@pytest.mark.parametrize("bits", [4])
def test_the_kernels_together(bits: int, kernels: ModuleType, device: torch.device) -> None:
    """From inputs to codes, on a matrix that no block divides."""
    k, n, grid = 136, 16, {"group_size": 40, "bits": bits}
    weight, x = weights(k, n), inputs(500, k)
    total, plain = torch.zeros(k, k, device=device), torch.zeros(k, k)
    x = (x / x.abs().max() * 100).half()
    kernels.add_gram(total, x.to(device))
    add_gram(plain, x)
    scales = search_scales(weight, plain.diagonal(), **grid)
    factor = kernels.factorize(total, act_order=True, damping=0.01)
    assert torch.equal(factor.order.cpu(), factorize(plain, act_order=True, damping=0.01).order)
    found = kernels.solve(weight.to(device), scales.to(device), factor, **grid)
    exact = x.double().T @ x.double()
    added = 0.01 * exact.diagonal().mean().item()
    expected = solve_reference(weight, scales, exact, factor.order.cpu().flip(0), added, **grid)
    assert differing(found, expected) <= TIES


def test_all_kernels_compile_for_an_h100() -> None:
    """Shapes that only the compiler checks, with the arguments that the launchers really give, at a width of V3."""
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from weightkit.kernels import gptq_solve as module

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
         torch.int32: "*i32", torch.int64: "*i64"}
seen = set()

class Compiling:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return self.launch
    def launch(self, *arguments, num_warps=4, num_stages=3, **named):
        values = dict(zip(self.kernel.arg_names, arguments)) | named
        signature, constants = {}, {}
        for place, (name, value) in enumerate(values.items()):
            if self.kernel.params[place].is_constexpr or value is 1:
                signature[name], constants[(place,)] = "constexpr", value
            else:
                signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        assert list(values) == self.kernel.arg_names
        source = ASTSource(self.kernel, signature, constants)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        shared = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared
        assert shared <= 227 << 10, (self.kernel.__name__, shared)
        seen.add(self.kernel.__name__)

names = [name for name, value in vars(module).items() if isinstance(value, triton.JITFunction)]
for name in names:
    setattr(module, name, Compiling(getattr(module, name)))
module._kernels_run = lambda _: True

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

for k, n in ((7168, 2048), (129, 8)):
    module.add_gram(empty(k, k), empty(1000, k, dtype=torch.bfloat16))
    module.reorder(empty(k, k), empty(k, dtype=torch.int64), empty())
    for size in (128, k):
        module.search_scales(empty(k, n), empty(k), group_size=size, bits=4)
    factor = module.Factor(empty(k, dtype=torch.int64), empty(k, k), 0.01, 0)
    module.solve(empty(k, n), empty(-(-k // 128), n), factor, group_size=128, bits=4)
assert seen == set(names) and len(names) >= 4, (seen, names)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
