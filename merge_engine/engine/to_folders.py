"""Carry out a schedule into folders, one for each recipe, and publish them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from merge_engine.backends import Backend
from merge_engine.checkpoint import CheckpointWriter
from merge_engine.engine.answers import SharedAnswers
from merge_engine.engine.carrying import Progress, carry_out, decide_together
from merge_engine.engine.publishing import publish
from merge_engine.engine.records import Collected, Recorder, ShardResult, kept_if_useful, plan_key
from merge_engine.engine.side_files import side_files_of
from merge_engine.engine.sinks import Target
from merge_engine.observe.result import MergeResult
from merge_engine.operands import Access
from merge_engine.planning import SIDE_BY_SIDE, Schedule
from merge_engine.storage import mount_of


def merge_to_folders(
    scheduled: Schedule,
    outputs: Sequence[Path],
    backend: Backend,
    access: Access,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
    overwrite: bool = False,
    resumable: bool = True,
    labels: Sequence[str] = (),
) -> list[MergeResult]:
    """Carry out a schedule, write the outputs of its recipes, and publish them. Raises as ``run`` does.

    Shards that an interrupted merge of the same plan left complete are not merged again, if it was ``resumable``.
    ``labels`` are the names of several recipes, for messages. An error ends the work for all recipes: each output is
    complete or not there, and complete shards are kept.
    """
    scheduled = _in_few_shards(scheduled, outputs)
    plans = scheduled.plans
    side_files = [side_files_of(planned) for planned in plans]
    collected = [Collected(planned) for planned in plans]
    recorders = [Recorder(each.digests) for each in collected]
    results = []
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                CheckpointWriter(
                    output,
                    planned.shards,
                    key=plan_key(planned) if resumable else "",
                    overwrite=overwrite,
                    record=recorder,
                )
            )
            for planned, output, recorder in zip(plans, outputs, recorders, strict=True)
        ]
        stack.enter_context(kept_if_useful(writers, plans, lambda number: recorders[number].failed))
        try:
            for each, writer in zip(collected, writers, strict=True):
                for record in writer.complete.values():
                    each.add(ShardResult.decode(record))
            rest, known = _rest_of(scheduled, writers, collected, backend, access)
            if progress is not None and rest is not scheduled:
                progress(scheduled.bytes_read - rest.bytes_read)
            targets = [
                Target(writer, each.digests, recorder)
                for writer, each, recorder in zip(writers, collected, recorders, strict=True)
            ]
            runs = carry_out(rest, backend, access, targets, progress, known=known, labels=labels)
        except BaseException:
            for each in collected:
                each.digests.give_up()
            raise
        for number, run in enumerate(runs):
            collected[number].add_run(run)
            results.append(
                publish(
                    plans[number],
                    outputs[number],
                    collected[number],
                    deepcopy(run.ledger),
                    writers[number],
                    side_files[number],
                    notes,
                )
            )
    return results


def _rest_of(
    scheduled: Schedule,
    writers: Sequence[CheckpointWriter],
    collected: Sequence[Collected],
    backend: Backend,
    access: Access,
) -> tuple[Schedule, Sequence[SharedAnswers | None]]:
    """The schedule for the shards that are not complete, and the answers to shared needs, if they must be known."""
    if not any(writer.complete for writer in writers):
        return scheduled, ()
    missing = [
        [number for number, shard in enumerate(planned.shards) if shard.name not in writer.complete]
        for planned, writer in zip(scheduled.plans, writers, strict=True)
    ]
    known = [each.shared for each in collected]
    having = {recipe for group in scheduled.shared for recipe in group.recipes if missing[recipe]}
    if any(known[recipe] is None for recipe in having):
        decided = decide_together(scheduled, backend, access)
        known = [before or now for before, now in zip(known, decided, strict=True)]
    first, *beside = (
        planned.only(*numbers) for planned, numbers in zip(scheduled.plans, missing, strict=True)
    )
    return replace(scheduled, plan=first, beside=tuple(beside), shared_known=bool(having)), known


def _in_few_shards(scheduled: Schedule, outputs: Sequence[Path]) -> Schedule:
    """The schedule for outputs on a disk: an interrupted merge loses what it has of shards that are not complete.

    Two files at a time take all that a disk can write. Several outputs are written side by side anyway.
    """
    few = SIDE_BY_SIDE
    if not all(mount_of(output).in_memory for output in outputs):
        few = min(few, max(2, len(scheduled.plan.shards) // 10))
    few = max(1, few // len(outputs))
    return replace(scheduled, budget=replace(scheduled.budget, side_by_side=few))
