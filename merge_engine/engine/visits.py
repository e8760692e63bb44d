"""The order of work, known before the first byte is read.

A tensor that fits in memory is visited once: measured and merged while it is there. A larger one is visited
once per chunk for every statistic, and once more to be merged. One that is read in place is measured whole and then
merged chunk by chunk, so that what comes out is still in the processor's cache when it is digested. Statistics that
tensors share come first, over all of them in the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merge_engine.backends.operations import Combine
from merge_engine.engine.plan import Plan
from merge_engine.engine.tasks import TensorJob
from merge_engine.methods import Program, Share
from merge_engine.methods.base import Fixed, Statistic

COPY = Fixed(Combine((1.0,)))
"""Gives back every finite value bit for bit, converted to the output's type."""


@dataclass(frozen=True)
class Visit:
    """One chunk of one tensor.

    ``statistics`` see it, those in ``complete`` are finished after it, and with ``merge`` it is merged.
    ``whole`` says that the chunk is all of the tensor, ``again`` that its inputs are where an earlier visit left
    them, ``stays`` that this one leaves them there.
    """

    job: TensorJob
    program: Program
    start: int
    count: int
    statistics: Sequence[Statistic]
    complete: Sequence[Statistic]
    merge: bool
    whole: bool
    again: bool = False
    stays: bool = False


def visits(plan: Plan) -> Iterator[Visit]:
    """Every visit of a run."""
    tasks = [job.task for job in plan.jobs if job.task is not None and job.task.count > 0]
    share = plan.method.share(tasks)
    if share is not None:
        yield from _shared_visits(plan, share)
    for job in plan.jobs:
        chunks = list(plan.chunks(job))
        program = COPY if job.task is None else plan.method.program(job.task, share)
        if len(chunks) == 1:
            yield Visit(job, program, *chunks[0], program.statistics, program.statistics, True, True)
            continue
        if program.statistics and plan.measures_whole(job):
            for statistic in program.statistics:
                again = statistic is not program.statistics[0]
                yield Visit(
                    job, program, 0, job.count, (statistic,), (statistic,), False, True, again, stays=True
                )
            for start, count in chunks:
                yield Visit(job, program, start, count, (), (), True, False, again=True)
            continue
        for statistic in program.statistics:
            for start, count in chunks:
                complete = (statistic,) if start == chunks[-1][0] else ()
                yield Visit(job, program, start, count, (statistic,), complete, False, False)
        for start, count in chunks:
            yield Visit(job, program, start, count, (), (), True, False)


def _shared_visits(plan: Plan, share: Share) -> Iterator[Visit]:
    jobs = sorted((job for job in plan.jobs if job.task is not None), key=lambda job: job.name)
    pieces = [(job, start, count) for job in jobs for start, count in plan.chunks(job)]
    for statistic in share.statistics:
        for job, start, count in pieces:
            complete = (statistic,) if (job, start) == pieces[-1][:2] else ()
            yield Visit(job, COPY, start, count, (statistic,), complete, False, False)
