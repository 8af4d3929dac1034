"""``python -m weightkit``."""

from weightkit.cli import main

if __name__ == "__main__":
    main()
