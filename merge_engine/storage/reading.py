"""How a merge reads its inputs."""

from __future__ import annotations

from collections.abc import Collection

from merge_engine.storage.files import File
from merge_engine.storage.ranges import Way


def choose_way(files: Collection[File], available: int) -> Way:
    """Through the page cache if all files together take at most half of ``available`` bytes of memory, else past it.

    What fits is still there for the next merge of the same files. What does not fit would push out other programs'
    pages, and be pushed out itself before it is read again. Links to one file count once.
    """
    sizes = {file.path.resolve(): file.size for file in files}
    return "cached" if sum(sizes.values()) <= available // 2 else "direct"
