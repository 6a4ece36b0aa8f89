"""The command line: `catmerge up | submit | watch | ...`, on the Python client."""

from service.cli.app import main

__all__ = ["main"]
