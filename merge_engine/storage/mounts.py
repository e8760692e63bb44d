"""The mounted file system of a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_LOCAL = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs")


@dataclass(frozen=True)
class Mount:
    """A mounted file system: the device or server it comes from, where it is mounted, and its kind."""

    source: str
    point: str
    kind: str

    @property
    def local(self) -> bool:
        """Whether it is certainly not on a network, where mapped files would be read one page at a time."""
        return self.kind in _LOCAL

    @property
    def in_memory(self) -> bool:
        """Whether its files are in memory only."""
        return self.kind in ("ramfs", "tmpfs")

    def __str__(self) -> str:
        return f"{self.kind} {self.source} at {self.point}"


def mount_of(path: Path) -> Mount:
    """The file system of ``path``, which need not exist yet."""
    resolved = path.resolve()
    found = Mount("", "/", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, point, kind = (_unescaped(word) for word in line.split(" ")[:3])
        # Of two mounts at the same place the later one counts.
        if resolved.is_relative_to(point) and len(point) >= len(found.point):
            found = Mount(source, point, kind)
    return found


def _unescaped(word: str) -> str:
    """A word of /proc/self/mounts as text: spaces and some other characters are octal numbers there."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)
