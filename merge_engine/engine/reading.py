"""In which way a run reads each of its files: copied out of the page cache, past it, or in place.

What the page cache holds need not be copied: a backend that can reads it in place, where the kernel maps it faster
than it copies it. Through the page cache, what comes from storage is there for the next run. Past it, a fast
disk may be read faster, and without the processor. So a run reads past it only what the page cache does not hold and
what is asked for once, and only where that was measured to be faster: by more, if the page cache would keep it. Where
the page cache has to ask a host for its memory, which takes the processor too, it may even be slower by a quarter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from merge_engine.backends import Backend
from merge_engine.checkpoint import Checkpoint, Way
from merge_engine.engine.limits import Limits
from merge_engine.engine.plan import Plan
from merge_engine.engine.tasks import TensorJob
from merge_engine.storage.machine import gives_memory_back
from merge_engine.storage.mounts import mount_of
from merge_engine.storage.page_cache import cached_share, maps_faster

# How many times as fast it must be to read past the page cache.
_IF_NOT_KEPT = 1.1  # less is within what two measurements differ by
_IF_KEPT = 1.25  # two merges, of which only the first reads the disk, are then over no later
_IF_MEMORY_IS_DEAR = 0.75

_COLD = 0.5  # of a file that is not in the page cache
_MISSING = 0.01  # of a file, from which on it is worth asking for all of it, and not when it is used

_LARGE = 1 << 20  # bytes of a tensor that is worth a request of its own to the disk


class Ways(NamedTuple):
    """How a file is read: large tensors that are asked for once, and everything else."""

    once: Way
    otherwise: Way


@dataclass(frozen=True)
class Reading:
    """How the inputs of a plan are read, by file, and how many of their bytes are not in the page cache now.

    ``not_cached`` is None where the system does not say.
    """

    ways: Mapping[Path, Ways]
    not_cached: int | None

    def way(self, plan: Plan, job: TensorJob, checkpoint: Checkpoint, name: str) -> Way:
        """How a tensor of the plan is read."""
        ways = self.ways.get(checkpoint.file_of(name))
        if ways is None:
            return "read"
        if ways.once == ways.otherwise or checkpoint.tensors[name].nbytes < _LARGE or plan.passes(job) > 1:
            return ways.otherwise
        return ways.once

    def bytes_by_way(self, plan: Plan) -> Counter[Way]:
        """Bytes that all passes together read in each way."""
        counts: Counter[Way] = Counter()
        for job in plan.jobs:
            passes = plan.passes(job)
            for checkpoint, name in plan.inputs(job):
                counts[self.way(plan, job, checkpoint, name)] += passes * checkpoint.tensors[name].nbytes
        return counts


def choose_reading(plan: Plan, limits: Limits, backend: Backend) -> Reading:
    """Decide, from what is in the page cache now and from what this machine was measured to do.

    The plan is told when everything is read in place, and will still be there when it is asked for once more.
    """
    inputs = plan.bytes_by_input()
    files = {file: file.resolve() for c in inputs for file in {c.file_of(name) for name in c.tensors}}
    try:
        sizes = {file: file.stat().st_size for file in set(files.values())}
        together = {folder: sorted(files) for folder, files in groupby(sorted(sizes), attrgetter("parent"))}
        stored = {file: 1 - cached_share(file, len(together[file.parent])) for file in sizes}
        kept = sum(sizes.values()) <= _available_memory() // 2
    except OSError:
        return Reading({}, None)
    by_path = {checkpoint.path: nbytes for checkpoint, nbytes in inputs.items()}
    direct = _faster_past(limits, by_path, kept)
    local = {folder: mount_of(folder).local for folder in together}

    @cache
    def faster_in(folder: Path) -> bool:
        """Files of a checkpoint have one history, and one answer."""
        return maps_faster([file for file in together[folder] if stored[file] <= _COLD])

    def ways(file: Path) -> Ways:
        in_place = backend.reads_in_place and local[file.parent]
        cold = stored[file] > _COLD  # its pages, once they are read, are large and fast to map
        otherwise: Way = "read"
        if in_place and (cold or faster_in(file.parent)):
            otherwise = "mapped" if stored[file] > _MISSING else "present"
        return Ways("direct" if direct and cold else otherwise, otherwise)

    not_cached = round(sum(size * stored[file] for file, size in sizes.items()))
    reading = Reading({file: ways(resolved) for file, resolved in files.items()}, not_cached)
    plan.in_place = kept and all(
        reading.way(plan, job, checkpoint, name) in ("mapped", "present") and checkpoint.maps(name)
        for job in plan.jobs
        for checkpoint, name in plan.inputs(job)
    )
    return reading


def _faster_past(limits: Limits, nbytes: Mapping[Path, int], kept: bool) -> bool:
    """Whether to read past the page cache what is not in it, and would be kept there or not."""
    through, past = limits.reading(nbytes, "read"), limits.reading(nbytes, "direct")
    if through is None or past is None:
        return False
    wanted = _IF_MEMORY_IS_DEAR if gives_memory_back() else _IF_KEPT if kept else _IF_NOT_KEPT
    return past > wanted * through


def _available_memory() -> int:
    """Bytes that the system could give to programs and the page cache. Raises ``OSError``."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo says nothing of available memory")
