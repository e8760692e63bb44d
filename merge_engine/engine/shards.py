"""A merge shard by shard: another process can do a shard, and can do it again.

A ``ShardJob`` is plain data and can be sent to any process that sees the inputs and the output folder. That process
writes a complete ``.part`` file and returns counts and digests. One process holds the folder and publishes. With
``trim_scope: model`` the process that sends the jobs first measures the shared needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_engine.checkpoint import CheckpointTransaction, write_shard
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.measuring import SharedAnswers
from merge_engine.engine.run import carry_out, digests_of, publish, result_of
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.methods import Answers, Method, Need, Operation, Task
from merge_engine.methods.needs import is_shared
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.result import MergeResult, TensorResult
from merge_engine.planning import MergePlan, Schedule, measuring


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


@dataclass(frozen=True)
class ShardResult:
    """The result of a shard: counts by tensor, the digests of all blocks by tensor, and the backend's name."""

    results: Mapping[str, TensorResult]
    trimmed_to: Mapping[int, int]
    blocks: Mapping[str, Mapping[int, bytes]]
    notes: Sequence[str]
    backend: str


def merge_shard(job: ShardJob) -> ShardResult:
    """Do a job. Repeating it replaces what was written before. Raises as ``run`` does."""
    backend = choose_backend(job.plan, job.drafts, job.backend, job.threads, job.device)
    digests = digests_of(job.plan)
    with open_access(job.plan, backend) as access, write_shard(job.drafts, job.plan.shards[0]) as writer:
        schedule = schedule_for(job.plan, access, backend, job.memory, job.shared is not None)
        run = carry_out(schedule, backend, access, writer, digests, shared=job.shared)
    return ShardResult(run.results, run.trimmed_to, digests.blocks(), tuple(run.notes), backend.name)


def merge_in_shards(
    plan: MergePlan,
    output: Path,
    do: Callable[[Callable[[ShardJob], ShardResult], Iterable[ShardJob]], Iterable[ShardResult]] = map,
    overwrite: bool = False,
    **options: object,
) -> MergeResult:
    """Merge a plan. ``do`` maps a function over jobs; it may be the ``map`` of a pool of processes.

    ``overwrite`` replaces an earlier output. ``options`` are those of ``ShardJob``. Tensors are the same as after
    ``run``, byte for byte. Raises as ``run`` does.
    """
    start = time.perf_counter()
    with CheckpointTransaction(output, plan.shards, overwrite=overwrite) as transaction:
        template = ShardJob(plan, transaction.open_drafts(), decide_together(plan))
        template = replace(template, **options)  # type: ignore[arg-type]
        jobs = (replace(template, plan=plan.only(number)) for number in range(len(plan.shards)))
        digests = digests_of(plan)
        results: dict[str, TensorResult] = {}
        trimmed_to: dict[int, int] = {}
        notes: dict[str, None] = {}
        backends: dict[str, None] = {}
        for done in do(merge_shard, jobs):
            digests.merge(done.blocks)
            results.update(done.results)
            trimmed_to.update(done.trimmed_to)
            notes.update(dict.fromkeys(done.notes))
            backends[done.backend] = None
        ledger = Ledger(seconds=time.perf_counter() - start)
        result = result_of(plan, results, trimmed_to, ledger, list(notes))
        publish(plan, output, result, ", ".join(backends), digests, transaction)
    return result


def decide_together(plan: MergePlan) -> SharedAnswers | None:
    """The answers to the shared needs of a plan, as data; None if it has none. Raises as ``run`` does."""
    if not Schedule(plan).shared_needs:
        return None
    shared = measuring(plan, _Together(plan.method))
    backend = choose_backend(shared, None)
    with open_access(shared, backend) as access:
        run = carry_out(schedule_for(shared, access, backend), backend, access, None, None)
    assert run.shared is not None
    return run.shared.data()


class _Together(Method):
    """The shared needs of another method alone."""

    def __init__(self, method: Method):
        self.name = method.name
        self._method = method

    def needs(self, task: Task) -> Sequence[Need]:
        """The needs that all tensors answer together."""
        return [need for need in self._method.needs(task) if is_shared(need)]

    def solve(self, task: Task, answers: Answers) -> Operation:
        """Nothing is merged."""
        raise NotImplementedError
