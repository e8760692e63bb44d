"""Open files."""

from __future__ import annotations

import contextlib
import resource


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may.

    Every shard of every input and of the output is open at once, and common soft limits (1024, 256) are
    meant for programs that use ``select``; the hard limit is what the administrator allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # systems where "unlimited" cannot be asked for
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
