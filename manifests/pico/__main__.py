"""``python -m weightkit.manifests.pico``: trains pico.

Not in ``train`` itself: processes that only write questions would import the module they were started from, and torch
with it.
"""

from __future__ import annotations

if __name__ == "__main__":
    from weightkit.manifests.pico.train import main

    main()
