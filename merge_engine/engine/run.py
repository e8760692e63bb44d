"""Plan, schedule, stream, publish: a whole merge."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_engine.arguments import path_of, switch_of, threads_of
from merge_engine.backends import Backend
from merge_engine.checkpoint import (
    DEFAULT_SHARD_SIZE,
    MANIFEST_NAME,
    CheckpointTransaction,
    CheckpointWriter,
    parse_size,
    strange_model_files,
)
from merge_engine.engine.carrying import Progress, carry_out, decide_together
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.collecting import seldom_collected
from merge_engine.engine.measuring import SharedAnswers
from merge_engine.engine.records import Collected, Recorder, ShardResult, kept_if_useful, plan_key
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.engine.side_files import add_side_files, side_files_of
from merge_engine.engine.sinks import MemorySink
from merge_engine.errors import BackendError, OptionError
from merge_engine.fit import idle_models
from merge_engine.observe.card import encode_card
from merge_engine.observe.digests import model_digest
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.manifest import MergedInput, encode_manifest
from merge_engine.observe.result import MergeResult, TensorResult
from merge_engine.operands import Access
from merge_engine.planning import SIDE_BY_SIDE, MergePlan, Schedule, make_plan
from merge_engine.recipe import Recipe, load_recipe
from merge_engine.storage import File, mount_of
from merge_engine.text import some

RecipeSource = str | Path | Mapping[str, Any] | Recipe


def plan(
    recipe: RecipeSource,
    output: str | Path | None = None,
    *,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> MergePlan:
    """Plan a merge without reading or writing tensor data. For the arguments see ``run``.

    Raises ``OptionError``, ``RecipeError``, ``CheckpointError`` or ``PlanError`` with every problem that would keep
    the merge from working.
    """
    return make_plan(
        load_recipe(recipe),
        None if output is None else path_of("output", output),
        shard_size=_size(shard_size, "shard_size"),
        overwrite=switch_of("overwrite", overwrite),
    )


def schedule(
    plan: MergePlan,
    *,
    device: str = "auto",
    backend: str | Backend = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
) -> Schedule:
    """The schedule that ``run`` would carry out now on this machine: the order of visits, chunks and memory.

    For the arguments see ``run``; the output is taken to go into memory. Raises ``OptionError`` for a memory that is
    no size, ``PlanError`` when it is too small, and ``BackendError``.
    """
    chosen = backend if isinstance(backend, Backend) else choose_backend(plan, None, backend, threads, device)
    with open_access(plan, chosen) as access:
        return schedule_for(plan, access, chosen, parse_memory(memory))


def run(
    recipe: RecipeSource | MergePlan,
    output: str | Path | None = None,
    *,
    device: str = "auto",
    backend: str | Backend = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    on_schedule: Callable[[Schedule], None] | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge checkpoints as a recipe says.

    ``recipe``: YAML text, a path, a mapping, a ``Recipe``, or a plan that ``plan`` made. ``output``: the folder to
    write; without one the merged tensors are returned in memory. ``memory``: bytes of tensor data held at a time
    where the merge is computed, or text such as "400MB"; by default 400 MB of the host's memory or, on a GPU, a quarter
    of its free memory. The result never depends on it. ``shard_size``: bytes of tensor data in an output file, or text.
    ``device``, ``backend`` (a name, or a backend) and ``threads``: see ``create_backend``. If neither of the first two
    is given, a GPU is taken where it is expected to be faster than the CPU, and the result's notes say why.
    ``overwrite``: replace an earlier output in the folder. ``on_schedule`` is called with the schedule before work
    starts, ``progress`` with the number of input bytes of each finished batch.

    Raises ``MergeError``: ``OptionError``, ``RecipeError``, ``CheckpointError``, ``PlanError`` or ``BackendError``
    before anything is written, ``CheckpointError`` for an input that changes or cannot be read, ``NonFiniteError``
    for NaN or infinity in an input or output, ``OutputError`` when writing fails. After an error the output folder
    holds its earlier output or no model.
    """
    with seldom_collected, _naming_memory():
        notes: list[str] = []
        threads, budget = threads_of(threads), parse_memory(memory)  # before inputs are looked at
        planned = (
            recipe
            if isinstance(recipe, MergePlan)
            else plan(recipe, output, shard_size=shard_size, overwrite=overwrite)
        )
        folder = None if output is None else path_of("output", output)
        chosen = (
            backend
            if isinstance(backend, Backend)
            else choose_backend(planned, folder, backend, threads, device, notes)
        )
        with open_access(planned, chosen) as access:
            scheduled = schedule_for(planned, access, chosen, budget)
            if on_schedule is not None:
                on_schedule(scheduled)
            if folder is not None:
                return merge_to_folder(scheduled, folder, chosen, access, notes, progress, overwrite)
            sink = MemorySink(planned)
            done = carry_out(scheduled, chosen, access, sink, None, progress)
            result = result_of(planned, done.results, done.trimmed_to, done.ledger, [*notes, *done.notes])
            result.tensors = sink.tensors
            return result


def merge_to_folder(
    scheduled: Schedule,
    output: Path,
    backend: Backend,
    access: Access,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
    overwrite: bool = False,
) -> MergeResult:
    """Carry out a schedule, write the output, and publish it. Raises as ``run`` does.

    Shards that an interrupted merge of the same plan left complete are not merged again.
    """
    scheduled = _in_few_shards(scheduled, output)
    planned = scheduled.plan
    side_files = side_files_of(planned)
    collected = Collected(planned)
    recorder = Recorder(collected.digests)
    writer = CheckpointWriter(
        output, planned.shards, key=plan_key(planned), overwrite=overwrite, record=recorder
    )
    with writer, kept_if_useful(writer, planned):
        try:
            for record in writer.complete.values():
                collected.add(ShardResult.decode(record))
            rest, shared = _rest_of(scheduled, writer.complete, collected.shared, backend, access)
            if progress is not None and rest is not scheduled:
                progress(scheduled.bytes_read - rest.bytes_read)
            run = carry_out(
                rest, backend, access, writer, collected.digests, progress, shared=shared, recorder=recorder
            )
        except BaseException:
            collected.digests.give_up()
            raise
        collected.add_run(run)
        return publish(planned, output, collected, run.ledger, writer, side_files, notes)


def _rest_of(
    scheduled: Schedule,
    complete: Collection[str],
    shared: SharedAnswers | None,
    backend: Backend,
    access: Access,
) -> tuple[Schedule, SharedAnswers | None]:
    """The schedule for the shards that are not complete, and the answers to its shared needs, if they must be known."""
    if not complete:
        return scheduled, None
    planned = scheduled.plan
    missing = [number for number, shard in enumerate(planned.shards) if shard.name not in complete]
    if missing and shared is None:
        shared = decide_together(scheduled, backend, access)
    return Schedule(planned.only(*missing), scheduled.budget, shared is not None), shared


def _in_few_shards(scheduled: Schedule, output: Path) -> Schedule:
    """The schedule for an output on a disk: an interrupted merge loses what it has of shards that are not complete.

    Two files at a time take all that a disk can write.
    """
    if mount_of(output).in_memory:
        return scheduled
    few = max(2, len(scheduled.plan.shards) // 10)
    return replace(scheduled, budget=replace(scheduled.budget, side_by_side=min(few, SIDE_BY_SIDE)))


def result_of(
    planned: MergePlan,
    results: Mapping[str, TensorResult],
    trimmed_to: Mapping[int, int],
    ledger: Ledger,
    notes: Iterable[str],
) -> MergeResult:
    """The result of a merge. Tensors without elements are never visited, but appear in it."""
    named = planned.recipe.stacks.models
    labels = {i: str(named[i]) for i in planned.models}
    per_tensor = [results.get(task.name) or TensorResult(task.name, 0) for task in planned.tasks]
    said = [*planned.notes, *notes]
    result = MergeResult(None, None, per_tensor, labels, ledger, said, trimmed_to, list(planned.warnings))
    kept = {i: counts.kept for i, counts in result.counts.items() if i not in planned.copies}
    result.warnings += idle_models(labels, kept)
    return result


def publish(
    planned: MergePlan,
    output: Path,
    collected: Collected,
    ledger: Ledger,
    writer: CheckpointWriter | CheckpointTransaction,
    side_files: Mapping[str, File],
    notes: Iterable[str] = (),
) -> MergeResult:
    """Add config, tokenizer, model card and manifest, wait for the disk, and give all files their names.

    ``side_files`` are those that the donor had when the merge began, from ``side_files_of``.
    Raises ``CheckpointError`` and ``OutputError``.
    """
    result = result_of(planned, collected.results, collected.trimmed_to, ledger, [*notes, *collected.notes])
    result.output = output
    start = time.perf_counter()
    add_side_files(planned, writer, side_files)
    digest = model_digest(collected.digests.by_name())
    writer.add_file("README.md", encode_card(planned.recipe, result, digest))
    if isinstance(writer, CheckpointWriter):
        writer.flush()
    ledger.publish.seconds = time.perf_counter() - start
    ledger.seconds += ledger.publish.seconds
    manifest = encode_manifest(
        planned.recipe,
        _inputs(planned),
        result,
        ", ".join(collected.backends),
        collected.digests,
        planned.shards,
        writer.files,
    )
    writer.add_file(MANIFEST_NAME, manifest)
    writer.finish()
    if strange := strange_model_files(output, writer.files):
        # The manifest does not have it: a merge says the same of itself, whatever stood in the folder.
        result.warnings.append(
            f"{output}: holds {some(strange)}, which this merge did not write and a loader may read; remove what does "
            "not belong to the model"
        )
    if writer.complete:
        # No line of the manifest: it is the same, however often the merge was interrupted.
        result.notes.append(
            f"{len(writer.complete)} of {len(planned.shards)} shards were complete from an earlier run"
        )
    return result


def _inputs(planned: MergePlan) -> list[MergedInput]:
    """The inputs as the manifest names them."""
    roles = {**planned.bases, **{str(i): model for i, model in planned.models.items()}}
    inputs = {given.path: given for given in (planned.donor, *roles.values())}
    return [
        MergedInput(
            str(path),
            given.fingerprint,
            tuple(role for role, one in roles.items() if one.path == path),
            given.contents,
        )
        for path, given in inputs.items()
    ]


@contextmanager
def _naming_memory() -> Iterator[None]:
    """Turn ``MemoryError`` into an error that says what to do."""
    try:
        yield
    except MemoryError as error:
        raise BackendError(
            f"the system has too little memory for the merge{f' ({error})' if str(error) else ''}; choose a smaller "
            "memory, or raise the limit of this process (ulimit -v)"
        ) from error


def parse_memory(memory: int | str | None) -> int | None:
    """Bytes of a memory budget, None for the default. Raises ``OptionError`` if it is no size."""
    return None if memory is None else _size(memory, "memory")


def _size(value: int | str, name: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise OptionError(f"{name}: {error}") from None
