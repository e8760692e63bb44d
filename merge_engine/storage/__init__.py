"""Bytes: files opened once, read past the page cache or through it; mounts; processors and memory of this machine."""

from merge_engine.storage.bounded import read_bounded
from merge_engine.storage.files import File, OpenFiles
from merge_engine.storage.machine import available_memory, cores, link_rate, processor
from merge_engine.storage.memory import PAGE, aligned, allocate, as_bytes, give_back
from merge_engine.storage.mounts import Mount, mount_of
from merge_engine.storage.page_cache import cached_share, is_cached
from merge_engine.storage.ranges import ByteRange, Extent, RowRuns, Way, open_range, read_rows
from merge_engine.storage.reading import choose_way, way_here

__all__ = [
    "PAGE",
    "ByteRange",
    "Extent",
    "File",
    "Mount",
    "OpenFiles",
    "RowRuns",
    "Way",
    "aligned",
    "allocate",
    "as_bytes",
    "available_memory",
    "cached_share",
    "choose_way",
    "cores",
    "give_back",
    "is_cached",
    "link_rate",
    "mount_of",
    "open_range",
    "processor",
    "read_bounded",
    "read_rows",
    "way_here",
]
