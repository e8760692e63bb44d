"""Arguments of public functions that have the wrong type: an error for the caller instead of one from deep inside."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path

from merge_engine.errors import OptionError

_MOST_THREADS = 1024
"""More than most machines have processors. The system refuses very many, but only after others have started."""


def path_of(name: str, value: object) -> Path:
    """The argument ``name`` as a path. Raises ``OptionError`` for what no file system takes."""
    if not isinstance(value, str | os.PathLike):
        raise OptionError(f"{name}: must be a path, not {reprlib.repr(value)}")
    path = os.fspath(value)
    if not isinstance(path, str) or "\0" in path or not path or not _is_file_name(path):
        raise OptionError(f"{name}: must be a path, not {reprlib.repr(path)}")
    return Path(path)


def _is_file_name(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # half a character
        return False
    return True


def switch_of(name: str, value: object) -> bool:
    """The argument ``name`` as True or False. Raises ``OptionError`` for all else, which may mean either."""
    if not isinstance(value, bool):
        raise OptionError(f"{name}: must be True or False, not {reprlib.repr(value)}")
    return value


def threads_of(value: object) -> int | None:
    """A number of threads, None for the default. Raises ``OptionError`` for no whole number from 1 to 1,024."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_THREADS:
        raise OptionError(
            f"threads: must be a whole number from 1 to {_MOST_THREADS:,}, not {reprlib.repr(value)}"
        )
    return value
