"""Errors that a user can fix are one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from merge_engine import MergeError


class ExampleError(Exception):
    """Something of this example is missing, half done or of another run; the message says what to do."""


def told(main: Callable[[], None]) -> None:
    """Run a program. What its user can mend ends it with one line and exit code 1, without a stack trace."""
    try:
        main()
    except (ExampleError, MergeError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # no space, no permission
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last finished stage")
