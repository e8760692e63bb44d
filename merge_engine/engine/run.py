"""One merge in this process: plan, schedule, stream, publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merge_engine.arguments import path_of, switch_of
from merge_engine.backends import Backend
from merge_engine.checkpoint import DEFAULT_SHARD_SIZE, parse_size
from merge_engine.engine.carrying import Progress, carry_out
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.publishing import result_of
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.engine.sinks import MemorySink, Target
from merge_engine.engine.to_folders import merge_to_folders
from merge_engine.errors import BackendError, OptionError
from merge_engine.methods import find_method
from merge_engine.observe.result import MergeResult
from merge_engine.planning import MergePlan, Schedule, make_plan
from merge_engine.recipe import RecipeSource, load_recipes


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
    options = plan_options(shard_size, overwrite, lenient)
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
    chosen = choose_backend(plan, None, backend, threads, device)
    with open_access(plan, chosen) as access:
        return schedule_for(plan, access, chosen, parse_memory(memory))


def merge_here(
    planned: MergePlan,
    folder: Path | None,
    *,
    device: str,
    backend: str | Backend,
    threads: int | None,
    memory: int | None,
    overwrite: bool,
    resumable: bool,
    on_schedule: Callable[[Schedule], None] | None,
    progress: Progress | None,
) -> MergeResult:
    """Carry out one plan in this process. For the arguments see ``run``; ``resumable``: see ``documents.Merge``."""
    notes: list[str] = []
    chosen = choose_backend(planned, folder, backend, threads, device, notes)
    with open_access(planned, chosen) as access:
        scheduled = schedule_for(planned, access, chosen, memory)
        if on_schedule is not None:
            on_schedule(scheduled)
        if folder is not None:
            (result,) = merge_to_folders(
                scheduled, [folder], chosen, access, notes, progress, overwrite, resumable
            )
            return result
        sink = MemorySink(planned)
        (done,) = carry_out(scheduled, chosen, access, [Target(sink)], progress)
        result = result_of(planned, done.results, done.trimmed_to, done.ledger, [*notes, *done.notes])
        result.tensors = sink.tensors
        return result


def plan_options(shard_size: object, overwrite: object, lenient: object) -> dict[str, Any]:
    """Checked arguments of ``make_plan``. Raises ``OptionError``."""
    return {
        "shard_size": _size(shard_size, "shard_size"),
        "overwrite": switch_of("overwrite", overwrite),
        "lenient": switch_of("lenient", lenient),
    }


@contextmanager
def naming_memory() -> Iterator[None]:
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


def _size(value: Any, name: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise OptionError(f"{name}: {error}") from None
