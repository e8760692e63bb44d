"""Plan first: from headers alone, know every tensor, every output byte's place, and what cannot work.

Nothing is read but headers and configs, and nothing is written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from merge_engine.backends.base import SUM_BLOCK
from merge_engine.backends.operations import Line
from merge_engine.checkpoint import (
    Checkpoint,
    OutputTensor,
    ShardLayout,
    check_output_folder,
    locate,
    open_checkpoint,
    plan_shards,
)
from merge_engine.dtypes import DType
from merge_engine.engine.tasks import Catalogue, TensorJob, TensorType, make_jobs
from merge_engine.errors import CheckpointError, PlanError
from merge_engine.methods import Method, find_method
from merge_engine.recipe import ModelReference, Recipe
from merge_engine.storage.memory import PAGE, aligned

DEFAULT_MEMORY = 400_000_000
"""Bytes of tensor data that a run holds at a time, by default."""

_CACHED = 8 << 20
"""Bytes of output that a tensor is cut into where inputs take no memory: little for a processor's cache."""

BATCH = 4 << 20
"""Bytes of small visits that go together: handing each of them from thread to thread would take longer than it."""

PIECE = 16 << 20
"""Bytes of inputs and output that a tensor is cut into: much for a disk, little for a processor's cache."""

_PIECES = 8  # at least so many fill the memory: the first is soon read
_PIECES_AT_ONCE = 4  # less would let disks wait that are fast and answer late


@dataclass(frozen=True)
class _Inputs:
    """Where a tensor's inputs are, their types, and the bits that one element takes in all of them."""

    sources: list[tuple[Checkpoint, str]]
    dtypes: list[DType]
    bits: int


class _Measuring(NamedTuple):
    """Statistics of a tensor that are measured before it is merged: how many, and whether they take notes."""

    statistics: int
    notes: bool


class RingBytes(NamedTuple):
    """Memory for inputs and for outputs."""

    inputs: int
    outputs: int


@dataclass
class Plan:
    """A merge that can start: inputs are open, every output tensor has its place.

    ``bytes_read`` counts every pass over the inputs, ``bytes_written`` tensor data alone. ``memory`` is what
    tensor data takes at most, in bytes, ``depth`` how many visits the backend works on at a time. ``in_place`` says
    that inputs are read where the system has them, and take none of it. ``notes`` are worth telling the user. Close it
    when done.
    """

    recipe: Recipe
    method: Method
    base: Checkpoint | None
    models: Mapping[int, Checkpoint]
    donor: Checkpoint
    jobs: list[TensorJob]
    shards: list[ShardLayout]
    memory: int
    depth: int = 1
    in_place: bool = False
    notes: list[str] = field(default_factory=list)
    untied: bool = False
    _inputs: dict[str, _Inputs] = field(default_factory=dict, repr=False)  # asked for again and again
    _measuring: dict[str, _Measuring] = field(default_factory=dict, repr=False)  # this too
    _chunk_elements: dict[tuple[str, int, int, bool], int] = field(default_factory=dict, repr=False)

    def inputs(self, job: TensorJob) -> list[tuple[Checkpoint, str]]:
        """Where a tensor's inputs are: the base first, if the method uses one, then the models in order."""
        return self._inputs_of(job).sources

    def input_dtypes(self, job: TensorJob) -> list[DType]:
        """The types that a tensor's inputs are stored in."""
        return self._inputs_of(job).dtypes

    def _inputs_of(self, job: TensorJob) -> _Inputs:
        if job.name not in self._inputs:
            sources = [(self.models[i], name) for i, name in job.models.items()]
            if self.base is not None and job.base is not None:
                sources.insert(0, (self.base, job.base))
            dtypes = [checkpoint.tensors[name].dtype for checkpoint, name in sources]
            self._inputs[job.name] = _Inputs(sources, dtypes, sum(dtype.bits for dtype in dtypes))
        return self._inputs[job.name]

    def span_bytes(self, job: TensorJob, count: int) -> int:
        """Memory that ``count`` elements take in all inputs and the output."""
        return (self._input_bits(job) + job.out.bits) * count // 8

    def _input_bits(self, job: TensorJob) -> int:
        """Memory that an element takes in all inputs."""
        return 0 if self.in_place else self._inputs_of(job).bits

    def chunks(self, job: TensorJob) -> Iterator[tuple[int, int]]:
        """(start, count) of the pieces that the tensor is streamed in."""
        total, step = job.count, self.chunk_elements(job)
        for start in range(0, total, step):
            yield start, min(step, total - start)

    def chunk_elements(self, job: TensorJob) -> int:
        """Elements of a chunk: all of the tensor if it is small, or if something must be measured before it is merged
        and the memory holds it beside the next one, so that it is read only once; otherwise a multiple of what
        must stay together.
        """
        asked = job.name, self.memory, self.depth, self.in_place
        if asked not in self._chunk_elements:
            self._chunk_elements[asked] = self._divide(job)
        return self._chunk_elements[asked]

    def _divide(self, job: TensorJob) -> int:
        total = job.count
        scratch = self.method.scratch_bytes(len(job.models)) if job.task is not None else 0
        blocks = min(self.memory // _PIECES, self._piece) // self.span_bytes(job, SUM_BLOCK)
        if scratch:
            blocks = min(blocks, self.memory // _PIECES // (scratch * SUM_BLOCK))
        fitting = max(blocks, 1) * SUM_BLOCK
        held = (self.depth + 1) * self.span_bytes(job, total) + scratch * total
        if total <= fitting or (held <= self.memory and self._measured(job).statistics and not self.in_place):
            return max(total, 1)
        unit = SUM_BLOCK
        if self.method.whole_lines and job.task is not None:
            line = Line.of(job.shape)
            unit = min(math.lcm(SUM_BLOCK, line.length * line.stride), total)
        return max(fitting // unit, 1) * unit

    @property
    def _piece(self) -> int:
        """Bytes that a tensor is cut into, if it is."""
        return _CACHED if self.in_place else PIECE

    @property
    def scratch_bytes(self) -> int:
        """Memory that the backend needs beside inputs and outputs."""
        tasks = [job for job in self.jobs if job.task is not None]
        return max(
            (self.method.scratch_bytes(len(job.models)) * self.chunk_elements(job) for job in tasks),
            default=0,
        )

    @property
    def largest_chunk(self) -> RingBytes:
        """The most that the inputs and the output of one chunk take."""
        inputs = outputs = 0
        for job in self.jobs:
            count = min(self.chunk_elements(job), job.count)
            inputs = max(inputs, self._input_bits(job) * count // 8)
            outputs = max(outputs, job.out.bits * count // 8)
        return RingBytes(inputs, outputs)

    @property
    def ring_bytes(self) -> RingBytes:
        """Memory for a chunk (or batch of small ones) that is read and those that the backend has, and for as many
        outputs, of which one is written, as far as the budget allows. Memory that is not needed is not touched: to
        get it costs time. Every array has pages of its own.
        """
        pages = 2 * PAGE * max((len(self.inputs(job)) for job in self.jobs), default=0)
        largest = self.largest_chunk
        inputs, outputs = largest.inputs + pages, largest.outputs + PAGE
        least = inputs + outputs
        whole = sum(self.span_bytes(job, job.count) + 2**16 for job in self.jobs)
        wanted = min(max((self.depth + 1) * least, _PIECES_AT_ONCE * self._piece), whole)
        total = max(least, min(wanted, self.memory - self.scratch_bytes))
        return RingBytes(*(aligned(part * total // least) for part in (inputs, outputs)))

    @property
    def bytes_read(self) -> int:
        """Bytes that all passes together read."""
        return sum(self.bytes_by_input().values())

    @property
    def bytes_written(self) -> int:
        """Bytes of tensor data in the output."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors.values())

    def input_bytes(self, job: TensorJob) -> int:
        """Bytes of one pass over a tensor's inputs."""
        return sum(checkpoint.tensors[name].nbytes for checkpoint, name in self.inputs(job))

    def bytes_by_input(self) -> Counter[Checkpoint]:
        """Bytes that all passes together read from each input."""
        counts: Counter[Checkpoint] = Counter()
        for job in self.jobs:
            passes = self.passes(job)
            for checkpoint, name in self.inputs(job):
                counts[checkpoint] += passes * checkpoint.tensors[name].nbytes
        return counts

    def passes(self, job: TensorJob) -> int:
        """How often a tensor's inputs are read: once if it fits in memory, else once for every statistic too."""
        if job.task is None:
            return 1
        share = self.method.share([job.task])
        shared = 0 if share is None else len(share.statistics)
        once = self.chunk_elements(job) >= job.count or self.measures_whole(job)
        return shared + 1 + (0 if once else self._measured(job).statistics)

    def measures_whole(self, job: TensorJob) -> bool:
        """Whether a tensor that is cut is measured whole: its inputs take no memory, and notes of them little."""
        notes = job.count * len(job.models) // 8 if self._measured(job).notes else 0
        return self.in_place and notes <= self.memory // _PIECES

    def _measured(self, job: TensorJob) -> _Measuring:
        """What of a tensor is measured before it is merged, beside what all tensors share."""
        if job.task is None:
            return _Measuring(0, False)
        if job.name not in self._measuring:
            statistics = self.method.program(job.task, self.method.share([job.task])).statistics
            self._measuring[job.name] = _Measuring(len(statistics), any(s.notes for s in statistics))
        return self._measuring[job.name]

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the inputs."""
        for checkpoint in {id(c): c for c in (self.base, self.donor, *self.models.values()) if c}.values():
            checkpoint.close()


def make_plan(
    recipe: Recipe,
    output: Path | None,
    *,
    shard_size: int,
    memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
) -> Plan:
    """Open the inputs and plan their merge into a folder (None: into memory).

    Raises ``RecipeError`` for a recipe that asks for the impossible, ``CheckpointError`` for inputs that
    cannot be read, and ``PlanError`` with every other problem at once.
    """
    method = find_method(recipe.merge_method)
    opened = _open_all(recipe)
    try:
        return _plan(recipe, method, opened, output, shard_size, memory, overwrite)
    except BaseException:
        for checkpoint in opened.values():
            checkpoint.close()
        raise


def _open_all(recipe: Recipe) -> dict[ModelReference, Checkpoint]:
    """Every input once, however often it is named."""
    opened: dict[ModelReference, Checkpoint] = {}
    problems = []
    references = [entry.model for entry in recipe.models]
    if recipe.base_model is not None:
        references.insert(0, recipe.base_model)
    for reference in dict.fromkeys(references):
        try:
            opened[reference] = open_checkpoint(locate(reference.path, reference.revision))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        for checkpoint in opened.values():
            checkpoint.close()
        raise CheckpointError("\n".join(problems))
    return opened


def _plan(
    recipe: Recipe,
    method: Method,
    opened: Mapping[ModelReference, Checkpoint],
    output: Path | None,
    shard_size: int,
    memory: int,
    overwrite: bool,
) -> Plan:
    base = None
    if method.uses_base:
        if recipe.base_model is None:
            raise PlanError(
                [f"{method.name} needs a base_model: add the model that the others were tuned from"]
            )
        base = opened[recipe.base_model]
    models = {i: opened[entry.model] for i, entry in enumerate(recipe.models)}
    if base is not None:  # a base listed among the models is still the base
        models = {i: model for i, model in models.items() if model is not base}
    donor = opened[recipe.base_model or recipe.models[0].model]
    jobs = make_jobs(
        recipe,
        method,
        None if base is None else _catalogue(base),
        {i: _catalogue(model) for i, model in models.items()},
    )
    order = {name: place for place, name in enumerate(_reading_order(donor))}
    jobs.jobs.sort(key=lambda job: order.get(job.name, len(order)))
    shards = plan_shards([OutputTensor(job.name, job.out, job.shape) for job in jobs.jobs], shard_size)
    plan = Plan(recipe, method, base, models, donor, jobs.jobs, shards, memory, notes=jobs.notes)
    plan.untied = jobs.untied and _tied(donor) is not False
    problems = jobs.problems + _memory_problems(plan)
    if output is not None:
        folders = [checkpoint.path for checkpoint in opened.values()]
        problems += check_output_folder(output, folders, overwrite, sum(shard.size for shard in shards))
    if problems:
        raise PlanError(problems)
    return plan


def _reading_order(donor: Checkpoint) -> list[str]:
    """Tensors as they follow each other in the donor's files, so that reads are sequential."""
    return sorted(donor.tensors, key=lambda name: (str(donor.file_of(name)), donor.tensors[name].start))


def _catalogue(checkpoint: Checkpoint) -> Catalogue:
    tensors = {name: TensorType(info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    return Catalogue(str(checkpoint.path), tensors, _tied(checkpoint))


def _tied(checkpoint: Checkpoint) -> bool | None:
    """Whether the head is the embedding, as far as the config says; some model classes tie without a word."""
    text = checkpoint.config.get("text_config")
    for section in (checkpoint.config, text if isinstance(text, dict) else {}):
        if "tie_word_embeddings" in section:
            return bool(section["tie_word_embeddings"])
    return None


def _memory_problems(plan: Plan) -> list[str]:
    needed = sum(plan.largest_chunk) + plan.scratch_bytes
    if needed <= plan.memory:
        return []
    largest = max(plan.jobs, key=lambda job: plan.span_bytes(job, plan.chunk_elements(job)))
    return [
        f"{largest.name}: at least {needed / 2**20:.1f} MiB of it must be in memory at a time, but the memory "
        f"budget is {plan.memory / 2**20:.1f} MiB; raise it"
    ]
