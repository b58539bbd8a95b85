"""The ``foldscan`` command."""

from foldscan.cli.main import main

__all__ = ["main"]
