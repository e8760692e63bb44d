"""Texts in messages for people: the first few of many names, and the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

_SHOWN = 5
_LONGEST = 300


def some(items: Sequence[str]) -> str:
    """The first five items, separated by commas, and the number of the others: for a message of one line."""
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(
    name: str,
    known: Iterable[str],
    *,
    cutoff: float = 0.6,
    quoted: Callable[[str], object] = '"{}"'.format,
) -> str:
    """``; did you mean "..."?`` with the known name nearest to a misspelt one, or "" if none is near.

    ``cutoff`` is the least similarity of a near name, from 0 to 1; upper and lower case count as the same.
    ``quoted`` turns the name into text for the message.
    """
    folded = {each.casefold(): each for each in known}
    nearest = difflib.get_close_matches(name[:_LONGEST].casefold(), folded, n=1, cutoff=cutoff)
    return f"; did you mean {quoted(folded[nearest[0]])}?" if nearest else ""


def shortened(path: object) -> str:
    """A path as text, cut off if it is longer than any that is in use."""
    text = str(path)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
