"""Work on the nodes of a Ray cluster: a task fills one file, and a worker or node that dies costs that file alone.

    connection.py   to a cluster, and what nodes it has; the only module that imports ray
    news.py         what a task tells the process that started it, while it works
    sight.py        whether a node sees the same files
    crew.py         tasks on nodes: sent, listened to, sent again
    filling.py      what a task does for a file of a plan
    writing.py      the files of a plan
    reading.py      the files of a checkpoint, for verify
    ranks.py        processes that find each other as torchrun's do, for quantize

The process that starts the work keeps what there must be one of: the hold on the target, the journal, the names of
files, the seal. Source and target lie on a filesystem that all nodes share.

Needs ``pip install 'weightkit[ray]'``.
"""

from weightkit.cluster.reading import RayReaders
from weightkit.cluster.writing import RayExecutor

__all__ = ["RayExecutor", "RayReaders"]
