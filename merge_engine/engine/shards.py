"""A merge shard by shard: another process can do a shard, and can do it again.

A process that does a ``ShardJob`` writes a complete ``.part`` file and returns counts and digests. One process holds
the folder and publishes. With ``trim_scope: model`` the shared needs are measured first, as jobs too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_engine.checkpoint import CheckpointTransaction, write_shard
from merge_engine.engine.answers import SharedAnswers
from merge_engine.engine.carrying import Progress, carry_out
from merge_engine.engine.counting import decide_in_parts, parts_to_count
from merge_engine.engine.jobs import Do, Done, Job
from merge_engine.engine.publishing import publish
from merge_engine.engine.records import Collected, ShardResult, kept_if_useful, plan_key
from merge_engine.engine.scheduling import schedule_for
from merge_engine.engine.side_files import side_files_of
from merge_engine.engine.sinks import Target
from merge_engine.errors import OutputError
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.result import MergeResult
from merge_engine.planning import DEFAULT_MEMORY, Budget, MergePlan, Schedule

_SHOWS_AFTER = 90.0
"""Seconds after which a network file system shows here what another machine has written. Mostly it does at once."""


@dataclass(frozen=True, kw_only=True)
class ShardJob(Job):
    """One shard of a plan, to be written below ``drafts``. ``plan`` has this one shard."""

    drafts: Path
    shared: SharedAnswers | None = None

    @property
    def nbytes(self) -> int:
        """See ``Job.nbytes``."""
        return _scheduled(self.plan, self.memory, self.shared is not None).bytes_read


def merge_shard(job: ShardJob, progress: Progress | None = None) -> Done[ShardResult]:
    """Do a job. Repeating it replaces what was written before. Raises as ``run`` does."""
    (shard,) = job.plan.shards
    digests = Collected(job.plan).digests
    with job.opened(job.drafts) as (backend, access), write_shard(job.drafts, shard) as writer:
        schedule = schedule_for(job.plan, access, backend, job.memory, job.shared is not None)
        target = Target(writer, digests)
        (run,) = carry_out(schedule, backend, access, [target], progress, known=[job.shared])
    result = replace(ShardResult.of(shard, run, digests), shared=job.shared)
    return Done(result, run.ledger)


def merge_in_shards(
    plan: MergePlan,
    output: Path,
    do: Do = map,
    overwrite: bool = False,
    progress: Progress | None = None,
    workers: int = 1,
    check: Callable[[Path], None] | None = None,
    **options: Any,
) -> MergeResult:
    """Merge a plan. ``do`` maps a function over jobs; it may be the ``map`` of a pool of processes.

    Shards that an interrupted merge of the same plan left complete are not merged again; ``progress`` is called with
    the input bytes that are not read for that reason. ``overwrite`` replaces an earlier output. ``workers`` is the
    number of processes that do jobs. ``check`` is called with the folder of drafts before the first job. ``options``
    are those of ``Job``. Tensors are the same as after ``run``, byte for byte. Raises as ``run`` does.
    """
    start = time.perf_counter()
    ledger = Ledger(workers=workers)

    def values(function: Callable[[Any], Done[Any]], jobs: Iterable[Job]) -> Iterator[Any]:
        for done in do(function, jobs):
            ledger.add(done.ledger)
            yield done.value

    side_files = side_files_of(plan)
    layouts = {shard.name: shard for shard in plan.shards}
    transaction = CheckpointTransaction(output, plan.shards, key=plan_key(plan), overwrite=overwrite)
    with transaction, kept_if_useful([transaction], [plan]):
        collected = Collected(plan)
        for record in transaction.complete.values():
            collected.add(ShardResult.decode(record))
        missing = [number for number, name in enumerate(layouts) if name not in transaction.complete]
        if missing:
            drafts = transaction.open_drafts().absolute()
            if check is not None:
                check(drafts)
            shared, whole = collected.shared, _scheduled(plan, options.get("memory"))
            if shared is None and whole.shared:
                (together,) = whole.shared
                shared = decide_in_parts(together.needs, parts_to_count(plan), values, **options)
            jobs = [
                ShardJob(plan=plan.only(number), drafts=drafts, shared=shared, **options)
                for number in missing
            ]
            if progress is not None and transaction.complete:
                progress(max(whole.bytes_read - sum(job.nbytes for job in jobs), 0))
            for done in values(merge_shard, jobs):
                layout = layouts[done.shard]
                collected.add(done)
                _wait_for(transaction.part_of(layout))
                transaction.record(layout, done.encode())
        ledger.seconds = time.perf_counter() - start
        return publish(plan, output, collected, ledger, transaction, side_files)


def _scheduled(plan: MergePlan, memory: int | None, shared_known: bool = False) -> Schedule:
    """The schedule of a process that uses no inputs in place. Raises ``PlanError`` when the memory is too small."""
    return Schedule(plan, Budget(DEFAULT_MEMORY if memory is None else memory), shared_known)


def _wait_for(part: Path) -> None:
    """Wait until this machine sees the part, which another one may have written.

    Raises ``OutputError`` when it does not.
    """
    end = time.monotonic() + _SHOWS_AFTER
    while not part.exists():
        if time.monotonic() > end:
            raise OutputError(
                f"{part}: was written elsewhere and does not show here; all machines must see the same output folder"
            )
        time.sleep(0.1)
        list(part.parent.iterdir())  # a client of NFS looks again at what it took for missing
