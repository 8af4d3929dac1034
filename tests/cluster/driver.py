"""A process that strips a checkpoint on a cluster, slowly, to be killed from outside.

python driver.py SOURCE TARGET ADDRESS
"""

from __future__ import annotations

import sys

from slow_work import SlowRay

import weightkit.cli.options as options
import weightkit.cluster
from weightkit.cli import main

if __name__ == "__main__":
    source, target, address = sys.argv[1:]
    assert "Conversion" in vars(options)
    weightkit.cluster.RayExecutor = SlowRay  # type: ignore[misc]
    main(["strip", source, target, "--executor", "ray", "--address", address, "--jobs", "2"])
