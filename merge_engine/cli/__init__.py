"""The command line: parse, call, show."""

from merge_engine.cli.app import main

__all__ = ["main"]
