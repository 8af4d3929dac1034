"""Weights that share an input, to integers: the settings applied to the kernels, and the errors measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weightkit.errors import QuantizationError
from weightkit.kernels import gptq_solve as kernels
from weightkit.quantization.clock import Clock
from weightkit.quantization.settings import Settings

#: Of a matrix's tokens so many, evenly spread, tell its output error.
SAMPLED_TOKENS = 2048
#: What to do where something is not finite.
FIND = "Check the source: weightkit verify --values lists weights that are not finite."


@dataclass(frozen=True)
class Fate:
    """How a weight fared.

    Attributes:
        errors: [2] F32 on the device: relative output error of the result, and of rounding to nearest; of the weights
            themselves where there were no inputs.
        damping: fraction of the mean diagonal that was added in the end; None where it was rounded to nearest.
        retries: factorizations that failed before.
        note: why it is not as asked for.
    """

    errors: torch.Tensor
    damping: float | None
    retries: int
    note: str | None


@dataclass(frozen=True)
class Solved:
    """One weight [N, K] as integers: ``codes`` [K, N] U8, transposed, ``scales`` [groups, N] F32, as F16 holds them."""

    codes: torch.Tensor
    scales: torch.Tensor
    fate: Fate


class Hessian:
    """The sum of x x^T over inputs, and some of the inputs themselves.

    Args:
        width: of an input.
        tokens: how many inputs there will be, over all ranks.

    Attributes:
        total: [K, K] F32, of which the lower triangle counts.
    """

    def __init__(self, width: int, tokens: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.tokens = tokens
        self._seen = 0
        self._stride = max(1, tokens // SAMPLED_TOKENS)
        self._samples: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        """Add inputs [n, K]."""
        if len(rows):
            kernels.add_gram(self.total, rows)
            self._samples.append(rows[-self._seen % self._stride :: self._stride].clone())
            self._seen += len(rows)

    def sample(self) -> torch.Tensor:
        """About ``SAMPLED_TOKENS`` of the inputs, evenly spread over those of this rank."""
        return torch.cat(self._samples) if self._samples else self.total.new_empty(0, len(self.total))


class Solver:
    """Quantizes weights of one input at a time."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.settings = settings
        self._clock = clock

    def group_size(self, columns: int) -> int:
        """The group size, with -1 resolved."""
        return columns if self.settings.group_size == -1 else self.settings.group_size

    def solve(self, names: Sequence[str], weights: Sequence[torch.Tensor], hessian: Hessian | None) -> list[Solved]:
        """The weights [N, K] F32, which all have the input that ``hessian`` is of, as integers.

        Without inputs they are rounded to nearest, and errors are those of the weights.

        Raises:
            QuantizationError: inputs or weights that are not finite, or a Hessian that no damping makes positive.
        """
        widths = [len(weight) for weight in weights]
        stacked = torch.cat([weight.T for weight in weights], dim=1)
        grid = {"group_size": self.group_size(len(stacked)), "bits": self.settings.bits}
        if hessian is not None and not hessian.tokens:
            hessian = None
        factor = None if hessian is None else self._factor(names[0], hessian)  # first: it says if inputs are not finite
        with self._clock.stage("scales"):
            scales = self._scales(stacked, hessian, grid)
            rounded = kernels.round_to_nearest(stacked, scales, **grid)
            require_finite(names, weights, scales, widths)
        codes, note = rounded, None
        if factor is not None:
            with self._clock.stage("solve"):
                codes = kernels.solve(stacked, scales, factor, **grid)
        elif self.settings.method != "rtn":
            note = "no calibration token reached it"
        with self._clock.stage("errors"):
            errors = self._errors(stacked, scales, codes, rounded, hessian, widths)
        damping, retries = (None, 0) if factor is None else (factor.damping, factor.retries)
        parts = zip(codes.split(widths, 1), scales.split(widths, 1), errors, strict=True)
        return [Solved(code, scale, Fate(error, damping, retries, note)) for code, scale, error in parts]

    def _scales(self, stacked: torch.Tensor, hessian: Hessian | None, grid: dict[str, int]) -> torch.Tensor:
        if self.settings.scales == "largest":
            return kernels.largest_scales(stacked, **grid)
        importance = stacked.new_ones(len(stacked)) if hessian is None else hessian.total.diagonal().contiguous()
        return kernels.search_scales(stacked, importance, **grid)

    def _factor(self, name: str, hessian: Hessian) -> kernels.Factor:
        with self._clock.stage("factor"):
            try:
                return kernels.factorize(
                    hessian.total, act_order=self.settings.order == "act", damping=self.settings.damping
                )
            except FloatingPointError as exc:
                raise QuantizationError(str(exc), where=name, fix=FIND) from exc
            except ArithmeticError as exc:
                raise QuantizationError(str(exc), where=name, fix="Use a larger --damping.") from exc

    def _errors(
        self,
        stacked: torch.Tensor,
        scales: torch.Tensor,
        codes: torch.Tensor,
        rounded: torch.Tensor,
        hessian: Hessian | None,
        widths: Sequence[int],
    ) -> list[torch.Tensor]:
        """Relative errors of result and rounding by weight."""
        sample = None if hessian is None else hessian.sample()
        grid = {"group_size": self.group_size(len(stacked)), "bits": self.settings.bits}

        def lengths(matrix: torch.Tensor) -> torch.Tensor:
            outputs = matrix if sample is None else sample @ matrix.to(sample.dtype)
            return torch.stack([part.float().norm() for part in outputs.split(list(widths), 1)])

        size = lengths(stacked)
        found = [lengths(stacked - kernels.values(those, scales, **grid)) / size for those in (codes, rounded)]
        return list(torch.stack(found, dim=1))


def require_finite(
    names: Sequence[str], weights: Sequence[torch.Tensor], scales: torch.Tensor, widths: Sequence[int]
) -> None:
    """Raise ``QuantizationError`` for weights that hold NaN or Inf, or more than ``scales`` [groups, N], F16, reach."""
    sums = torch.stack([weight.sum() for weight in weights])  # NaN and Inf stay in a sum, whatever else is in it
    sizes = torch.stack([part.amax() for part in scales.split(list(widths), 1)])
    finite = torch.isfinite(sums) & torch.isfinite(sizes)
    if bool(finite.all()):
        return
    raise QuantizationError(
        "weights that are not finite, or too large for scales in F16",
        where=", ".join(name for name, good in zip(names, finite.tolist(), strict=True) if not good),
        fix=FIND,
    )
