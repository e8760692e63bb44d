"""Texts in messages for people: safe to print, the first few of many names, the nearest known name."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Callable, Iterable, Sequence

_SHOWN = 5
_LONGEST = 300
_LONGEST_VALUE = 80


def printable(text: str) -> str:
    r"""The text with each character that is not printable as an escape of Python: ``\x1b``, ``\u202e``.

    Escaped are control and format characters (which move the cursor, reverse the text or hide), all line ends and
    separators but the space, lone surrogates, and code points without a character. All other characters stay, a
    backslash too, so that escaping twice changes nothing more.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def cut(text: str, longest: int) -> str:
    """The text if it has at most ``longest`` characters, else its begin and end with the number of those left out.

    ``longest`` is at least 100.
    """
    if len(text) <= longest:
        return text
    half = longest // 2 - 25  # leaves room for the number
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def without_common_folder(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them begin with. The rest of each is not empty."""
    parts = [path.split("/") for path in paths]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def some(items: Sequence[str], shown: int = _SHOWN) -> str:
    """The first five items, separated by commas, and the number of the others: for a message of one line.

    ``shown`` is another number than five.
    """
    rest = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {rest} more" if rest > 0 else "")


def counted(count: int, what: str) -> str:
    """A number of things: ``1 layer``, ``2,000 layers``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def size_text(nbytes: int) -> str:
    """A number of bytes in MB, or in GB from one on."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:,.1f} MB"


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


def shown(value: object) -> str:
    """A value of a JSON or YAML file for a message: short, on one line, as such a file has it."""
    if isinstance(value, str):
        return json.dumps(_clipped(value), ensure_ascii=not value.isprintable())
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _clipped(_SHORT.repr(value))


class _Short(reprlib.Repr):
    """Texts of nested values. Aliases can nest a short recipe so deeply that even the first few values are many."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2

    def repr_str(self, x: str, level: int) -> str:
        return shown(x)

    def repr_bool(self, x: bool, level: int) -> str:
        return shown(x)

    def repr_NoneType(self, x: None, level: int) -> str:
        return shown(x)

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # too many digits for Python to write
            return _clipped(hex(x))


_SHORT = _Short()


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."
