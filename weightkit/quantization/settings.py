"""What a user asks of a quantization, checked before anything is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from weightkit.errors import PlanError, WeightkitError, raise_all

BITS = (4, 8)
SCOPES = ("experts", "all")
METHODS = ("gptq", "rtn")
ORDERS = ("act", "none")
SCALES = ("search", "largest")


@dataclass(frozen=True)
class Settings:
    """How weights become integers.

    Attributes:
        bits: 4 or 8.
        group_size: input columns that share a scale; -1 for all of them.
        scope: ``experts`` (routed and shared), or ``all`` linear maps of the layers but routers.
        method: ``gptq``, or ``rtn``: rounding to nearest, without calibration.
        damping: added to a Hessian's diagonal, as a fraction of its mean.
        order: ``act`` rounds the columns with the largest inputs first, ``none`` in their own order. Groups are those
            of the weight in both cases, so the output says ``desc_act: false``.
        scales: ``search`` tries smaller grids than the ``largest`` weight asks for, and keeps the one with least error.
        mtp: keep the MTP layers, in BF16.
    """

    bits: int = 4
    group_size: int = 128
    scope: str = "experts"
    method: str = "gptq"
    damping: float = 0.01
    order: str = "act"
    scales: str = "search"
    mtp: bool = True

    def __post_init__(self) -> None:
        raise_all("these settings cannot be used", list(self._problems()))

    def _problems(self) -> Iterator[WeightkitError]:
        for option, value, legal in (
            ("--bits", self.bits, BITS),
            ("--scope", self.scope, SCOPES),
            ("--method", self.method, METHODS),
            ("--order", self.order, ORDERS),
            ("--scales", self.scales, SCALES),
        ):
            if value not in legal:
                yield PlanError("not a choice", where=option, expected=" or ".join(map(str, legal)), found=value)
        if not (self.group_size == -1 or self.group_size > 0):
            yield PlanError(
                "not a group size", where="--group-size", expected="a positive number, or -1", found=self.group_size
            )
        if not 0 < self.damping < 10:
            yield PlanError("not a damping", where="--damping", expected="over 0, below 10", found=self.damping)

    @property
    def form(self) -> list[str]:
        """Words for a folder's name: ``int4``, and what differs from the defaults."""
        words = [f"int{self.bits}"]
        words += [] if self.group_size == 128 else ["column" if self.group_size == -1 else f"g{self.group_size}"]
        words += [] if self.scope == "experts" else [self.scope]
        words += [] if self.method == "gptq" else [self.method]
        return words + ([] if self.mtp else ["no-mtp"])

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return asdict(self)
