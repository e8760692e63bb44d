"""Plan, schedule, stream, publish: a whole merge."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_engine.arguments import path_of, switch_of, threads_of
from merge_engine.backends import Backend
from merge_engine.checkpoint import DEFAULT_SHARD_SIZE, CheckpointWriter, parse_size
from merge_engine.engine.carrying import Progress, carry_out, decide_together
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.collecting import seldom_collected
from merge_engine.engine.measuring import SharedAnswers
from merge_engine.engine.publishing import publish, result_of
from merge_engine.engine.records import Collected, Recorder, ShardResult, kept_if_useful, plan_key
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.engine.side_files import side_files_of
from merge_engine.engine.sinks import MemorySink
from merge_engine.errors import BackendError, OptionError
from merge_engine.methods import find_method
from merge_engine.observe.result import MergeResult
from merge_engine.operands import Access
from merge_engine.planning import SIDE_BY_SIDE, MergePlan, Schedule, make_plan
from merge_engine.recipe import Recipe, RecipeSource, load_recipes
from merge_engine.storage import mount_of


def plan(
    recipe: RecipeSource,
    output: str | Path | None = None,
    *,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    lenient: bool = False,
) -> MergePlan:
    """Plan a merge without reading or writing tensor data. For the arguments see ``run``.

    Of several recipes in one file, this is the plan of the result. ``run`` takes their file, not this plan.

    Raises ``OptionError``, ``RecipeError``, ``CheckpointError`` or ``PlanError`` with every problem that would keep
    the merge from working.
    """
    with plans(recipe, output, shard_size=shard_size, overwrite=overwrite, lenient=lenient) as planned:
        return planned[-1]


@contextmanager
def plans(
    recipe: RecipeSource,
    output: str | Path | None = None,
    *,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    lenient: bool = False,
) -> Iterator[list[MergePlan]]:
    """The plans of all recipes of a file, the result's last, which have their inputs until the context ends.

    For the arguments see ``run``. Raises as ``plan`` does.
    """
    options = _plan_options(shard_size, overwrite, lenient)
    folder = None if output is None else path_of("output", output)
    recipes = load_recipes(recipe, lenient=lenient, check_method=find_method)
    if len(recipes) == 1:
        yield [make_plan(recipes[0], folder, **options)]
        return
    from merge_engine.engine import documents  # seldom needed, and slow to load

    settings = documents.DocumentOptions(**options)
    documents.check_result(recipes, settings)
    with documents.planned_together(recipes, folder, settings) as planned:
        yield planned


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
    recipe: RecipeSource | tuple[Recipe, ...] | MergePlan,
    output: str | Path | None = None,
    *,
    device: str = "auto",
    backend: str | Backend = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    lenient: bool = False,
    intermediate_dir: str | Path | None = None,
    lazy: bool = True,
    on_schedule: Callable[[Schedule], None] | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge checkpoints as a recipe says.

    ``recipe``: YAML text, a path, a mapping, a ``Recipe``, several from ``load_recipes``, or a plan that ``plan`` made.
    ``output``: the folder to write; without one the merged tensors are returned in memory. ``memory``: bytes of tensor
    data held at a time where the merge is computed, or text such as "400MB"; by default 400 MB of the host's memory or,
    on a GPU, a quarter of its free memory. The result never depends on it. ``shard_size``: bytes of tensor data in an
    output file, or text. ``device``, ``backend`` (a name, or a backend) and ``threads``: see ``create_backend``. If
    neither of the first two is given, a GPU is taken where it is expected to be faster than the CPU, and the result's
    notes say why.
    ``overwrite``: replace an earlier output in the folder. ``lenient``: ignore keys and parameters that do not exist,
    with a warning. ``on_schedule`` is called with the schedule before work starts, ``progress`` with the number of
    input bytes of each finished batch.

    Several recipes in one file may refer to each other by ``name``; the one without a name makes the output. What the
    others make is removed at the end, or kept in ``intermediate_dir`` under their names; ``lazy`` then takes over what
    is there from an earlier run of the same recipe over the same inputs. ``on_schedule`` is called for each recipe.

    Raises ``MergeError``: ``OptionError``, ``RecipeError``, ``CheckpointError``, ``PlanError`` or ``BackendError``
    before anything is written, ``CheckpointError`` for an input that changes or cannot be read, ``NonFiniteError``
    for NaN or infinity in an input or output, ``OutputError`` when writing fails. After an error the output folder
    holds its earlier output or no model.
    """
    with seldom_collected, _naming_memory():
        threads, budget = threads_of(threads), parse_memory(memory)  # before inputs are looked at
        folder = None if output is None else path_of("output", output)
        keep = None if intermediate_dir is None else path_of("intermediate_dir", intermediate_dir)

        def merge(planned: MergePlan, folder: Path | None, *, resumable: bool = True) -> MergeResult:
            notes: list[str] = []
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
                    return merge_to_folder(
                        scheduled, folder, chosen, access, notes, progress, overwrite, resumable
                    )
                sink = MemorySink(planned)
                done = carry_out(scheduled, chosen, access, sink, None, progress)
                result = result_of(planned, done.results, done.trimmed_to, done.ledger, [*notes, *done.notes])
                result.tensors = sink.tensors
                return result

        if isinstance(recipe, MergePlan):
            if any(each.digest is None for each in recipe.intermediates):
                raise OptionError("recipe: a plan of several recipes cannot be run; give the recipes instead")
            return merge(recipe, folder)
        options = _plan_options(shard_size, overwrite, lenient)
        lazy = switch_of("lazy", lazy)
        recipes = (
            recipe
            if isinstance(recipe, tuple)
            else load_recipes(recipe, lenient=lenient, check_method=find_method)
        )
        if len(recipes) == 1:
            return merge(make_plan(recipes[0], folder, **options), folder)
        from merge_engine.engine import documents

        settings = documents.DocumentOptions(**options, keep=keep, lazy=lazy)
        documents.check_result(recipes, settings)
        return documents.merge_documents(recipes, folder, settings, merge)


def _plan_options(shard_size: object, overwrite: object, lenient: object) -> dict[str, Any]:
    """Checked arguments of ``make_plan``. Raises ``OptionError``."""
    return {
        "shard_size": size_of(shard_size, "shard_size"),
        "overwrite": switch_of("overwrite", overwrite),
        "lenient": switch_of("lenient", lenient),
    }


def merge_to_folder(
    scheduled: Schedule,
    output: Path,
    backend: Backend,
    access: Access,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
    overwrite: bool = False,
    resumable: bool = True,
) -> MergeResult:
    """Carry out a schedule, write the output, and publish it. Raises as ``run`` does.

    Shards that an interrupted merge of the same plan left complete are not merged again, if it was ``resumable``.
    """
    scheduled = _in_few_shards(scheduled, output)
    planned = scheduled.plan
    side_files = side_files_of(planned)
    collected = Collected(planned)
    recorder = Recorder(collected.digests)
    writer = CheckpointWriter(
        output,
        planned.shards,
        key=plan_key(planned) if resumable else "",
        overwrite=overwrite,
        record=recorder,
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
    return None if memory is None else size_of(memory, "memory")


def size_of(value: Any, name: str) -> int:
    """Bytes of the argument ``name``, a number or text such as "400MB". Raises ``OptionError`` if it is no size."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise OptionError(f"{name}: {error}") from None
