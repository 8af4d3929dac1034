"""A checkpoint held against the blueprint of its config, before it is made into another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.tensors import LazyTensor
from weightkit.errors import MissingTensorError, TensorError, WeightkitError, raise_all
from weightkit.family import Architecture, Expected, blueprint

_WHOLE = "Fetch index, files and config.json again, all from one repository; `weightkit verify` says more."


def require_fit(checkpoint: Checkpoint, arch: Architecture, what: str) -> None:
    """Raise all that is missing or of another shape than the config calls for; ``what`` it stands in the way of."""
    problems = list(unfit(checkpoint.tensors, blueprint(arch)))
    raise_all(what, problems, where=checkpoint.root, fix=f"weightkit verify {checkpoint.root} lists all that is wrong.")


def unfit(tensors: Mapping[str, LazyTensor], expected: Mapping[str, Expected]) -> Iterator[WeightkitError]:
    """What is missing, and what has another shape. An absent MTP layer is not missed: many copies have none."""
    for name, item in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            if not item.optional and not item.mtp:
                yield MissingTensorError("the config calls for it, and no file holds it", where=name, fix=_WHOLE)
        elif tensor.shape != item.shape and not item.optional:
            yield TensorError(
                "not the shape that the config calls for",
                where=name,
                expected=list(item.shape),
                found=list(tensor.shape),
                fix=_WHOLE,
            )
