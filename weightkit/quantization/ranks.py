"""Several processes that quantize one checkpoint; see ``weightkit.ranks``."""

from weightkit.ranks.ranks import Ranks

__all__ = ["Ranks"]
