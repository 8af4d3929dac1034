"""The scales of quantized weights, kept from the codes to their own turn in the file."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from weightkit.checkpoint.tensors import BlockQuantized
from weightkit.compute.engines import Started

#: Strips whose scales are kept: more than the largest weight of the family has. Those of a strip are a few KB.
KEPT_STRIPS = 128


class KeptScales:
    """Scales that were found with the codes of a strip, for whoever asks for them later: once. Of one thread.

    Those that nobody asks for give way to others.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[BlockQuantized, Started] = OrderedDict()

    def keep(self, codes: BlockQuantized, scales: Started) -> None:
        """``scales`` were found with ``codes``; they are not in scratch that another call overwrites."""
        self._kept[replace(codes, scales=True)] = scales
        while len(self._kept) > KEPT_STRIPS:
            self._kept.popitem(last=False)

    def take(self, scales: BlockQuantized) -> Started | None:
        """What was kept of them, or None."""
        return self._kept.pop(scales, None)
