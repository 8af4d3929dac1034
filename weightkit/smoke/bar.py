"""Progress of a smoke test: by layer and prompt."""

from __future__ import annotations

import sys

from tqdm.auto import tqdm

from weightkit.progress import LINE_EVERY_S


def steps_bar(total: int, desc: str, *, shown: bool) -> tqdm[None]:
    """A bar of ``total`` steps; where the output is no terminal, it is told seldom."""
    seldom = {} if sys.stderr.isatty() else {"mininterval": LINE_EVERY_S, "delay": LINE_EVERY_S}
    return tqdm(total=total, desc=desc, unit="step", disable=not shown, leave=False, **seldom)
