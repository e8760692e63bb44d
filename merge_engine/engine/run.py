"""Plan, stream, publish: a whole merge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merge_engine.backends import Backend, create_backend
from merge_engine.checkpoint import (
    DEFAULT_SHARD_SIZE,
    MANIFEST_NAME,
    CheckpointWriter,
    carried_files,
    merged_config,
    parse_size,
)
from merge_engine.engine.ledger import Ledger, reading_counted
from merge_engine.engine.limits import Limits, load_limits
from merge_engine.engine.manifest import encode_card, encode_manifest
from merge_engine.engine.merging import Merger
from merge_engine.engine.plan import DEFAULT_MEMORY, Plan, make_plan
from merge_engine.engine.reading import Reading, choose_reading
from merge_engine.engine.result import MergeResult
from merge_engine.engine.sinks import Digests, MemorySink, Sink
from merge_engine.engine.stream import Stream
from merge_engine.engine.usage import Usage, account, predict, remember
from merge_engine.errors import DeviceMemoryError, PlanError
from merge_engine.recipe import Recipe, load_recipe

SMALLEST_DEVICE_MEMORY = 16 << 20
"""Bytes of tensor data at a time that a device must have room for."""

Progress = Callable[[int], None]
RecipeSource = str | Path | Mapping[str, Any] | Recipe


def plan(
    recipe: RecipeSource,
    output: str | Path | None = None,
    *,
    memory: int | str = DEFAULT_MEMORY,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Plan:
    """Plan a merge without reading or writing tensor data. Takes the arguments of ``run``.

    Returns the plan, which holds the inputs open: close it. Raises ``RecipeError``, ``CheckpointError`` or
    ``PlanError`` with every problem that would keep the merge from working.
    """
    return make_plan(
        load_recipe(recipe),
        Path(output) if output is not None else None,
        shard_size=_size(shard_size, "shard_size"),
        memory=_size(memory, "memory"),
        overwrite=overwrite,
    )


def run(
    recipe: RecipeSource,
    output: str | Path | None = None,
    *,
    device: str = "auto",
    backend: str | Backend = "auto",
    threads: int | None = None,
    memory: int | str = DEFAULT_MEMORY,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge checkpoints as a recipe says.

    ``recipe``: YAML text, a path, a mapping or a ``Recipe``. ``output``: the folder to write; without one the merged
    tensors are returned in memory. ``memory``: bytes of tensor data held at a time (or text such as "400MB"; the
    result never depends on it), on the host and as much on a device. ``shard_size``: bytes per output file.
    ``device``, ``backend`` (a name, or one made before) and ``threads``: see ``create_backend``. ``overwrite``:
    replace an earlier output in the folder. ``on_plan`` is called with the plan before work starts, ``progress``
    with the number of input bytes each finished step has processed.

    Raises ``MergeError``: ``RecipeError``, ``CheckpointError``, ``PlanError`` before anything is written,
    ``NonFiniteError`` for NaN or infinity in an input, ``OutputError`` when writing fails. After an error the
    output folder holds nothing that could be taken for a model.
    """
    notes: list[str] = []
    chosen = backend if isinstance(backend, Backend) else create_backend(backend, threads, device, notes)
    planned = plan(recipe, output, memory=memory, shard_size=shard_size, overwrite=overwrite)
    planned.depth = chosen.depth
    planned.notes += notes
    try:
        limits = load_limits()
        reading = choose_reading(planned, chosen)
        if on_plan is not None:
            on_plan(planned)
        target = Path(output) if output is not None else None
        predicted = predict(planned, target, limits, reading, chosen, threads)
        if target is not None:
            result = _to_folder(planned, target, chosen, progress, limits, reading, predicted)
        else:
            sink = MemorySink(planned)
            result = _stream(planned, chosen, reading, sink, None, progress)
            result.tensors = sink.tensors
            result.predicted = predicted
            result.usage = account(planned, None, limits, reading, chosen, result.ledger)
        remember(planned, chosen, threads, result.ledger)
        return result
    finally:
        planned.close()


def _stream(
    planned: Plan,
    backend: Backend,
    reading: Reading,
    sink: Sink,
    digests: Digests | None,
    progress: Progress | None,
) -> MergeResult:
    ledger, merger = Ledger(), Merger(planned, backend)
    start = time.perf_counter()
    with reading_counted(ledger):
        report = progress or (lambda _: None)
        _fitting(planned, backend, reading, merger, sink, digests, ledger, report).run()
    ledger.seconds = time.perf_counter() - start
    labels = {i: str(planned.recipe.models[i].model) for i in planned.models}
    results = list(merger.results.values())
    return MergeResult(None, None, results, labels, ledger, planned.notes, merger.trimmed_to)


def _fitting(planned: Plan, backend: Backend, *arguments: Any) -> Stream:
    """A stream that the device has memory for. Less memory means smaller pieces, never another result."""
    while True:
        try:
            return Stream(planned, backend, *arguments)
        except DeviceMemoryError:
            if planned.memory // 2 < SMALLEST_DEVICE_MEMORY:
                raise
            planned.memory //= 2
            planned.notes.append(
                f"the device is short of memory: working with {planned.memory / 2**20:,.0f} MiB at a time"
            )


def _to_folder(
    planned: Plan,
    output: Path,
    backend: Backend,
    progress: Progress | None,
    limits: Limits,
    reading: Reading,
    predicted: Usage,
) -> MergeResult:
    with CheckpointWriter(output, planned.shards) as writer:
        digests = Digests()
        result = _stream(planned, backend, reading, writer, digests, progress)
        result.output = output
        ledger = result.ledger
        start = time.perf_counter()
        side_files = _side_files(planned)
        for name, data in side_files.items():
            writer.add_file(name, data)
        writer.add_file("README.md", encode_card(planned, result, digests.by_name()))
        writer.flush()
        ledger.publish.seconds = time.perf_counter() - start
        ledger.seconds += ledger.publish.seconds
        result.predicted, result.usage = predicted, account(planned, output, limits, reading, backend, ledger)
        manifest = encode_manifest(planned, result, backend, digests.by_name(), [*side_files, "README.md"])
        writer.add_file(MANIFEST_NAME, manifest)
        writer.finish()
    return result


def _side_files(planned: Plan) -> dict[str, bytes]:
    """Config, tokenizer and the like of the donor, with the output's dtype in the config."""
    files = {name: path.read_bytes() for name, path in carried_files(planned.donor.path).items()}
    if "config.json" in files:
        dtypes = {job.out for job in planned.jobs if job.out.mergeable}
        written = planned.recipe.output_dtype or (dtypes.pop() if len(dtypes) == 1 else None)
        config = merged_config(planned.donor.config, written, planned.untied)
        files["config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    return files


def _size(value: int | str, name: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise PlanError([f"{name}: {error}"]) from None
