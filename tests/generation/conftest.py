from __future__ import annotations

import sys
from pathlib import Path

# the small checkpoint is written by the model's tests
sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
