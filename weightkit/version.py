"""Which weightkit this is: apart from the package, so that what the package imports can say it."""

__version__ = "0.1.0"
