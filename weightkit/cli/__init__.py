"""The command line: a file a command. It parses, calls the library, prints, and chooses the exit code.

Exit codes: 0 done; 1 an error, said on stderr; 2 a wrong call; 130 stopped by a signal.
"""

from weightkit.cli.app import main

__all__ = ["main"]
