"""The command line: parse, call, show."""

import gc
import io
import os
import sys


def main() -> None:
    """Run the command line, and end the process.

    Looking for garbage in what was imported, and taking it apart in the end, took as long as merging 50 million
    parameters.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold letters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    gc.disable()
    from merge_engine.cli.app import call

    gc.freeze()
    gc.enable()
    code = call()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # none is there when it was closed before the start
                stream.flush()
    except OSError:  # nobody listens, or there is no space for what is said
        code = code or 1
    os._exit(code)
