"""A checkpoint held against the blueprint of its config, before its tensors are cut by what the config says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from weightkit.checkpoint.tensors import LazyTensor
from weightkit.errors import MissingTensorError, TensorError, WeightkitError
from weightkit.family import Expected


def unfit(tensors: Mapping[str, LazyTensor], expected: Mapping[str, Expected]) -> Iterator[WeightkitError]:
    """What is missing, and what has another shape. An absent MTP layer is not missed: many copies have none."""
    for name, item in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            if not item.optional and not item.mtp:
                yield MissingTensorError("the config calls for it, and no file holds it", where=name)
        elif tensor.shape != item.shape and not item.optional:
            yield TensorError(
                "not the shape that the config calls for",
                where=name,
                expected=list(item.shape),
                found=list(tensor.shape),
            )
