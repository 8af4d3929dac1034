"""Where the forward pass gets its weights: anything that answers to the published names.

The model never holds a weight longer than one use. Whoever implements ``Weights`` decides what stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch.nn.functional import linear

from weightkit.errors import MissingTensorError

Observer = Callable[[str, torch.Tensor], None]
"""Called with a linear map's published weight name and its input [..., in], before each product."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""Takes ``x`` [..., in], gives its product with the transpose of a weight [out, in]: [..., out], in ``x``'s dtype."""


class Weights(Protocol):
    """A source of weights by their published names, such as ``model.layers.3.mlp.experts.5.gate_proj.weight``.

    A source may also have the method of ``Multiplies``, which ``project`` then uses, and those of ``Groups`` and
    ``Holds``.
    """

    def get(self, name: str) -> torch.Tensor:
        """The whole weight, dequantized, in its compute dtype (routers' in F32, if so stored) on the model's device.

        Raises:
            MissingTensorError: there is no such tensor.
        """
        ...

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` [...] (integers, any device) of the matrix ``name`` [n, width]: [..., width], as by ``get``.

        Apart from ``get`` because a prompt needs few rows of an embedding of 1.9 GB.
        """
        ...

    def prefetch(self, names: Sequence[str]) -> None:
        """A hint: these will be asked for next, in this order."""
        ...


class Multiplies(Protocol):
    """A source of weights that multiplies with them itself, as one may that holds them packed."""

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in] times the transpose of the weight ``name`` [out, in]: [..., out], in ``x``'s dtype."""
        ...


class Groups(Multiplies, Protocol):
    """A source that multiplies with several weights at once: less work for the host, and the device is filled."""

    def takes_groups(self, names: Sequence[str]) -> bool:
        """Whether ``grouped`` is a better way to multiply with these than one after the other. It follows from the
        weights and the device, not from what is in memory."""
        ...

    def grouped(
        self, names: Sequence[str], x: torch.Tensor, counts: Sequence[int], starts: Sequence[int]
    ) -> torch.Tensor:
        """Products of weights [out, in] of one shape, each with ``counts`` rows of ``x`` [rows, in] from ``starts`` on.

        Returns:
            [sum(counts), out] in ``x``'s dtype, one after the other in the order of ``names``.
        """
        ...


class Holds(Multiplies, Protocol):
    """A source that lends what it multiplies with, for several products with one weight, read once."""

    def held_product(self, name: str) -> Product | None:
        """The same product as ``linear``, of a weight that its source multiplies with as it is stored.

        It holds the weight as long as it lives. None for any other weight: hold what ``get`` returns. Which of the two
        follows from the weight and the device, not from what is in memory.
        """
        ...


def as_groups(weights: Weights) -> Groups | None:
    """The source, if it is one of ``Groups``."""
    return cast(Groups, weights) if hasattr(weights, "grouped") else None


class TensorWeights:
    """Weights that already lie in memory under their published names."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def get(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise MissingTensorError("no such weight in memory", where=name) from None

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        weight = self.get(name)
        return weight[ids.to(weight.device)]

    def prefetch(self, names: Sequence[str]) -> None:
        """Nothing to do."""


class Held:
    """Some of a source's weights, each asked for once and held as long as this object lives.

    For a module that goes over many tokens in parts: a source that keeps nothing would read a weight for every part.
    Products are those of the source all the same: a weight that it multiplies with as it is stored is held so.
    """

    def __init__(self, weights: Weights, names: Sequence[str]) -> None:
        self._weights = weights
        self._names = frozenset(names)
        self._held: dict[str, torch.Tensor] = {}
        self._products: dict[str, Product | None] = {}

    def get(self, name: str) -> torch.Tensor:
        """The weight, held if it is one of ``names``. See ``Weights.get``."""
        if name not in self._names:
            return self._weights.get(name)
        if name not in self._held:
            self._held[name] = self._weights.get(name)
        return self._held[name]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The product, with the held weight if ``name`` is one of ``names``. See ``Multiplies.linear``."""
        if name not in self._names:
            return _multiply(self._weights, name, x)
        product = self.held_product(name)
        return linear(x, self.get(name)) if product is None else product(x)

    def held_product(self, name: str) -> Product | None:
        """That of the source, held if ``name`` is one of ``names``. See ``Holds.held_product``."""
        if name not in self._names:
            return _held_product(self._weights, name)
        if name not in self._products:
            self._products[name] = _held_product(self._weights, name)
        return self._products[name]

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """See ``Weights.rows``."""
        return self._weights.rows(name, ids)

    def prefetch(self, names: Sequence[str]) -> None:
        """See ``Weights.prefetch``."""
        self._weights.prefetch(names)


def project(weights: Weights, name: str, x: torch.Tensor, observe: Observer | None = None) -> torch.Tensor:
    """``x`` [..., in] times the transpose of the weight ``name`` [out, in]: [..., out], in ``x``'s dtype."""
    if observe is not None:
        observe(name, x)
    return _multiply(weights, name, x)


def _multiply(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """By the source itself where it is one of ``Multiplies``."""
    own: Callable[[str, torch.Tensor], torch.Tensor] | None = getattr(weights, "linear", None)
    return linear(x, weights.get(name)) if own is None else own(name, x)


def _held_product(weights: Weights, name: str) -> Product | None:
    """That of a source that is one of ``Holds``."""
    return cast(Holds, weights).held_product(name) if hasattr(weights, "held_product") else None
