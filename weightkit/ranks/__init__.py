"""Several processes that work as one: who each is, what they tell each other, and how all stop when one fails.

    world.py      what torchrun tells a process: its rank, among how many, on which machine
    ranks.py      what ranks send each other
    failures.py   the first failure anywhere stops all of them, and is told once
    launch.py     ranks on this machine, started without torchrun

``torchrun`` starts the processes, on one machine or on several; ``launch`` does the same on one.
"""

from weightkit.ranks.launch import launch, start
from weightkit.ranks.world import World

__all__ = ["World", "launch", "start"]
