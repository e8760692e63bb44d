"""The command line: parse, call, show."""

import gc
import os
import sys


def main() -> None:
    """Run the command line, and end the process.

    Looking for garbage in what was imported, and taking it apart in the end, took as long as merging 50 million
    parameters.
    """
    gc.disable()
    from merge_engine.cli.app import call

    gc.freeze()
    gc.enable()
    code = call()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody listens, or there is no space for what is said
        code = code or 1
    os._exit(code)
