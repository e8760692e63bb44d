"""Ctrl-C and SIGTERM while a command merges: it cleans up, and ends with one line and the exit code of shells."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType

import typer

from merge_engine.cli import INTERRUPTED
from merge_engine.cli.terminal import say

TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM. It cleans up as Ctrl-C does."""


class Interruptible:
    """A merge that may be interrupted. ``last`` is the file that it writes last.

    As a context manager it ends the command with exit code 130 after Ctrl-C and 143 after SIGTERM, and with 0 if the
    merge was complete by then. Only for the main thread.
    """

    def __init__(self, last: Path):
        self._last = last
        self._earlier = self._identity()
        self._ended = False
        self._before: signal._HANDLER = signal.SIG_DFL

    def end(self) -> None:
        """The merge is complete, or is being cleaned up: SIGTERM changes nothing any more."""
        self._ended = True

    def __enter__(self) -> Interruptible:
        self._before = signal.getsignal(signal.SIGTERM)
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return  # SIGTERM stays without effect: the process is about to end, and the merge is no failure
        signal.signal(signal.SIGTERM, self._before)
        if not isinstance(error, KeyboardInterrupt):
            return
        if self._identity() != self._earlier:
            raise typer.Exit(0) from None
        said = "terminated" if isinstance(error, Terminated) else "interrupted"
        say("error", [f"{said}; {error}" if str(error) else said])
        raise typer.Exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED) from None

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if not self._ended:
            self.end()
            raise Terminated

    def _identity(self) -> tuple[int, int] | None:
        """Of the last file, if it is there."""
        try:
            found = self._last.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns
