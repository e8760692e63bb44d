"""Having runs read in one of the ways that there are, by what they are told of the machine."""

from __future__ import annotations

import pytest

from merge_engine.engine import reading
from merge_engine.storage.mounts import Mount

WAYS = ("mapped", "copied", "direct")


def read_only(patch: pytest.MonkeyPatch, way: str) -> None:
    """Much memory, or none; files of this machine, or of a network."""
    patch.setattr(reading, "available_memory", lambda: 0 if way == "direct" else 1 << 40)
    patch.setattr(Mount, "local", way == "mapped")
