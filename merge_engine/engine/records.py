"""The result of a shard, as another process sends it and as an interrupted merge finds it again.

An output folder keeps the result of every complete shard as a record beside it, under the key of the plan. A merge
with the same key merges only the other shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from pydantic import ConfigDict, TypeAdapter, ValidationError

from merge_engine.checkpoint import CheckpointTransaction, CheckpointWriter, ShardLayout
from merge_engine.engine.answers import SharedAnswers
from merge_engine.engine.runs import Run
from merge_engine.errors import CheckpointError, MergeError, NonFiniteError, OutputError, PlanError
from merge_engine.observe.digests import Digests
from merge_engine.observe.result import TensorResult
from merge_engine.observe.versions import versions
from merge_engine.planning import MergePlan
from merge_engine.storage import File

ARITHMETIC = 2
"""It grows with every change of the bytes that a plan gives, or of the records."""


@dataclass(frozen=True)
class ShardResult:
    """The result of a shard: its name, counts by tensor, the digests of all blocks by tensor, and the backend's name.

    ``trimmed_to`` is that of the run so far (see ``Run``). ``shared`` are the answers to the shared needs, if there
    are any and they are known.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", ser_json_bytes="hex", val_json_bytes="hex")

    shard: str
    results: Mapping[str, TensorResult]
    trimmed_to: Mapping[int, int]
    blocks: Mapping[str, Mapping[int, bytes]]
    notes: Sequence[str]
    backend: str
    shared: SharedAnswers | None = None

    @classmethod
    def of(cls, shard: ShardLayout, run: Run, digests: Digests) -> ShardResult:
        """The result of a shard that a run has merged and digested."""
        results = {name: run.results[name] for name in shard.tensors if name in run.results}
        blocks = digests.blocks(shard.tensors)
        return cls(
            shard.name,
            results,
            dict(run.trimmed_to),
            blocks,
            list(run.notes),
            run.backend.name,
            run.decided,
        )

    def encode(self) -> bytes:
        """The result as JSON."""
        return _adapter().dump_json(self)

    @classmethod
    def decode(cls, record: bytes) -> ShardResult:
        """The result from its JSON. Raises ``OutputError`` for anything else."""
        try:
            return _adapter().validate_json(record)
        except ValidationError as error:
            raise OutputError(
                f"the record of a complete shard cannot be read ({error.error_count()} faults); remove the *.part "
                "files from the output folder"
            ) from error


class Recorder:
    """Makes the record of a shard of ``run`` once it is on the disk. The counts are there before the bytes."""

    def __init__(self, digests: Digests):
        _adapter()  # while there is memory: where there is none, pydantic's core ends the process
        self._digests = digests
        self.run: Run | None = None

    @property
    def failed(self) -> bool:
        """Whether the recipe of the run was the reason for an error."""
        return self.run is not None and self.run.failed

    def __call__(self, shard: ShardLayout) -> bytes:
        """Wait until the shard is digested, and return its record.

        Raises ``OutputError`` if the run has failed before.
        """
        assert self.run is not None
        self._digests.wait_for(shard.tensors)
        return ShardResult.of(shard, self.run, self._digests).encode()


class Collected:
    """The results of shards put together: of this run, of other processes, of an earlier run."""

    def __init__(self, plan: MergePlan):
        self.digests = Digests({t.name: t.nbytes for shard in plan.shards for t in shard.tensors.values()})
        self.results: dict[str, TensorResult] = {}
        self.trimmed_to: dict[int, int] = {}
        self.notes: dict[str, None] = {}
        self.backends: dict[str, None] = {}
        self.shared: SharedAnswers | None = None

    def add(self, done: ShardResult) -> None:
        """Add a shard. One that comes twice counts once."""
        self.digests.merge(done.blocks)
        self._add(done.results, done.trimmed_to, done.notes, done.backend)
        self.shared = self.shared or done.shared

    def add_run(self, run: Run) -> None:
        """Add the shards of a run; ``digests`` has their digests."""
        self._add(run.results, run.trimmed_to, run.notes, run.backend.name)

    def _add(
        self,
        results: Mapping[str, TensorResult],
        trimmed_to: Mapping[int, int],
        notes: Iterable[str],
        backend: str,
    ) -> None:
        self.results.update(results)
        self.trimmed_to.update(trimmed_to)
        self.notes.update(dict.fromkeys(notes))
        self.backends[backend] = None


def plan_key(plan: MergePlan) -> str:
    """SHA-256 (hex) over everything that decides the bytes of the shards, and of their records.

    That is the recipe, the inputs, the tensors that each output tensor is made of, the layout of the shards, and this
    version. Files beside the weights are written anew by each run. Neither devices nor memory change a byte. The key is
    empty, and nothing is recorded, for a method from outside of this package: nobody knows whether its code is still
    the same.
    """
    if not type(plan.method).__module__.startswith("merge_engine."):
        return ""
    # What merges the same recipe anew has the same values, but another place and time.
    made = {str(each.folder): f"{each.name} {each.digest}" for each in plan.intermediates}
    described = [
        ARITHMETIC,
        versions()["merge_engine"],
        plan.recipe.to_yaml(),
        [
            [_label(given.label, made), "" if str(given.path) in made else given.fingerprint]
            for given in plan.inputs
        ],
        sorted(
            [str(file.path), file.size, file.mtime_ns, file.inode]
            for file in plan.files
            if str(file.path.parent) not in made
        ),
        [
            [
                task.name,
                task.action.value,
                task.working.name,
                [_label(operand.identity, made) for operand in task.inputs],
            ]
            for task in plan.tasks
        ],
        [[shard.name, hashlib.sha256(shard.header).hexdigest()] for shard in plan.shards],
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _label(label: str, made: Mapping[str, str]) -> str:
    for folder, name in made.items():
        label = label.replace(folder, name)
    return label


@contextmanager
def kept_if_useful(
    writers: Sequence[CheckpointWriter | CheckpointTransaction],
    plans: Sequence[MergePlan],
    failed: Callable[[int], bool] = lambda number: False,
) -> Iterator[None]:
    """After an error give up, and keep the complete shards if the same merge can go on from them.

    ``failed`` says which of several recipes was the reason. The message of the error, or of the interrupt, then says
    what is kept.
    """
    try:
        yield
    except BaseException as error:
        cause = [number for number in range(len(plans)) if failed(number)]
        for number, (writer, plan) in enumerate(zip(writers, plans, strict=True)):
            ends = isinstance(error, (NonFiniteError, PlanError)) and (number in cause or not cause)
            if ends or not all(map(_is_unchanged, plan.files)):
                writer.forget()
            writer.abort()
        if kept := sum(len(writer.kept) for writer in writers):
            shards = sum(len(plan.shards) for plan in plans)
            said = f"{kept} of {shards} shards are complete: the same command goes on from there"
            if isinstance(error, MergeError):
                MergeError.__init__(error, [*error.problems[:-1], f"{error.problems[-1]}; {said}"])
            elif isinstance(error, (KeyboardInterrupt, MemoryError)):
                error.args = (f"{error}; {said}" if str(error) else said,)
        raise


def _is_unchanged(file: File) -> bool:
    try:
        return File.of(file.path) == file
    except CheckpointError:
        return False


@cache
def _adapter() -> TypeAdapter[ShardResult]:
    return TypeAdapter(ShardResult)
