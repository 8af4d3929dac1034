"""The weights of two checkpoints of one model, read in lockstep, and of the sound conversion that lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

from weightkit.checkpoint import Checkpoint
from weightkit.compute.engines import DeviceName
from weightkit.errors import MissingTensorError
from weightkit.model import CheckpointWeights
from weightkit.smoke.difference import TensorDifference, compare
from weightkit.smoke.rounding import Format, explained, format_of, stored_formats

PROBED_ROWS = 1024
"""Inputs whose outputs are compared, of each linear map."""


@dataclass
class _Squares:
    """Sums of squares of outputs: the reference's, the other's difference, the explained difference."""

    reference: float = 0.0
    other: float = 0.0
    explained: float = 0.0
    rows: int = 0


class Pair:
    """Weights of two checkpoints by name. Each is read once, compared, and held until ``release``.

    Args:
        reference, other: opened, of one architecture.
        device, dtype, jobs: see ``CheckpointWeights``.

    Attributes:
        sides: weights for three models: the reference; the other; *sound*, the reference with such differences as the
            formats explain.
        differences: of each tensor that was asked for.
    """

    def __init__(
        self,
        reference: Checkpoint,
        other: Checkpoint,
        *,
        device: DeviceName = "auto",
        dtype: str | None = None,
        jobs: int | None = None,
    ) -> None:
        # nothing is kept, on the device or beside it: each weight is needed once
        self._sources = tuple(
            CheckpointWeights(checkpoint, device=device, dtype=dtype, memory_bytes=0, host_bytes=0, jobs=jobs)
            for checkpoint in (reference, other)
        )
        self._formats = tuple(stored_formats(checkpoint) for checkpoint in (reference, other))
        self._held: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._squares: dict[str, _Squares] = {}
        self.differences: dict[str, TensorDifference] = {}
        self.sides = tuple(Side(self, index) for index in range(3))

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for source in self._sources:
            source.close()

    @property
    def reference(self) -> CheckpointWeights:
        """The reference's weights alone."""
        return self._sources[0]

    @property
    def other(self) -> CheckpointWeights:
        """The other's weights alone."""
        return self._sources[1]

    @property
    def names(self) -> list[str]:
        """The weights that both have, in the reference's order."""
        return [name for name in self._formats[0] if name in self._formats[1]]

    def formats(self, name: str) -> tuple[Format, Format]:
        """In which a weight is stored."""
        return format_of(self._formats[0], name), format_of(self._formats[1], name)

    def get(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A weight of the three sides. Raises as ``CheckpointWeights.get``, and where the shapes differ."""
        if name not in self._held:
            one, other = (source.get(name) for source in self._sources)
            if one.shape != other.shape:
                shapes = f"{tuple(one.shape)} and {tuple(other.shape)}"
                raise MissingTensorError("not of one shape in both checkpoints", where=name, found=shapes)
            self.differences[name], sound = compare(name, one, other, self.formats(name))
            self._held[name] = (one, other, sound)
        return self._held[name]

    def release(self) -> None:
        """Let go of all weights that are held."""
        self._held.clear()

    def prefetch(self, names: Sequence[str]) -> None:
        """See ``Weights.prefetch``; for both."""
        for source in self._sources:
            source.prefetch([name for name in names if name not in self._held])

    def rows(self, name: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of a matrix, of the three sides."""
        one, other = (source.rows(name, ids) for source in self._sources)
        if torch.equal(one, other):
            return one, other, one
        error = explained(one.flatten(0, -2).float(), other.flatten(0, -2).float(), self.formats(name))
        return one, other, (one.float() + error.view(one.shape)).to(one.dtype)

    def probe(self, name: str, inputs: torch.Tensor) -> None:
        """Observer of the reference's model: what each linear map makes of the reference's inputs on either side."""
        one, other, sound = self.get(name)
        squares = self._squares.setdefault(name, _Squares())
        rows = inputs.reshape(-1, inputs.shape[-1])[: max(0, PROBED_ROWS - squares.rows)]
        squares.rows += len(rows)
        if not len(rows) or one is sound:
            return
        squares.reference += float(linear(rows, one).double().square().sum())
        squares.other += float(linear(rows, other - one).double().square().sum())
        squares.explained += float(linear(rows, sound - one).double().square().sum())

    def measured(self) -> list[TensorDifference]:
        """The differences of all tensors that were asked for, with those of their outputs."""
        return [self._with_outputs(difference) for difference in self.differences.values()]

    def _with_outputs(self, difference: TensorDifference) -> TensorDifference:
        squares = self._squares.get(difference.name)
        if squares is None or not squares.reference > 0:
            return difference
        output, sound = ((part / squares.reference) ** 0.5 for part in (squares.other, squares.explained))
        return replace(difference, output=output, output_explained=sound)


class Side:
    """One of a pair's three sides, as ``Weights``."""

    def __init__(self, pair: Pair, index: int) -> None:
        self._pair = pair
        self._index = index

    def get(self, name: str) -> torch.Tensor:
        """See ``Weights.get``."""
        return self._pair.get(name)[self._index]

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """See ``Weights.rows``."""
        return self._pair.rows(name, ids)[self._index]

    def prefetch(self, names: Sequence[str]) -> None:
        """Nothing: the pair's owner knows what all sides need next."""
