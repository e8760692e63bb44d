"""``run(engine="ray")``: plans merged shard by shard over the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from merge_engine.backends import known_backend
from merge_engine.distributed.connecting import connected, demand_ray
from merge_engine.distributed.crew import Crew
from merge_engine.distributed.mapping import Mapper
from merge_engine.distributed.options import RayOptions
from merge_engine.engine.carrying import Progress
from merge_engine.engine.shards import merge_in_shards
from merge_engine.errors import BackendChoiceError, OptionError
from merge_engine.observe.result import MergeResult
from merge_engine.planning import DEFAULT_MEMORY, Budget, MergePlan, Schedule
from merge_engine.text import counted


class OnRay:
    """Merges plans on a cluster. It connects at the first merge, and ends its workers when the context is left."""

    def __init__(
        self,
        options: RayOptions,
        device: str = "auto",
        backend: object = "auto",
        threads: int | None = None,
        memory: int | None = None,
    ):
        """For all but ``options`` see ``run``. Raises ``OptionError``, and ``ClusterError`` without Ray."""
        if not isinstance(backend, str):
            raise OptionError("backend: with engine ray it must be a name, because each node makes its own")
        if device not in ("auto", "cpu", "cuda"):
            raise BackendChoiceError(
                f"device: with engine ray it must be auto, cpu or cuda, not {device}: Ray gives each worker its GPU"
            )
        self._backend = known_backend(backend)
        self._options = options
        self._device = device
        self._threads = threads
        self._memory = memory
        self._crew: Crew | None = None
        self._stack = ExitStack()
        demand_ray()

    def merge(
        self,
        planned: MergePlan,
        output: Path | None,
        *,
        overwrite: bool = False,
        on_schedule: Callable[[Schedule], None] | None = None,
        progress: Progress | None = None,
    ) -> MergeResult:
        """Merge a plan into a folder that all nodes see.

        All nodes are checked before anything is written. Raises ``ClusterError`` for the cluster and its nodes, and as
        ``run`` does.
        """
        if output is None:
            raise OptionError("output: with engine ray a merge writes a folder; name one that all nodes see")
        scheduled = Schedule(planned, Budget(DEFAULT_MEMORY if self._memory is None else self._memory))
        crew = self._crew = self._crew or self._connect(len(planned.shards))
        numbers, held = crew.show(planned)
        if on_schedule is not None:
            on_schedule(scheduled)
        told = 0

        def tell(nbytes: int) -> None:
            nonlocal told
            told += nbytes
            if progress is not None:
                progress(nbytes)

        mapper = Mapper(crew, numbers, held, None if progress is None else tell)
        result = merge_in_shards(
            planned,
            output,
            mapper,
            overwrite,
            tell,
            workers=len(crew.members),
            check=crew.probe,
            device=self._device,
            backend=self._backend,
            memory=self._memory,
        )
        if told < scheduled.bytes_read:  # a step was not needed
            tell(scheduled.bytes_read - told)
        result.notes += mapper.notes()
        if len(planned.shards) < len(mapper.shares):
            result.notes.append(
                f"{counted(len(planned.shards), 'shard')} for {counted(len(mapper.shares), 'worker')}: a smaller shard "
                "size gives work to all"
            )
        return result

    def _connect(self, jobs: int) -> Crew:
        self._stack.enter_context(connected(self._options.address))
        crew = Crew()
        self._stack.callback(crew.end)
        crew.gather(self._options.rules, self._device, self._backend, self._threads, self._memory, jobs)
        return crew

    def __enter__(self) -> OnRay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
