"""What the commands print: safe to show whoever chose the names in it, and no reason for a merge to fail."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from merge_engine.text import cut, printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_LONGEST_LINE = 1000
_MOST_LINES = 100

_NARROWEST = 40

console = Console()
"""Writes to stdout. In a terminal that says it is narrower, as some say 0, a table would be cut to nothing."""
console.width = max(console.width, _NARROWEST)


class _Standard(io.RawIOBase):
    """A standard stream that drops what cannot be written, and remembers why in ``loss``."""

    def __init__(self, number: int):
        self.number = number
        self.loss: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        if self.loss is None:
            try:
                return os.write(self.number, data)
            except OSError as error:
                self.loss = error
        return memoryview(data).nbytes

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def fileno(self) -> int:
        return self.number


_standard: dict[str, _Standard] = {}
"""By name, the streams that ``open_streams`` has opened."""


def open_streams() -> None:
    """Make stdout and stderr such that no print fails.

    A closed one is replaced by nothing, which also keeps its number from the files of the merge. What the encoding
    lacks is escaped. What cannot be written is dropped.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        given = getattr(sys, name)
        stream = _standard[name] = _Standard(number)
        encoding = given.encoding if given is not None else "utf-8"
        opened = io.TextIOWrapper(
            io.BufferedWriter(stream),
            encoding,
            "backslashreplace",
            line_buffering=name == "stderr" or stream.isatty(),
        )
        setattr(sys, name, opened)


def result_is_on_disk() -> None:
    """Say that nothing is lost if stdout cannot be written: what the command made is complete in its folder."""
    _standard.pop("stdout", None)


def lost_output() -> OSError | None:
    """Why stdout could not be written, if that matters: not if its reader has read enough."""
    stream = _standard.get("stdout")
    if stream is None:
        return None
    sys.stdout.flush()
    return None if stream.loss is None or stream.loss.errno == errno.EPIPE else stream.loss


def say(kind: str, lines: Iterable[str]) -> None:
    """Print messages to stderr, one line each, after ``kind`` (``error`` or ``warning``).

    A long message is cut in the middle, and of very many the first are printed, with the number of the others.
    """
    messages = list(lines)
    for message in messages[:_MOST_LINES]:
        print(f"{kind}: {safe(message)}", file=sys.stderr)
    if len(messages) > _MOST_LINES:
        print(f"{kind}: and {len(messages) - _MOST_LINES:,} more", file=sys.stderr)


def safe(text: str) -> str:
    """The text on one line of at most 1,000 characters, without any that are not printable."""
    return cut(printable(text), _LONGEST_LINE)


def cell(text: str) -> Text:
    """The text for a table of rich: safe, and never read as markup."""
    return Text(safe(text))
