"""In which way a run reads its inputs: through the page cache, in place where the backend can, or past it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from merge_engine.backends import Backend
from merge_engine.engine.plan import Plan
from merge_engine.storage.files import File
from merge_engine.storage.machine import available_memory
from merge_engine.storage.page_cache import cached_share
from merge_engine.storage.ranges import Way
from merge_engine.storage.reading import choose_way


@dataclass(frozen=True)
class Reading:
    """The way in which the inputs of a plan are read, and how many of their bytes are not in the page cache now.

    ``not_cached`` is None where the system does not say.
    """

    way: Way
    not_cached: int | None


def choose_reading(plan: Plan, backend: Backend) -> Reading:
    """Decide by what the inputs take of the memory that is available now: see ``choose_way``.

    Sets ``plan.in_place`` if the backend will use all inputs where the page cache holds them.
    """
    files = {file for checkpoint in plan.bytes_by_input() for file in checkpoint.files}
    try:
        way = choose_way(files, available_memory())
    except OSError:  # the system does not say
        way = "cached"
    plan.in_place = (
        way == "cached"
        and backend.reads_in_place
        and all(checkpoint.maps(name) for job in plan.jobs for checkpoint, name in plan.inputs(job))
    )
    return Reading(way, _not_cached(files))


def _not_cached(files: Collection[File]) -> int | None:
    """How many bytes of the files are not in the page cache."""
    sizes = {file.path.resolve(): file.size for file in files}
    try:
        return round(sum(size * (1 - cached_share(path, len(sizes))) for path, size in sizes.items()))
    except OSError:
        return None
