"""The measured limits of this machine, kept in the user's cache.

A measurement writes hundreds of megabytes. So only ``merge-engine doctor --measure`` and ``merge-engine bench``
measure: a plan writes nothing, and a run would become slower.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from merge_engine.errors import OptionError
from merge_engine.storage import mount_of, read_bounded
from merge_engine.storage.machine import cores, processor

ReadingWay = Literal["read", "direct", "cached"]
"""From storage through the page cache, from storage past it, from the page cache: see ``DiskLimits``."""

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Bytes per second."""


@dataclass(frozen=True)
class DiskLimits:
    """Rates of one file system: ``read`` from storage through the page cache, ``direct`` from storage past it,
    ``cached`` from the page cache, and ``write`` until the bytes are on the disk.
    """

    read: Rate
    direct: Rate
    cached: Rate
    write: Rate


@dataclass
class Limits:
    """Bytes per second of this machine; None or absent if not measured.

    ``memory`` counts the bytes that all cores together read and write, ``link`` is from the host to a CUDA device,
    ``disks`` has an entry for each file system.
    """

    memory: Rate | None = None
    link: Rate | None = None
    disks: dict[str, DiskLimits] = field(default_factory=dict)

    def disk(self, path: Path) -> DiskLimits | None:
        """The limits of the file system of ``path``, which need not exist yet; None if not measured."""
        return self.disks.get(str(mount_of(path)))

    def reading(self, nbytes: Mapping[Path, int], way: ReadingWay) -> float | None:
        """Bytes per second when ``nbytes`` are read of each path in one way; None if a limit is not measured.

        Different file systems are read at the same time.
        """
        by_disk: dict[DiskLimits, int] = {}
        for path, count in nbytes.items():
            disk = self.disk(path)
            if disk is None:
                return None
            by_disk[disk] = by_disk.get(disk, 0) + count
        slowest = max((n / getattr(disk, way) for disk, n in by_disk.items()), default=0.0)
        return sum(by_disk.values()) / slowest if slowest else None


_FILE = TypeAdapter(dict[str, Limits])  # by machine: a home folder may be shared by many
_MAX_BYTES = 1_000_000


def user_cache() -> Path:
    """The folder of merge_engine below ``$XDG_CACHE_HOME``, by default ``~/.cache``.

    Raises ``OptionError`` where neither is known: a user of a container may have no account.
    """
    try:
        above = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise OptionError(
            "HOME: not set, and this user has no account; set XDG_CACHE_HOME to a folder for measurements"
        ) from None
    return above / "merge_engine"


def limits_file() -> Path:
    """The file of the limits. Raises ``OptionError`` as ``user_cache`` does."""
    return user_cache() / "limits.json"


def load_limits() -> Limits:
    """The limits of this machine. Empty if nothing was measured, or if the file cannot be read or is malformed."""
    return _load_all().get(_machine(), Limits())


def save_limits(limits: Limits) -> None:
    """Keep the limits of this machine. Raises ``OSError`` or ``OptionError`` when the cache cannot be written."""
    machines = {**_load_all(), _machine(): limits}
    file = limits_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        part.write_bytes(_FILE.dump_json(machines, indent=1))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _load_all() -> dict[str, Limits]:
    try:
        return _FILE.validate_json(read_bounded(limits_file(), _MAX_BYTES))
    except (OSError, OptionError, ValidationError):
        return {}


def _machine() -> str:
    return f"{platform.node()}, {processor()}, {cores()} cores"
