"""The layouts a checkpoint can have on disk: how each is opened, and how a checkpoint is laid out in it.

    published.py   the hubs' layout: an index and shards, or one file
    ranks.py       one file a model-parallel or expert-parallel rank, under the inference demo's names

Whatever the layout, an opened checkpoint answers to the published names. A further layout is a file here with an
``open_`` and a ``lay_out_`` function, and a line in ``open_checkpoint``.
"""

from weightkit.layouts.fileset import FileSet
from weightkit.layouts.opening import open_checkpoint
from weightkit.layouts.published import lay_out_published
from weightkit.layouts.ranks import lay_out_expert_ranks, lay_out_ranks, rank_share

__all__ = ["FileSet", "lay_out_expert_ranks", "lay_out_published", "lay_out_ranks", "open_checkpoint", "rank_share"]
