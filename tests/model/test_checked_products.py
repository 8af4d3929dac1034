"""The first products of each kind are held against plain torch; later ones cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gptq_cases import random_packed
from interpreted import interpreted_copy
from standin_gpu import GPU, StandIn, standin_gpu
from tiny import V3, write_tiny

from weightkit.compute import CpuEngine
from weightkit.errors import DeviceError
from weightkit.kernels import fp8_gemm, int4_gemm, partial_sums
from weightkit.kernels.gemm_plan import DEQUANT_TOKENS, TileConfig
from weightkit.layouts import open_checkpoint
from weightkit.model import CheckpointWeights, checkpoint_weights
from weightkit.model.checked_products import CheckedProducts
from weightkit.model.products import Form, Groups, Operands

N, K = 144, 256


class Kernels(ModuleType):
    """Plain products, of which ``wrong`` (row, output) is off by a hundredth of the largest."""

    wrong: tuple[int, int] | None = None

    def __init__(self) -> None:
        super().__init__("kernels")

    def fp8_linear(self, *operands: Any, **options: Any) -> torch.Tensor:
        return self._spoiled(fp8_gemm.fp8_linear(*operands, **options))

    def int4_linear(self, *operands: Any, **options: Any) -> torch.Tensor:
        return self._spoiled(int4_gemm.int4_linear(*operands, **options))

    def fp8_experts(self, *operands: Any, **options: Any) -> torch.Tensor:
        return self._spoiled(fp8_gemm.fp8_experts(*operands, **options))

    def int4_experts(self, *operands: Any, **options: Any) -> torch.Tensor:
        return self._spoiled(int4_gemm.int4_experts(*operands, **options))

    def _spoiled(self, made: torch.Tensor) -> torch.Tensor:
        if self.wrong is not None and len(made):
            made.view(-1, N)[self.wrong] += 0.02 * made.abs().max()
        return made


@pytest.fixture
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture
def products(kernels: Kernels) -> CheckedProducts:
    return CheckedProducts(kernels, kernels)


def weight(form: str) -> Operands:
    random = torch.Generator().manual_seed(0)
    if form == "fp8":
        codes = torch.randn(N, K, generator=random).to(torch.float8_e4m3fn).view(torch.uint8)
        return Operands(Form((N, K)), codes, torch.rand(2, 2, generator=random) + 0.1)
    bits = int(form[3:])
    packed = random_packed(N, K, bits, "ascending")
    qweight, _, scales, _ = map(torch.from_numpy, packed.arrays)
    return Operands(Form((N, K), bits), qweight, scales, Groups(K // 4, 3))


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(1)).bfloat16()


FORMS = pytest.mark.parametrize("form", ["fp8", "int4", "int8"])


@FORMS
@pytest.mark.parametrize("wrong", [(0, 0), (2, 143)])
def test_a_wrong_product_is_found_when_it_is_the_first(
    form: str, wrong: tuple[int, int], products: CheckedProducts, kernels: Kernels
) -> None:
    kernels.wrong = wrong
    with pytest.raises(DeviceError, match="cpu: the GPU multiplies otherwise than plain torch") as raised:
        products.linear(rows(3)[None], weight(form))
    assert f"1 of {3 * (128 if wrong[1] < 128 else 16)} results of 3 rows" in str(raised.value)
    assert "--device cpu" in str(raised.value)


@FORMS
def test_right_ones_pass_and_their_kind_is_not_looked_at_again(
    form: str, products: CheckedProducts, kernels: Kernels
) -> None:
    expected = products.linear(rows(3), weight(form))
    products.linear(rows(40), weight(form))
    kernels.wrong = (0, 0)
    assert not torch.equal(products.linear(rows(3), weight(form)), expected)  # the kind of 3 rows is known
    products.linear(rows(60), weight(form))
    with pytest.raises(DeviceError):
        products.linear(rows(65), weight(form))  # a larger tile: another kernel
    products.linear(rows(0), weight(form))


@FORMS
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 3e38])
def test_numbers_of_a_damaged_checkpoint_are_not_the_gpus(form: str, value: float, products: CheckedProducts) -> None:
    x, damaged = rows(3), weight(form)
    x[1, 7] = value
    x[2] = value
    products.linear(x, damaged)
    damaged.scales[0] = value  # too large for F16, it is Inf there
    products.linear(rows(40), damaged)
    products.experts(x, [damaged] * 2, (2, 1), (0, 2), TileConfig(16))
    assert len(products._seen) == 3


def test_what_a_matrix_library_computes_is_not_ours(products: CheckedProducts, kernels: Kernels) -> None:
    kernels.wrong = (0, 0)
    products.linear(rows(DEQUANT_TOKENS), weight("fp8"))


@FORMS
@pytest.mark.parametrize(("wrong", "counts"), [((0, 5), (2, 0, 3)), ((4, 5), (2, 0, 3)), ((0, 5), (0, 0, 5))])
def test_experts_first_and_last_are_looked_at(
    form: str, wrong: tuple[int, int], counts: tuple[int, ...], products: CheckedProducts, kernels: Kernels
) -> None:
    config = TileConfig(16)
    products.experts(rows(5), [weight(form)] * 3, (0, 0, 0), (0, 0, 0), config)  # no rows, nothing known
    kernels.wrong = wrong
    with pytest.raises(DeviceError, match="multiplies otherwise"):
        products.experts(rows(5), [weight(form)] * 3, counts, (1, 0, 0), config)
    again = CheckedProducts(Kernels(), Kernels())
    again.experts(rows(5), [weight(form)] * 3, counts, (1, 0, 0), config)
    assert len(again._seen) == 1


def interpreted(kernel: Any) -> Callable[..., None]:
    """A kernel that Triton's interpreter runs, without what only a GPU computes."""

    def launch(grid: Sequence[int], *arguments: Any, **options: Any) -> None:
        without = {"HARDWARE": False, "NATIVE": False, "UNPACK": ""}
        kernel[grid](*arguments, **options | {name: value for name, value in without.items() if name in options})

    return launch


@pytest.fixture
def gpu() -> Iterator[StandIn]:
    with (
        interpreted_copy("fp8_gemm") as fp8,
        interpreted_copy("int4_gemm") as int4,
        interpreted_copy("partial_sums") as sums,
        standin_gpu() as gpu,
    ):
        gpu.replace(fp8_gemm, "_matrix_kernel", interpreted(fp8._matrix_kernel))
        gpu.replace(int4_gemm, "_matrix_kernel", interpreted(int4._matrix_kernel))
        gpu.replace(partial_sums, "_sum_kernel", interpreted(sums._sum_kernel))
        yield gpu


@FORMS
def test_on_a_gpu_nothing_is_computed_on_two_devices(form: str, gpu: StandIn) -> None:
    products, made = CheckedProducts.of(GPU, torch.bfloat16), weight(form)
    assert isinstance(products, CheckedProducts)
    there = Operands(made.form, made.codes.to(GPU), made.scales.to(GPU), made.groups)
    gpu.launched.clear()
    found = products.linear(rows(3).to(GPU)[None], there)
    assert (found.device, found.shape) == (GPU, (1, 3, N))
    config = TileConfig(depth=products.config(made.form, (2, 3), GPU).depth, splits=2)
    assert products.experts(rows(5).to(GPU), [there] * 3, (2, 0, 3), (1, 0, 0), config).shape == (5, N)
    assert gpu.launched == ["_matrix_kernel", "_matrix_kernel", "_sum_kernel"]
    assert len(products._seen) == 2


def test_weights_of_a_checkpoint_are_tried_and_their_products_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "v3", V3)
    asked = list[tuple[str, int]]()

    def open_engine(device: str, work: Any) -> CpuEngine:
        asked.append((device, sum(1 for _ in work)))
        return CpuEngine()

    monkeypatch.setattr(checkpoint_weights, "open_engine", open_engine)
    opened = open_checkpoint(tmp_path / "v3")
    with CheckpointWeights(opened) as weights:
        assert [device for device, _ in asked] == ["auto"]
        assert asked[0][1] == len(weights._unit_sizes) > 0
