"""A merge shard by shard: another process can do a shard, and can do it again.

A ``ShardJob`` is plain data and can be sent to any process that sees the inputs and the output folder. That process
writes a complete ``.part`` file and returns counts and digests. One process holds the folder and publishes. With
``trim_scope: model`` the process that sends the jobs first measures the shared needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from merge_engine.checkpoint import CheckpointTransaction, write_shard
from merge_engine.engine.carrying import carry_out, decide_together
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.measuring import SharedAnswers
from merge_engine.engine.publishing import publish
from merge_engine.engine.records import Collected, ShardResult, kept_if_useful, plan_key
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.engine.side_files import side_files_of
from merge_engine.engine.sinks import Target
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.result import MergeResult
from merge_engine.planning import MergePlan


@dataclass(frozen=True)
class ShardJob:
    """One shard of a plan, to be written below ``drafts``.

    ``plan`` has this one shard. ``device``, ``backend`` and ``threads`` are those of the process that does the job
    (see ``create_backend``), and ``memory`` is the bytes of tensor data that it holds at a time (see ``run``).
    """

    plan: MergePlan
    drafts: Path
    shared: SharedAnswers | None = None
    device: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    memory: int | None = None


def merge_shard(job: ShardJob) -> ShardResult:
    """Do a job. Repeating it replaces what was written before. Raises as ``run`` does."""
    backend = choose_backend(job.plan, job.drafts, job.backend, job.threads, job.device)
    (shard,) = job.plan.shards
    digests = Collected(job.plan).digests
    with open_access(job.plan, backend) as access, write_shard(job.drafts, shard) as writer:
        schedule = schedule_for(job.plan, access, backend, job.memory, job.shared is not None)
        (run,) = carry_out(schedule, backend, access, [Target(writer, digests)], known=[job.shared])
    return replace(ShardResult.of(shard, run, digests), shared=job.shared)


def merge_in_shards(
    plan: MergePlan,
    output: Path,
    do: Callable[[Callable[[ShardJob], ShardResult], Iterable[ShardJob]], Iterable[ShardResult]] = map,
    overwrite: bool = False,
    **options: object,
) -> MergeResult:
    """Merge a plan. ``do`` maps a function over jobs; it may be the ``map`` of a pool of processes.

    Shards that an interrupted merge of the same plan left complete are not merged again. ``overwrite`` replaces an
    earlier output. ``options`` are those of ``ShardJob``. Tensors are the same as after ``run``, byte for byte. Raises
    as ``run`` does.
    """
    start = time.perf_counter()
    side_files = side_files_of(plan)
    layouts = {shard.name: shard for shard in plan.shards}
    transaction = CheckpointTransaction(output, plan.shards, key=plan_key(plan), overwrite=overwrite)
    with transaction, kept_if_useful([transaction], [plan]):
        collected = Collected(plan)
        for record in transaction.complete.values():
            collected.add(ShardResult.decode(record))
        missing = [number for number, name in enumerate(layouts) if name not in transaction.complete]
        if missing:
            shared = collected.shared or _decide(plan)
            template = ShardJob(plan, transaction.open_drafts(), shared)
            template = replace(template, **options)  # type: ignore[arg-type]
            jobs = (replace(template, plan=plan.only(number)) for number in missing)
            for done in do(merge_shard, jobs):
                collected.add(done)
                transaction.record(layouts[done.shard], done.encode())
        ledger = Ledger(seconds=time.perf_counter() - start)
        return publish(plan, output, collected, ledger, transaction, side_files)


def _decide(plan: MergePlan) -> SharedAnswers | None:
    """The answers to the shared needs of a plan."""
    backend = choose_backend(plan, None)
    with open_access(plan, backend) as access:
        (shared,) = decide_together(schedule_for(plan, access, backend), backend, access)
    return shared
