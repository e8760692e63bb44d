"""Plan, schedule, stream, publish: a whole merge."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from merge_engine.arguments import path_of, switch_of, threads_of
from merge_engine.backends import Backend
from merge_engine.checkpoint import DEFAULT_SHARD_SIZE, parse_size
from merge_engine.engine.carrying import Progress, carry_out
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.collecting import seldom_collected
from merge_engine.engine.publishing import result_of
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.engine.sinks import MemorySink, Target
from merge_engine.engine.to_folders import merge_to_folders
from merge_engine.errors import BackendError, OptionError
from merge_engine.methods import find_method
from merge_engine.observe.result import MergeResult
from merge_engine.planning import MergePlan, Schedule, make_plan
from merge_engine.recipe import Recipe, RecipeSource, load_recipes

if TYPE_CHECKING:
    from merge_engine.distributed.options import RayOptions
    from merge_engine.distributed.running import OnRay


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
    engine: Literal["local", "ray"] = "local",
    ray: RayOptions | str | None = None,
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

    ``engine="ray"`` merges shard by shard on the nodes of a Ray cluster, with the same bytes. ``ray`` is its address,
    or ``RayOptions``; by default it is the cluster that runs on this machine. ``threads`` and ``memory`` are then those
    of each worker, and several recipes need an ``intermediate_dir`` that all nodes see.

    Raises ``MergeError``: ``OptionError``, ``RecipeError``, ``CheckpointError``, ``PlanError``, ``BackendError`` or
    ``ClusterError`` before anything is written, ``CheckpointError`` for an input that changes or cannot be read,
    ``NonFiniteError`` for NaN or infinity in an input or output, ``OutputError`` when writing fails, ``ClusterError``
    when all nodes are lost. After an error the output folder holds its earlier output or no model.
    """
    with seldom_collected, naming_memory(), ExitStack() as stack:
        threads, budget = threads_of(threads), parse_memory(memory)  # before inputs are looked at
        folder = None if output is None else path_of("output", output)
        keep = None if intermediate_dir is None else path_of("intermediate_dir", intermediate_dir)

        nodes = _cluster(engine, ray, device, backend, threads, budget)
        if nodes is not None:
            stack.enter_context(nodes)

        def merge(planned: MergePlan, folder: Path | None, *, resumable: bool = True) -> MergeResult:
            if nodes is not None:
                return nodes.merge(
                    planned, folder, overwrite=overwrite, on_schedule=on_schedule, progress=progress
                )
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
                    (result,) = merge_to_folders(
                        scheduled, [folder], chosen, access, notes, progress, overwrite, resumable
                    )
                    return result
                sink = MemorySink(planned)
                (done,) = carry_out(scheduled, chosen, access, [Target(sink)], progress)
                result = result_of(planned, done.results, done.trimmed_to, done.ledger, [*notes, *done.notes])
                result.tensors = sink.tensors
                return result

        if isinstance(recipe, MergePlan):
            if any(each.digest is None for each in recipe.intermediates):
                raise OptionError("recipe: a plan of several recipes cannot be run; give the recipes instead")
            return merge(recipe, folder)
        options = plan_options(shard_size, overwrite, lenient)
        lazy = switch_of("lazy", lazy)
        recipes = (
            recipe
            if isinstance(recipe, tuple)
            else load_recipes(recipe, lenient=lenient, check_method=find_method)
        )
        if len(recipes) == 1:
            return merge(make_plan(recipes[0], folder, **options), folder)
        if nodes is not None and keep is None:
            raise OptionError(
                "intermediate_dir: with engine ray several recipes need one, a folder that all nodes see"
            )
        from merge_engine.engine import documents

        settings = documents.DocumentOptions(**options, keep=keep, lazy=lazy)
        documents.check_result(recipes, settings)
        return documents.merge_documents(recipes, folder, settings, merge)


def _cluster(
    engine: object,
    ray: RayOptions | str | None,
    device: str,
    backend: str | Backend,
    threads: int | None,
    memory: int | None,
) -> OnRay | None:
    """What merges on a cluster; None for a merge in this process. Raises ``OptionError`` and ``ClusterError``."""
    if engine not in ("local", "ray"):
        raise OptionError(f"engine: must be local or ray, not {reprlib.repr(engine)}")
    if engine == "local":
        if ray is not None:
            raise OptionError("ray: is for engine ray only")
        return None
    # The package stands above this one, and only such a merge uses it.
    from merge_engine.distributed.options import ray_options
    from merge_engine.distributed.running import OnRay

    return OnRay(ray_options(ray), device, backend, threads, memory)


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
