"""The command line: parse, call, show."""

import gc
import os
import signal
import sys
import warnings
from typing import Any

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C, as shells have it."""


def main() -> None:
    """Run the command line, and end the process with its exit code.

    The garbage collector is off: a command makes few cycles but many objects that the collector would visit. With
    it, a merge of 50,000 tensors took 1.7 times the processor time.
    """
    gc.disable()
    if not sys.warnoptions:  # those of libraries are no messages for the user of a command
        warnings.simplefilter("ignore")
    # Modules that are being imported may swallow a KeyboardInterrupt, and nothing has to be cleaned up yet.
    handler = _at_once()
    try:
        from merge_engine.cli.terminal import open_streams

        open_streams()
        from merge_engine.cli.app import call
    except (ImportError, MemoryError) as error:  # damaged, or more than the memory holds
        sys.exit(f"error: merge_engine cannot be loaded: {type(error).__name__} {error}")

    try:
        signal.signal(signal.SIGINT, handler)
        code = call()
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        _at_once()
    if (
        code == 0
    ):  # Python gives up its handlers before it ends, and what is complete must not look interrupted
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # the end of the process frees all objects
    sys.exit(code)


def _at_once() -> Any:
    """Let Ctrl-C end the process at once, unless it is ignored, as for a job in the background.

    Returns what handled it before.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    return before
