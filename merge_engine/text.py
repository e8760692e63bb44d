"""Texts in messages for people: the first few of many names, and the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

_SHOWN = 5


def some(items: Sequence[str], shown: int = _SHOWN) -> str:
    """The first five items, separated by commas, and the number of the others: for a message of one line.

    ``shown`` is another number than five.
    """
    rest = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(
    name: str,
    known: Iterable[str],
    *,
    cutoff: float = 0.6,
    quoted: Callable[[str], object] = '"{}"'.format,
) -> str:
    """``; did you mean "..."?`` with the known name nearest to a misspelt one, or "" if none is near.

    ``cutoff`` is the least similarity of a near name, from 0 to 1. ``quoted`` turns the name into text for the
    message.
    """
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {quoted(nearest[0])}?" if nearest else ""
