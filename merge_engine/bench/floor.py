"""The floor of a merge: the least time to move its bytes at the measured limits of a machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merge_engine.backends import Backend
from merge_engine.bench.limits import Limits
from merge_engine.planning import Schedule
from merge_engine.storage import Way, cached_share


@dataclass(frozen=True)
class Resource:
    """Bytes that a merge moves through a ``part`` of the machine, and the limit of that part in bytes per second.

    The limit is None if it is not measured. Resources with the same ``part`` use it one after the other.
    """

    name: str
    part: str
    bytes: int
    limit: float | None

    @property
    def seconds(self) -> float | None:
        """The least time to move the bytes, None without a limit."""
        return None if self.limit is None else self.bytes / self.limit


def floor(resources: tuple[Resource, ...]) -> float | None:
    """The least seconds to move the bytes: those of the slowest part; None if a limit is unknown."""
    taken: dict[str, float] = {}
    for resource in resources:
        if not resource.bytes:
            continue
        if resource.seconds is None:
            return None
        taken[resource.part] = taken.get(resource.part, 0.0) + resource.seconds
    return max(taken.values(), default=0.0)


def resources(
    schedule: Schedule, way: Way, output: Path | None, limits: Limits, backend: Backend | type[Backend]
) -> tuple[Resource, ...]:
    """The bytes that a merge moves through each part of the machine, with the inputs where they are now.

    Raises ``OSError`` if an input file is not accessible.
    """
    by_file: dict[Path, int] = {}
    for task in schedule.tasks:
        readings = schedule.readings(task)
        for operand in task.inputs:
            for file in operand.files:
                by_file[file.path] = by_file.get(file.path, 0) + readings * operand.stored_bytes
    read = sum(by_file.values())
    in_cache = round(sum(cached_share(path, len(by_file)) * nbytes for path, nbytes in by_file.items()))
    stored, copied = read - in_cache, 0 if schedule.budget.in_place else in_cache
    through = "direct read" if way == "direct" else "disk read"
    result = [
        Resource(
            through, "storage", stored, limits.reading(by_file, "direct" if way == "direct" else "read")
        ),
        Resource("page cache", "page cache", copied, limits.reading(by_file, "cached")),
        Resource("memory", "memory", read + schedule.bytes_written, limits.memory),
    ]
    if backend.has_link:
        result.append(Resource("link", "link", schedule.bytes_up, limits.link))
    if output is not None:
        disk = limits.disk(output)
        result.append(
            Resource("disk write", "disk write", schedule.bytes_written, disk.write if disk else None)
        )
    return tuple(result)
