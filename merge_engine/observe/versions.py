"""Versions of the software that merged."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Versions of this package and of Python, and the platform, by name."""
    try:
        package = version("merge_engine")
    except PackageNotFoundError:  # run from a source tree that is not installed
        package = "unknown"
    return {"merge_engine": package, "python": platform.python_version(), "platform": platform.platform()}
