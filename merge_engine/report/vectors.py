"""Norms of the task vectors and the angles between them, from one more read of the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path

from merge_engine.backends import Backend, create_backend
from merge_engine.backends.operations import Chunk
from merge_engine.backends.statistics import BlockSums
from merge_engine.engine.discards import Place
from merge_engine.engine.plan import DEFAULT_MEMORY, Plan, make_plan
from merge_engine.engine.tasks import TensorJob
from merge_engine.errors import ReportError
from merge_engine.recipe import ModelReference, Recipe
from merge_engine.report.record import Record

_NOTHING = 1e-13  # of the squared norms that a squared distance is the difference of


@dataclass
class Products:
    """Inner products of the task vectors <d_i, d_j> by recipe positions i <= j, and the base's squared norm."""

    base: float = 0.0
    between: dict[tuple[int, int], float] = field(default_factory=dict)

    def add(self, other: Products) -> None:
        """Add those of another tensor."""
        self.base += other.base
        for pair, product in other.between.items():
            self.between[pair] = self.between.get(pair, 0.0) + product

    def norm(self, model: int) -> float:
        """The L2 norm of a task vector."""
        return math.sqrt(self.between.get((model, model), 0.0))

    def relative_norm(self, model: int) -> float | None:
        """The norm over that of the base's own weights; None where the base is zero."""
        return self.norm(model) / math.sqrt(self.base) if self.base else None

    def cosine(self, one: int, other: int) -> float | None:
        """The cosine of the angle between two task vectors; None where one is zero."""
        norms = self.norm(one) * self.norm(other)
        return self.between[min(one, other), max(one, other)] / norms if norms else None


@dataclass
class TaskVectors:
    """Products over all tensors, and by stack and layer."""

    total: Products = field(default_factory=Products)
    by_layer: dict[tuple[str, int], Products] = field(default_factory=dict)


def measure(record: Record, on_plan: Callable[[Plan], None], progress: Callable[[int], None]) -> TaskVectors:
    """Read the inputs of a merge again.

    Needs memory for one chunk of every input at a time. Raises ``ReportError`` when an input is not where it
    was or has been rewritten since, and other ``MergeError`` when it cannot be read.
    """
    backend, result = create_backend("cpu"), TaskVectors()
    with make_plan(_at_paths(record), None, shard_size=2**62, memory=DEFAULT_MEMORY) as plan:
        on_plan(plan)
        for checkpoint in (plan.base, *plan.models.values()):
            if checkpoint and record.inputs[str(checkpoint.path)].fingerprint != checkpoint.fingerprint():
                raise ReportError(f"{checkpoint.path}: has been rewritten since it was merged")
        for job in plan.jobs:
            if job.task is not None:
                products = _products(plan, job, backend)
                result.total.add(products)
                place = Place.of(job.name)
                if place.layer is not None:
                    result.by_layer.setdefault((place.stack, place.layer), Products()).add(products)
            progress(plan.input_bytes(job))
    return result


def _at_paths(record: Record) -> Recipe:
    """The recipe with the paths that its inputs had, so that a name on the hub is not fetched anew."""
    paths = {role: path for path, entry in record.inputs.items() for role in entry.roles}
    missing = [path for path in paths.values() if not Path(path).exists()]
    if missing:
        raise ReportError(
            f"{missing[0]}: no longer there, seen from the folder that this command is started in"
        )
    if not {"base", *map(str, record.labels)} <= paths.keys():
        raise ReportError("the manifest does not say which input was what")
    # A model without a role of its own is the base, listed once more.
    models = tuple(
        entry.model_copy(update={"model": ModelReference(path=paths.get(str(i), paths["base"]))})
        for i, entry in enumerate(record.recipe.models)
    )
    base = ModelReference(path=paths["base"])
    return record.recipe.model_copy(update={"models": models, "base_model": base})


def _products(plan: Plan, job: TensorJob, backend: Backend) -> Products:
    """From the Gram matrix of all inputs: <x - b, y - b> = <x, y> - <x, b> - <y, b> + <b, b>.

    The matrix is summed in double, and exactly so for each product of two 32-bit values; what the difference
    loses of a task vector a thousandth of its base's size is in the tenth digit.
    """
    models = list(job.models)
    n = len(models) + 1
    pairs = list(combinations_with_replacement(range(n), 2))
    sums = BlockSums(len(pairs), ())
    for chunk in _chunks(plan, job, backend):
        sums = sums.merge(backend.fetch(backend.gram(chunk)))
    inner = dict(zip(pairs, sums.totals(), strict=True))
    base = inner[0, 0]

    def between(i: int, j: int) -> float:
        product = inner[i, j] - inner[0, i] - inner[0, j] + base
        return product if abs(product) > _NOTHING * (inner[i, i] + inner[j, j] + base) else 0.0

    return Products(
        base, {(models[i - 1], models[j - 1]): between(i, j) for i in range(1, n) for j in range(i, n)}
    )


def _chunks(plan: Plan, job: TensorJob, backend: Backend) -> Iterator[Chunk]:
    inputs, types = plan.inputs(job), plan.input_dtypes(job)
    for start, count in plan.chunks(job):
        arrays = []
        for (checkpoint, name), dtype in zip(inputs, types, strict=True):
            memory = memoryview(bytearray(count * dtype.itemsize))
            checkpoint.read_into(name, start * dtype.itemsize, memory)
            arrays.append(backend.array(memory, dtype))
        yield Chunk(arrays, True, job.working, start, count)
