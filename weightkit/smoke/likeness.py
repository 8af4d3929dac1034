"""What values that are in the wrong place look like: another tensor's, a transposed slice, rows of another rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from weightkit.smoke.difference import Region, ranges

ALIKE = 0.8
"""Cosine from which two tensors hold the same values; of unrelated ones it is near 0."""

_TRIED = 16


def recognize(
    name: str,
    region: Region,
    one: torch.Tensor,
    other: torch.Tensor,
    siblings: Sequence[str],
    get: Callable[[str], torch.Tensor],
) -> str:
    """What ``other`` holds in ``region``, in words; empty where it is like nothing.

    Args:
        name: of the tensor.
        region: where it is unlike ``one``.
        one, other: the two matrices [out, in].
        siblings: names of other tensors that may have been taken for it.
        get: gives a sibling, of the reference.
    """
    if other.dim() != 2:
        return ""
    rows, columns = (torch.tensor(numbers, device=one.device) for numbers in (region.rows, region.columns))

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows][:, columns].float()

    there = cut(other)
    if cosine(there, cut(one.T.reshape(one.shape))) > ALIKE:
        return "transposed"
    if len(rows) == len(columns) and cosine(there, cut(one).T) > ALIKE:
        return "transposed there"
    for what, dim, numbers in (("row", 0, region.rows), ("column", 1, region.columns)):
        moved = _moved(one, other, dim, numbers)
        if moved:
            return f"{what}s in another order: {moved}"
    for sibling in siblings:
        candidate = get(sibling)
        if candidate.shape == one.shape and cosine(there, cut(candidate)) > ALIKE:
            return f"holds the values of {_shorter(sibling, name)}"
    return "unlike the reference"


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the angle between two tensors taken as vectors; 0 where one of them is all zeros."""
    lengths = float(one.norm() * other.norm())
    return float((one * other).sum()) / lengths if lengths > 0 else 0.0


def _moved(one: torch.Tensor, other: torch.Tensor, dim: int, numbers: Sequence[int]) -> str:
    """Where rows (``dim`` 0) or columns of ``other`` are those of ``one`` at other places: the first and its origin."""
    tried = numbers[:: max(1, len(numbers) // _TRIED)][:_TRIED]
    known = torch.nn.functional.normalize(one.float() if dim == 0 else one.float().T, dim=1)
    asked = torch.nn.functional.normalize((other if dim == 0 else other.T)[list(tried)].float(), dim=1)
    best = (asked @ known.T).max(dim=1)
    found = [(n, int(m)) for n, m, c in zip(tried, best.indices, best.values, strict=True) if float(c) > ALIKE]
    if len(found) < max(1, len(tried) // 2) or all(n == m for n, m in found):
        return ""
    number, origin = next((n, m) for n, m in found if n != m)
    return f"{ranges([number])} is the reference's {origin}"


def _shorter(name: str, beside: str) -> str:
    """``name`` without the components that it begins with in common with ``beside``."""
    parts, others = name.split("."), beside.split(".")
    same = next((i for i, (a, b) in enumerate(zip(parts, others, strict=False)) if a != b), 0)
    return ".".join(parts[max(0, same - 1) :])
