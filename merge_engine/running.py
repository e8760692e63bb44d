"""``run``: the merges of a recipe file, in this process or on a cluster."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from merge_engine.arguments import path_of, switch_of, threads_of
from merge_engine.backends import Backend
from merge_engine.checkpoint import DEFAULT_SHARD_SIZE
from merge_engine.distributed.options import RayOptions, ray_options
from merge_engine.engine.carrying import Progress
from merge_engine.engine.collecting import seldom_collected
from merge_engine.engine.run import merge_here, naming_memory, parse_memory, plan_options
from merge_engine.errors import OptionError
from merge_engine.methods import find_method
from merge_engine.observe.result import MergeResult
from merge_engine.planning import MergePlan, Schedule, make_plan
from merge_engine.recipe import Recipe, RecipeSource, load_recipes


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
        nodes = None
        if _on_ray(engine, ray):
            from merge_engine.distributed.running import OnRay  # seldom needed, and slow to load

            nodes = stack.enter_context(OnRay(ray_options(ray), device, backend, threads, budget))

        def merge(planned: MergePlan, folder: Path | None, *, resumable: bool = True) -> MergeResult:
            if nodes is not None:
                return nodes.merge(
                    planned, folder, overwrite=overwrite, on_schedule=on_schedule, progress=progress
                )
            return merge_here(
                planned,
                folder,
                device=device,
                backend=backend,
                threads=threads,
                memory=budget,
                overwrite=overwrite,
                resumable=resumable,
                on_schedule=on_schedule,
                progress=progress,
            )

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
        from merge_engine.engine import documents  # seldom needed, and slow to load

        settings = documents.DocumentOptions(**options, keep=keep, lazy=lazy)
        documents.check_result(recipes, settings)
        return documents.merge_documents(recipes, folder, settings, merge)


def _on_ray(engine: object, ray: object) -> bool:
    """Whether a cluster merges. Raises ``OptionError``."""
    if engine not in ("local", "ray"):
        raise OptionError(f"engine: must be local or ray, not {reprlib.repr(engine)}")
    if engine == "local" and ray is not None:
        raise OptionError("ray: is for engine ray only")
    return engine == "ray"
