"""A process that strips a checkpoint on a cluster, slowly, to be killed from outside.

python driver.py SOURCE TARGET ADDRESS
"""

from __future__ import annotations

import sys

from slow_work import SlowRay

import weightkit.cli.options as options
import weightkit.cluster
import weightkit.cluster.crew as crew
from weightkit.cli import main

if __name__ == "__main__":
    source, target, address = sys.argv[1:]
    assert "Conversion" in vars(options)
    weightkit.cluster.RayExecutor = SlowRay  # type: ignore[misc]
    crew.STOP_S = 3600.0  # tasks that do not stop when they are told to are waited for, so that it shows
    main(["strip", source, target, "--executor", "ray", "--address", address, "--jobs", "2"])
