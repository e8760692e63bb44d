"""Cases to be timed, and their measurement: contestants take turns, so that other load slows all of them alike."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import merge_engine
from merge_engine.bench.checkpoints import Family, weight_files
from merge_engine.bench.contestants import METHODS, Merge, check_output, command, plays
from merge_engine.bench.fit import median_seconds
from merge_engine.bench.floor import floor, resources
from merge_engine.bench.limits import Limits
from merge_engine.bench.measuring import Measurement, claim_memory, cool, empty, measure, warm
from merge_engine.bench.shapes import ARCHITECTURES
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.errors import PlanError
from merge_engine.storage import mount_of

Runs = dict[str, list[Measurement]]

_OWN_MEMORY = 1 << 30


@dataclass(frozen=True)
class Case:
    """One merge: ``cache`` is "warm" or "cold", ``shard_size`` of the inputs and ``pace`` in bytes (per second)."""

    family: Family
    models: int
    method: str
    cache: str
    pace: int | None

    def __str__(self) -> str:
        shards = f"shards of {self.family.shard_size / 1e6:,.0f} MB"
        slow = "" if self.pace is None else f", a disk of {self.pace / 1e6:,.0f} MB/s"
        return f"{self.method}, {self.family.size}, {self.models} model(s), {self.cache}, {shards}{slow}"


@dataclass(frozen=True)
class Suite:
    """All combinations of sizes, numbers of models, methods, states of the page cache, and so on.

    ``rounds`` says how often each contestant runs; only ``distinct`` fine-tunes have data of their own (None:
    all); outputs go below ``output``.
    """

    root: Path
    output: Path
    sizes: tuple[str, ...]
    models: tuple[int, ...]
    methods: tuple[str, ...]
    caches: tuple[str, ...]
    shard_sizes: tuple[int, ...]
    pace: int | None
    distinct: int | None
    rounds: Mapping[str, int]
    mergekit: Path | None = None

    def cases(self) -> Iterator[Case]:
        """Every case once. Passthrough merges one model."""
        seen = set()
        for size, shard_size, models, method, cache in product(
            self.sizes, self.shard_sizes, self.models, self.methods, self.caches
        ):
            count = 1 if method == "passthrough" else models
            case = Case(Family(self.root, size, shard_size), count, method, cache, self.pace)
            if case not in seen:
                seen.add(case)
                yield case

    def check_space(self) -> None:
        """Raise ``PlanError`` unless the disks hold all checkpoints and the largest output."""
        self.root.mkdir(parents=True, exist_ok=True)
        families = {case.family for case in self.cases()}
        inputs = sum(family.missing_bytes(max(self.models), self.distinct) for family in families)
        output = max(ARCHITECTURES[size].weight_bytes for size in self.sizes)
        needed = {self.root: inputs}
        shared = self.root.stat().st_dev == self.output.stat().st_dev
        needed[self.root if shared else self.output] = output + (inputs if shared else 0)
        problems = []
        for folder, nbytes in needed.items():
            free = shutil.disk_usage(folder).free
            if free < nbytes:
                problems.append(
                    f"{folder}: needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                    "choose smaller sizes, fewer models or another folder"
                )
        if problems:
            raise PlanError(problems)


@dataclass
class Result:
    """A case and its measurements. ``floor`` is in seconds, None if the limits are not known."""

    case: Case
    merge: Merge
    floor: float | None
    runs: Runs = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        case = self.case
        setting = METHODS[case.method]
        return {
            "method": case.method,
            "parameters": {**setting.model, **setting.merge},
            "size": case.family.size,
            "models": case.models,
            "cache": case.cache,
            "shard_size": case.family.shard_size,
            "slow_disk_bytes_per_second": case.pace,
            "bytes_read": self.merge.bytes_read,
            "bytes_written": self.merge.bytes_written,
            "floor_seconds": None if self.floor is None else round(self.floor, 3),
            "median_seconds": {name: round(median_seconds(runs), 3) for name, runs in self.runs.items()},
            "runs": {
                name: [{key: round(value, 3) for key, value in asdict(run).items()} for run in runs]
                for name, runs in self.runs.items()
            },
        }


def measure_case(suite: Suite, case: Case, limits: Limits) -> Result:
    """Make missing checkpoints, and run every contestant as often as ``suite.rounds`` says, in turns.

    Raises ``MergeError`` when checkpoints cannot be made or a contestant fails.
    """
    base, models = case.family.make(max(suite.models), suite.distinct)
    merge = Merge(case.method, base, tuple(models[: case.models]))
    files = sorted({file for folder in merge.folders for file in weight_files(folder)})
    prepare = warm if case.cache == "warm" else cool
    rounds = {
        name: count
        for name, count in suite.rounds.items()
        if count and plays(name, case.method, case.pace is not None)
    }
    work = suite.output / "merge-engine-bench"
    in_memory = mount_of(suite.output).kind == "tmpfs"
    prepare(files)
    result = Result(case, merge, _floor(merge, work, case, limits), {name: [] for name in rounds})
    try:
        for turn in range(max(rounds.values(), default=0)):
            for name in (name for name, count in rounds.items() if turn < count):
                empty(work)
                arguments = command(name, merge, work, suite.mergekit, case.pace)
                prepare(files)
                if in_memory:
                    claim_memory(merge.bytes_written + _OWN_MEMORY)
                result.runs[name].append(measure(arguments, work / "output"))
                check_output(name, merge, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return result


def _floor(merge: Merge, output: Path, case: Case, limits: Limits) -> float | None:
    """The least seconds to move the bytes, with the inputs where they are now."""
    planned = merge_engine.plan(merge.recipe())
    backend = choose_backend(planned, output)
    with open_access(planned, backend) as access:
        schedule = schedule_for(planned, access, backend)
        least = floor(resources(schedule, access.way, output, limits, backend))
    if case.pace is None:
        return least
    return max(least or 0.0, (merge.bytes_read + merge.bytes_written) / case.pace)
