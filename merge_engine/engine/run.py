"""Plan, schedule, stream, publish: a whole merge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_engine.arguments import path_of, switch_of, threads_of
from merge_engine.backends import Backend
from merge_engine.checkpoint import (
    DEFAULT_SHARD_SIZE,
    MANIFEST_NAME,
    CheckpointTransaction,
    CheckpointWriter,
    carried_files,
    merged_config,
    parse_size,
)
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.collecting import seldom_collected
from merge_engine.engine.measuring import SharedAnswers
from merge_engine.engine.pipeline import Pipeline
from merge_engine.engine.scheduling import SMALLEST_DEVICE_MEMORY, open_access, schedule_for
from merge_engine.engine.sinks import MemorySink, Sink
from merge_engine.engine.work import Run
from merge_engine.errors import DeviceMemoryError, OptionError, PlanError
from merge_engine.methods import Answers, Task
from merge_engine.observe.card import encode_card
from merge_engine.observe.digests import Digests, model_digest
from merge_engine.observe.ledger import Ledger, reading_counted
from merge_engine.observe.manifest import MergedInput, encode_manifest
from merge_engine.observe.result import MergeResult, TensorResult
from merge_engine.operands import Access
from merge_engine.planning import MergePlan, Schedule, make_plan
from merge_engine.recipe import Recipe, load_recipe

Progress = Callable[[int], None]
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
    with seldom_collected:
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
                return merge_to_folder(scheduled, folder, chosen, access, notes, progress)
            sink = MemorySink(planned)
            done = carry_out(scheduled, chosen, access, sink, None, progress)
            result = result_of(planned, done.results, done.trimmed_to, done.ledger, [*notes, *done.notes])
            result.tensors = sink.tensors
            return result


def carry_out(
    scheduled: Schedule,
    backend: Backend,
    access: Access,
    sink: Sink | None,
    digests: Digests | None,
    progress: Progress | None = None,
    answered: Callable[[Task, Answers], None] | None = None,
    shared: SharedAnswers | None = None,
) -> Run:
    """Carry out a schedule.

    ``sink`` takes the merged bytes. ``answered`` is called with each tensor that is only measured, and its answers.
    ``shared`` has the answers to the shared needs, if they are known already. If the device has too little memory,
    the plan is scheduled again for half of it, and so on. Raises as ``run`` does.
    """
    ledger = Ledger()
    notes: list[str] = []
    start = time.perf_counter()
    with reading_counted(ledger):
        while True:
            run = Run(scheduled, backend, ledger, notes, answered, shared)
            try:
                pipeline = Pipeline(scheduled, run, access, sink, digests, progress or (lambda nbytes: None))
            except DeviceMemoryError as short:
                memory = scheduled.budget.memory // 2
                if memory < SMALLEST_DEVICE_MEMORY:
                    raise
                try:
                    scheduled = scheduled.within(memory)
                except PlanError:  # the smallest piece of some tensor does not fit
                    raise short from None
                notes.append(
                    f"the device is short of memory: working with {memory / 2**20:,.0f} MiB at a time"
                )
                continue
            pipeline.carry_out()
            break
    ledger.seconds = time.perf_counter() - start
    return run


def merge_to_folder(
    scheduled: Schedule,
    output: Path,
    backend: Backend,
    access: Access,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> MergeResult:
    """Carry out a schedule, write the output, and publish it. Raises as ``run`` does."""
    planned = scheduled.plan
    with CheckpointWriter(output, planned.shards) as writer:
        digests = digests_of(planned)
        run = carry_out(scheduled, backend, access, writer, digests, progress)
        result = result_of(planned, run.results, run.trimmed_to, run.ledger, [*notes, *run.notes])
        publish(planned, output, result, backend.name, digests, writer)
    return result


def digests_of(planned: MergePlan) -> Digests:
    """Empty digests for all tensors of a plan."""
    return Digests({t.name: t.nbytes for shard in planned.shards for t in shard.tensors.values()})


def result_of(
    planned: MergePlan,
    results: Mapping[str, TensorResult],
    trimmed_to: Mapping[int, int],
    ledger: Ledger,
    notes: Sequence[str],
) -> MergeResult:
    """The result of a merge. Tensors without elements are never visited, but appear in it."""
    labels = {i: str(planned.recipe.models[i].model) for i in planned.models}
    per_tensor = [results.get(task.name) or TensorResult(task.name, 0) for task in planned.tasks]
    said = [*planned.notes, *notes]
    return MergeResult(None, None, per_tensor, labels, ledger, said, trimmed_to, list(planned.warnings))


def publish(
    planned: MergePlan,
    output: Path,
    result: MergeResult,
    backend: str,
    digests: Digests,
    writer: CheckpointWriter | CheckpointTransaction,
) -> None:
    """Add config, tokenizer, model card and manifest, wait for the disk, and give all files their names.

    Raises ``OutputError``.
    """
    result.output = output
    ledger = result.ledger
    start = time.perf_counter()
    by_name = digests.by_name()
    files = side_files(planned)
    files["README.md"] = encode_card(planned.recipe, result, model_digest(by_name))
    for name, data in files.items():
        writer.add_file(name, data)
    if isinstance(writer, CheckpointWriter):
        writer.flush()
    ledger.publish.seconds = time.perf_counter() - start
    ledger.seconds += ledger.publish.seconds
    manifest = encode_manifest(planned.recipe, _inputs(planned), result, backend, by_name, list(files))
    writer.add_file(MANIFEST_NAME, manifest)
    writer.finish()


def _inputs(planned: MergePlan) -> list[MergedInput]:
    """The inputs as the manifest names them."""
    roles = {"base": planned.base, **{str(i): model for i, model in planned.models.items()}}
    inputs = {given.path: given for given in (planned.donor, planned.base, *planned.models.values()) if given}
    return [
        MergedInput(
            str(path),
            given.fingerprint,
            tuple(role for role, one in roles.items() if one and one.path == path),
        )
        for path, given in inputs.items()
    ]


def side_files(planned: MergePlan) -> dict[str, bytes]:
    """Config, tokenizer and the like of the donor, with the output's dtype in the config."""
    files = {name: path.read_bytes() for name, path in carried_files(planned.donor.path).items()}
    if "config.json" in files:
        dtypes = {task.out for task in planned.tasks if task.out.mergeable}
        written = planned.recipe.output_dtype or (dtypes.pop() if len(dtypes) == 1 else None)
        config = merged_config(dict(planned.donor.config), written, planned.untied)
        files["config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    return files


def parse_memory(memory: int | str | None) -> int | None:
    """Bytes of a memory budget, None for the default. Raises ``OptionError`` if it is no size."""
    return None if memory is None else _size(memory, "memory")


def _size(value: int | str, name: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise OptionError(f"{name}: {error}") from None
