"""The decision how a run reads its inputs: through the page cache or past it."""

from __future__ import annotations

from collections.abc import Collection

from merge_engine.storage.files import File
from merge_engine.storage.machine import available_memory
from merge_engine.storage.mounts import mount_of
from merge_engine.storage.ranges import Way


def way_here(files: Collection[File]) -> Way:
    """The way to read these files on this machine now: see ``choose_way``.

    Files on a RAM disk are in memory already and take no more of it.
    """
    try:
        available = available_memory()
    except OSError:  # the system does not say
        available = 0
    return choose_way([file for file in files if not mount_of(file.path).in_memory], available)


def choose_way(files: Collection[File], available: int, machines: int = 1) -> Way:
    """``cached`` if all inputs take at most half of the ``available`` bytes of memory, else ``direct``.

    Of several ``machines`` each reads its share of them.

    The page cache keeps its files for the next merge of the same models. Larger inputs would push each other out of
    it. Nothing is timed or measured.
    """
    sizes = {file.path.resolve(): file.size for file in files}  # a hub's cache may link to a file twice
    return "cached" if 2 * sum(sizes.values()) <= available * machines else "direct"
