from __future__ import annotations

import sys
from pathlib import Path

from threads import one_thread  # noqa: F401 - for all tests here

# the small checkpoint is written by the model's tests
sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
