"""How much of the machine a merge uses: foretold from its plan, and accounted for from its ledger.

Both are a ``Usage``, so that they can be compared: bytes moved through each resource, what the resource can do
at best, and the seconds that follow.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from merge_engine.backends import Backend
from merge_engine.engine.ledger import Ledger
from merge_engine.engine.limits import Limits, load_limits, save_limits
from merge_engine.engine.plan import Plan
from merge_engine.engine.reading import Reading

_STORAGE = ("direct read", "disk read")

_TELLING = 256_000_000  # input bytes of a run from which on its speed of computing is worth remembering


@dataclass(frozen=True)
class Resource:
    """What a merge moves through a resource in bytes, and what that can do at best in bytes per second.

    The limit is None while it is not measured.
    """

    name: str
    bytes: int
    limit: float | None

    @property
    def seconds(self) -> float | None:
        """The least time that it takes."""
        return None if self.limit is None else self.bytes / self.limit


@dataclass(frozen=True)
class Usage:
    """Resources of a merge, and seconds: of ``compute`` and ``digest`` (one thread each), and of all of it.

    Of a merge that is still to come, seconds are None where nothing is known.
    """

    resources: tuple[Resource, ...]
    compute: float | None
    digest: float | None
    seconds: float | None

    @property
    def floor(self) -> float | None:
        """Seconds that moving the bytes takes at the limits, with nothing else to do; None if one is unknown.

        What comes from storage in two ways shares the disk.
        """
        taken: dict[str, float] = {}
        for resource in self.resources:
            if resource.bytes and resource.seconds is None:
                return None
            name = "storage" if resource.name in _STORAGE else resource.name
            taken[name] = taken.get(name, 0.0) + (resource.seconds or 0.0)
        return max(taken.values(), default=0.0)

    def shares(self) -> dict[str, float]:
        """By resource the share of its limit that was used, by busy thread the share of the time."""
        if not self.seconds:
            return {}
        seconds = {resource.name: resource.seconds for resource in self.resources}
        seconds |= {"compute": self.compute, "digest": self.digest}
        return {name: value / self.seconds for name, value in seconds.items() if value is not None}

    @property
    def bound_by(self) -> str | None:
        """What had the largest share, if that is at least a half; otherwise nothing alone explains the time."""
        shares = self.shares()
        name = max(shares, key=lambda name: shares[name], default=None)
        return name if name is not None and shares[name] >= 0.5 else None

    def as_dict(self) -> dict[str, object]:
        """Plain numbers for the manifest."""
        shares = self.shares()
        resources = {
            resource.name: {
                "bytes": resource.bytes,
                "limit_bytes_per_second": _rounded(resource.limit, 0),
                "percent_of_limit": _rounded(shares.get(resource.name), 3, scale=100),
            }
            for resource in self.resources
        }
        return {
            "resources": resources,
            "compute_seconds": _rounded(self.compute, 3),
            "floor_seconds": _rounded(self.floor, 3),
            "seconds": _rounded(self.seconds, 3),
            "bound_by": self.bound_by,
        }


def predict(
    plan: Plan, output: Path | None, limits: Limits, reading: Reading, backend: Backend, threads: int | None
) -> Usage:
    """What the merge will use. How fast it computes, an earlier run of its kind may have shown."""
    resources = _resources(plan, output, limits, reading, backend, reading.not_cached)
    rate = limits.compute.get(_kind(plan, backend, threads, reading.not_cached))
    compute = plan.bytes_read / rate if rate else None
    floor = Usage(resources, compute, None, None).floor
    expected = None if compute is None or floor is None else max(compute, floor)
    return Usage(resources, compute, None, expected)


def account(
    plan: Plan, output: Path | None, limits: Limits, reading: Reading, backend: Backend, ledger: Ledger
) -> Usage:
    """What the merge has used."""
    resources = _resources(plan, output, limits, reading, backend, ledger.from_storage)
    return Usage(resources, ledger.compute.seconds, ledger.digest.seconds, ledger.seconds)


def remember(plan: Plan, backend: Backend, threads: int | None, ledger: Ledger) -> None:
    """Keep the speed of computing for the next prediction, once limits are measured on this machine."""
    limits, stage = load_limits(), ledger.compute  # others may have measured meanwhile
    if limits.memory is None or stage.bytes < _TELLING or not stage.seconds:
        return
    limits.compute[_kind(plan, backend, threads, ledger.from_storage)] = stage.bytes / stage.seconds
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason for a merge to fail
        save_limits(limits)


def _kind(plan: Plan, backend: Backend, threads: int | None, stored: int | None) -> str:
    """Runs of one kind compute about as fast as each other: reading from storage takes processor time from it."""
    dtypes = sorted({str(job.working) for job in plan.jobs if job.task is not None})
    with_threads = f"{backend.name} on {threads or 'all'} threads"
    inputs = "storage" if stored is not None and 2 * stored > plan.bytes_read else "the page cache"
    return f"{plan.method.name} of {len(plan.models)} in {'/'.join(dtypes)} from {inputs}, {with_threads}"


def _resources(
    plan: Plan,
    output: Path | None,
    limits: Limits,
    reading: Reading,
    backend: Backend,
    stored: int | None,
) -> tuple[Resource, ...]:
    """``stored`` bytes are read from storage, the rest from the page cache; None is not known."""
    inputs = plan.bytes_by_input()
    by_path = {checkpoint.path: nbytes for checkpoint, nbytes in inputs.items()}
    read, written = sum(inputs.values()), plan.bytes_written
    if stored is None:
        resources = [Resource("reading", read, None)]
    else:
        direct = read if reading.way == "direct" else 0
        through = min(max(stored - direct, 0), read - direct)  # the system reads ahead, and other files
        copied = 0 if plan.in_place else read - direct - through
        resources = [
            Resource("direct read", direct, limits.reading(by_path, "direct")),
            Resource("disk read", through, limits.reading(by_path, "read")),
            Resource("page cache", copied, limits.reading(by_path, "cached")),
        ]
    resources.append(Resource("memory", read + written, limits.memory))
    if backend.name == "cuda":
        resources.append(Resource("link", read, limits.link))
    if output is not None:
        disk = limits.disk(output)
        resources.append(Resource("disk write", written, disk.write if disk else None))
    return tuple(resources)


def _rounded(value: float | None, digits: int, scale: float = 1) -> float | None:
    return None if value is None else round(scale * value, digits)
