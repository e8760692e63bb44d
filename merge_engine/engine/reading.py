"""Whether a run reads through the page cache or past it.

Through it, what is there already need not come from storage, and what comes is there for the next run. Past
it, a fast disk may be read faster. So a run reads past it only where that was measured to be faster, and only
what the page cache does not hold, would not keep until the next run, and is asked for once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merge_engine.checkpoint.page_cache import cached_share
from merge_engine.checkpoint.source import SafetensorsCheckpoint
from merge_engine.engine.limits import Limits, ReadingWay
from merge_engine.engine.plan import Plan

_WORTHWHILE = 1.1  # less is within what two measurements differ by


@dataclass(frozen=True)
class Reading:
    """How the inputs of a plan are read, and how many of their bytes are not in the page cache now.

    ``not_cached`` is None where the system does not say.
    """

    way: ReadingWay
    not_cached: int | None


def choose_reading(plan: Plan, limits: Limits) -> Reading:
    """Decide, from what is in the page cache now and from what this machine was measured to do."""
    inputs = plan.bytes_by_input()
    files = {
        file.resolve()
        for checkpoint in inputs
        for file in {checkpoint.file_of(name) for name in checkpoint.tensors}
    }
    try:
        sizes = {file: file.stat().st_size for file in files}
        not_cached = round(sum(size * (1 - cached_share(file)) for file, size in sizes.items()))
        kept = _available_memory() // 2
    except OSError:
        return Reading("read", None)
    by_path = {checkpoint.path: nbytes for checkpoint, nbytes in inputs.items()}
    through, past = limits.reading(by_path, "read"), limits.reading(by_path, "direct")
    faster = through is not None and past is not None and past > _WORTHWHILE * through
    total = sum(sizes.values())
    once = all(plan.passes(job) == 1 for job in plan.jobs)
    if faster and once and total > kept and not_cached > total // 2:
        return Reading("direct", not_cached)
    return Reading("read", not_cached)


def apply_reading(plan: Plan, reading: Reading) -> None:
    """Have the inputs read in the way that was chosen."""
    if reading.way == "direct":
        for checkpoint in plan.bytes_by_input():
            if isinstance(checkpoint, SafetensorsCheckpoint):
                checkpoint.bypass_page_cache()


def _available_memory() -> int:
    """Bytes that the system could give to programs and the page cache. Raises ``OSError``."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo says nothing of available memory")
