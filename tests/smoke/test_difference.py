"""What rounding explains, and which slices are off, on tensors made here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from weightkit.smoke.difference import Region, compare, ranges
from weightkit.smoke.likeness import recognize
from weightkit.smoke.rounding import Format, explained, round_to

BF16, FP8, INT4, INT8 = Format("BF16"), Format("F8_E4M3"), Format("I4", 128), Format("I8", 128)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(300, 256, generator=torch.Generator().manual_seed(7)).bfloat16().float()


def nearest(weight: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Each value's nearest level, by looking at all."""
    return levels[(weight[..., None] - levels).abs().argmin(dim=-1)]


def test_rounding_to_fp8_takes_the_nearest_of_all_codes(weight: torch.Tensor) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    block, levels = weight[128:256, :128], codes[codes.isfinite()]
    scale = block.abs().max() / 448
    expected = nearest(block, levels * scale)
    away, best = (round_to(weight, FP8)[128:256, :128] - block).abs(), (expected - block).abs()
    torch.testing.assert_close(away, best, rtol=0, atol=float(scale) * 1e-3)


@pytest.mark.parametrize(("form", "levels"), [(INT4, 16), (INT8, 256)])
def test_rounding_to_codes_takes_the_nearest_level(form: Format, levels: int, weight: torch.Tensor) -> None:
    row = weight[17, 128:256]
    scale = row.abs().max() * 2 / (levels - 1)
    expected = nearest(row, (torch.arange(levels) - levels // 2) * scale)
    away, best = (round_to(weight, form)[17, 128:256] - row).abs(), (expected - row).abs()
    torch.testing.assert_close(away, best, rtol=0, atol=float(scale) * 1e-3)


def test_a_cast_from_fp8_has_nothing_left_to_explain(weight: torch.Tensor) -> None:
    stored = round_to(weight, FP8)
    assert (explained(stored, stored.bfloat16().float(), (FP8, BF16)).norm() / stored.norm()) < 0.005
    independent = explained(weight, round_to(weight, FP8), (BF16, FP8)).norm() / weight.norm()
    assert 0.02 < independent < 0.04


def test_two_roundings_to_one_format_explain_their_difference(weight: torch.Tensor) -> None:
    step = weight.abs().amax(dim=1, keepdim=True) / 7  # other scales than those that follow from the largest
    one, other = round_to(weight, INT4), (weight / step).round() * step
    found, estimate = (one - other).norm(), explained(one, other, (INT4, INT4)).norm()
    assert 0.5 < found / estimate < 2


@pytest.mark.parametrize("form", [FP8, INT8, INT4])
def test_rounding_is_no_suspect(form: Format, weight: torch.Tensor) -> None:
    for pair, formats in (
        ((weight, round_to(weight, form)), (BF16, form)),
        ((round_to(weight, form), weight), (form, BF16)),
    ):
        difference, sound = compare("x.weight", *pair, formats)
        assert not difference.is_suspect
        assert difference.relative > 0
        assert (sound - pair[0]).norm() / pair[0].norm() == pytest.approx(difference.explained, rel=0.05)


def scaled(factor: float) -> Callable[[torch.Tensor], None]:
    def change(weight: torch.Tensor) -> None:
        weight[128:256, 128:] *= factor

    return change


def column(weight: torch.Tensor) -> None:
    weight[:, 5] = 0


def negated(weight: torch.Tensor) -> None:
    weight[10:20] *= -1


@pytest.mark.parametrize("form", [BF16, FP8, INT8, INT4], ids=str)
@pytest.mark.parametrize(
    ("change", "region", "scale"),
    [
        (scaled(2.0), "rows 128:256, columns 128:256", 2.0),
        (scaled(0.5), "rows 128:256, columns 128:256", 0.5),
        (scaled(0.0), "rows 128:256, columns 128:256", 0.0),
        (negated, "rows 10:20", None),
    ],
    ids=["doubled", "halved", "zeros", "negated"],
)
def test_a_region_that_is_off(
    change: Callable[[torch.Tensor], None], region: str, scale: float | None, form: Format, weight: torch.Tensor
) -> None:
    other = round_to(weight, form)
    change(other)
    difference, _ = compare("x.weight", weight, other, (BF16, form))
    assert difference.is_suspect
    assert str(difference.region) == region
    assert difference.scale == (None if scale is None else pytest.approx(scale, rel=0.02))


def test_a_column_is_off_where_values_are_rounded_one_by_one(weight: torch.Tensor) -> None:
    for form in (BF16, FP8):
        other = round_to(weight, form)
        other[:, 5] = 0
        difference, _ = compare("x.weight", weight, other, (BF16, form))
        assert (str(difference.region), difference.scale) == ("column 5", 0.0)
    other = round_to(weight, INT4)
    other[:, 5] = 0  # GPTQ may do so where calibration had no such input: outputs decide
    assert compare("x.weight", weight, other, (BF16, INT4))[0].region is None


def test_vectors() -> None:
    norm = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.5
    assert not compare("n.weight", norm, norm.bfloat16().float(), (Format("F32"), BF16))[0].is_suspect
    wrong = norm.clone()
    wrong[40] *= 3
    difference, _ = compare("n.weight", norm, wrong, (BF16, BF16))
    assert difference.is_suspect
    assert "row 40: 3 times" in difference.describe()
    difference, _ = compare("n.weight", norm, norm * 1.02, (BF16, BF16))
    assert difference.is_suspect
    assert "1.02 times" in difference.describe()


def test_nan_is_a_suspect_without_more(weight: torch.Tensor) -> None:
    other = weight.clone()
    other[3, 4] = float("nan")
    difference, _ = compare("x.weight", weight, other, (BF16, BF16))
    assert difference.is_suspect
    assert difference.describe() == "x.weight: NaN or Inf"
    assert compare("x.weight", other, other.clone(), (BF16, BF16))[0].is_suspect


def test_slices_that_are_small_beside_their_scale_are_not_judged() -> None:
    """One scale for a row with one large value rounds most of the others to zero: that is the format, not a defect."""
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(3))
    weight[9, 200] = 100
    form = Format("I4", -1)
    other = round_to(weight, form)
    assert not other[9, :128].any()
    assert not compare("x.weight", weight, other, (BF16, form))[0].is_suspect


def test_slices_that_are_next_to_nothing_are_not_judged() -> None:
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(3))
    weight[9] *= 1e-6
    other = weight.clone()
    other[9] = 0
    assert not compare("x.weight", weight, other, (BF16, BF16))[0].is_suspect


def test_likenesses(weight: torch.Tensor) -> None:
    square, everything = weight[:256], Region(tuple(range(256)), tuple(range(256)), (256, 256))
    assert recognize("a", everything, square, square.T.contiguous(), [], lambda name: square) == "transposed"
    other = torch.randn(256, 256, generator=torch.Generator().manual_seed(9))
    held = {"l.experts.3.up_proj.weight": other, "l.experts.4.up_proj.weight": torch.zeros(256, 256)}
    said = recognize("l.experts.5.up_proj.weight", everything, square, other, [*reversed(held)], held.__getitem__)
    assert said == "holds the values of experts.3.up_proj.weight"
    assert recognize("a", everything, square, other, [], held.__getitem__) == "unlike the reference"


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5]) == "0:3, 5"
    assert ranges(list(range(0, 20, 2)), most=2) == "0, 2 and 8 more"
