"""Files from others that are read whole: regular files only, and never more bytes than a limit."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MAX_CONFIG = 10_000_000
"""Bytes of a config.json, and of the other settings of a model. The largest known ones take 1 MB."""
MAX_INDEX = 100_000_000
MAX_MANIFEST = 1_000_000_000
MAX_RECIPE = 10_000_000
MAX_TOKENIZER = 100_000_000
"""Bytes of a tokenizer. The largest known ones take a third of this."""


def read_bounded(path: Path, limit: int) -> bytes:
    """All bytes of a regular file, which has at most ``limit``.

    Raises ``OSError`` with the reason as its ``strerror``: for a file that cannot be opened, a broken link, a larger
    file, and for anything else than a file (a folder, a FIFO, a device), which is neither waited for nor read.
    """
    try:
        _check(path.stat(), path, limit)  # before it is opened: that alone has an effect on some devices
    except FileNotFoundError:
        if path.is_symlink():
            raise broken_link(path) from None
        raise
    except ValueError as error:  # a NUL, or half a character
        raise OSError(errno.EINVAL, "no file has such a name", str(path)) from error
    # The file may have been replaced: a FIFO must not be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        _check(os.fstat(descriptor), path, limit)
        data = file.read(limit + 1)  # a file may grow, and those in /proc do not tell their size
    if len(data) > limit:
        raise _too_large(path, limit)
    return data


def broken_link(path: Path) -> OSError:
    """The error for a link to a file that does not exist."""
    return OSError(
        errno.ENOLINK, f"a broken link to {path.readlink()}; put the file there or remove the link", str(path)
    )


def _check(found: os.stat_result, path: Path, limit: int) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(
            errno.EINVAL,
            "a pipe, socket or device, not a regular file; copy what it holds into one",
            str(path),
        )
    if found.st_size > limit:
        raise _too_large(path, limit)


def _too_large(path: Path, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"larger than the {limit / 1e6:,.0f} MB that such a file may have", str(path))
