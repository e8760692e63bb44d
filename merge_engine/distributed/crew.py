"""The workers of a cluster: one or two on each node, or one for each GPU, on cores that Ray gives to nobody else."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_engine.distributed.checks import by_cause, differing, short_of_memory
from merge_engine.distributed.looking import differences, wanted_files
from merge_engine.distributed.options import NodePaths, PathRule, unknown_nodes
from merge_engine.distributed.parcels import pack
from merge_engine.distributed.placing import evenly, workers_of
from merge_engine.distributed.worker import Introduction, Settings, Worker, introduction
from merge_engine.errors import ClusterError, OptionError, OutputError
from merge_engine.planning import DEFAULT_MEMORY, MergePlan
from merge_engine.storage import File
from merge_engine.text import counted, some

_PATIENCE = 60.0
"""Seconds in which a node must start a worker: it may load this package from a slow disk first."""

_GIVEN_BACK = 2.0
"""Seconds in which a node has the cores again that a merge before this one had."""

_IN_CREATION = "creation task"
"""What Ray says of an actor that raised an error while it was made, and was not lost."""

_FULL = "low on memory"
"""What Ray says where it ended a worker before the system's memory was full."""

_BESIDE_GPU = 100_000_000
"""Bytes of the host's memory that tensors take on their way to a GPU."""


@dataclass(frozen=True)
class Node:
    """A node of a cluster: Ray's id, a name that no other node has, all its names, and what it may use."""

    id: str
    name: str
    names: frozenset[str]
    cores: float
    gpus: int


@dataclass(frozen=True, eq=False)
class Member:
    """A worker: its node, and Ray's handle to its actor."""

    node: Node
    actor: Any


def nodes_of(listed: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The living nodes that have cores, from ``ray.nodes()``. Of several with one name each gets a part of its id."""
    alive = [node for node in listed if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    uses = Counter(node["NodeName"] for node in alive)
    result = []
    for node in alive:
        own, at, host = node["NodeName"], node["NodeManagerAddress"], node["NodeManagerHostname"]
        name = own if uses[own] == 1 else f"{own}#{node['NodeID'][:6]}"
        resources = node["Resources"]
        names = frozenset((name, own, at, host, node["NodeID"]))
        result.append(Node(node["NodeID"], name, names, resources["CPU"], int(resources.get("GPU", 0))))
    return sorted(result, key=lambda node: node.name)


def free_of(node: Node, free: Mapping[str, float]) -> Node:
    """The node with the cores and GPUs that are free; without any, if less than a core is (or than it has in all)."""
    cores, gpus = min(node.cores, free.get("CPU", 0.0)), min(node.gpus, int(free.get("GPU", 0)))
    return replace(node, cores=cores if cores >= min(1.0, node.cores) else 0.0, gpus=gpus)


def taken(nodes: Sequence[Node], left: Sequence[Node], usable: Collection[Node]) -> list[str]:
    """A line for each way in which other work has what is of the ``nodes``. ``left`` are the same with what is free."""
    lost = [f"node {each.name}" for each in left if each not in usable]
    notes = [f"nothing is free on {some(lost)}: other work has it, or it has stopped"] if lost else []
    for node, free in zip(nodes, left, strict=True):
        if free in usable and free.cores < node.cores:
            notes.append(
                f"other work has {node.cores - free.cores:g} of {node.cores:g} cores of node {node.name}"
            )
        if free in usable and free.gpus < node.gpus:
            notes.append(
                f"other work has {node.gpus - free.gpus} of {counted(node.gpus, 'GPU')} of node {node.name}"
            )
    return notes


class Crew:
    """All workers of a cluster. ``members`` are those that live; ``notes`` say what became of others."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.notes: list[str] = []

    def gather(
        self,
        rules: Sequence[PathRule],
        device: str,
        backend: str,
        threads: int | None,
        memory: int | None,
        jobs: int,
    ) -> None:
        """Start the workers of the cluster that this process is connected to, to do so many jobs.

        ``device``, ``backend``, ``threads`` and ``memory`` are those of ``run``. Of each node those cores and GPUs are
        used that are free; nodes without a free core are left out, with a note. Raises ``ClusterError`` if none is
        left, or if nodes have other versions or too little memory, and ``OptionError`` for paths of nodes that do not
        exist.
        """
        import ray

        wants_gpu = device == "cuda" or backend in ("cuda", "triton")
        takes_gpus = wants_gpu or (device, backend) == ("auto", "auto")
        nodes = nodes_of(ray.nodes())
        names = {name for node in nodes for name in node.names if name != node.id}
        if problems := unknown_nodes(rules, names):
            raise OptionError(problems)
        fitting = [node for node in nodes if node.gpus or not wants_gpu]
        if not fitting:
            raise ClusterError(f"no node of the cluster has {'a GPU' if wants_gpu else 'cores for Ray'}")
        left = _left_of(fitting)
        usable = [node for node in left if node.cores > 0 and (node.gpus or not wants_gpu)]
        self.notes += taken(fitting, left, usable)
        if not usable:
            raise ClusterError(f"no node of the cluster can work: {some(self.notes)}")
        for node in usable:
            gpus = node.gpus if takes_gpus else 0
            count = workers_of(node.cores, gpus, len(usable), jobs)
            self.members += _start(node, count, gpus > 0, threads, rules, len(usable))
        introduced = self._introduced()
        if not self.members:
            raise ClusterError(f"no node of the cluster can work: {some(self.notes)}")
        by_node = {member.node.name: introduced[member] for member in self.members}
        tensors = Counter[str]()
        for member in self.members:
            on_gpu = takes_gpus and member.node.gpus
            tensors[member.node.name] += _BESIDE_GPU if on_gpu else memory or DEFAULT_MEMORY
        workers = Counter(member.node.name for member in self.members)
        problems = differing(introduction(), by_node) + short_of_memory(by_node, workers, tensors)
        if problems:
            raise ClusterError(problems)

    def show(self, plan: MergePlan) -> tuple[dict[File, int], dict[Node, list[float]]]:
        """Let all workers look at the inputs of a plan.

        Returns the number of each input file, and for each node the share of each that its page cache holds. Raises
        ``ClusterError`` with all nodes that lack inputs, have others, or do not know the method.
        """
        wanted, numbers = wanted_files(plan)
        method = pack(plan.method, {})
        problems, held = {}, {}
        for member, (seen, shares, unknown) in self._ask("look", wanted, method).items():
            lines = differences(wanted, seen)
            if unknown is not None:
                lines.append(
                    f"the method {plan.method.name} is not known: {unknown}; install its package on all nodes"
                )
            problems[member.node.name] = lines
            held[member.node] = shares
        if lines := by_cause(problems):
            raise ClusterError(lines)
        return numbers, held

    def probe(self, drafts: Path) -> None:
        """Let all workers write into the folder of drafts. Raises ``OutputError`` with all nodes that cannot."""
        found = self._ask("probe", drafts.absolute())
        problems = {
            member.node.name: [f"{said}; all nodes must see it, perhaps under other paths (ray paths)"]
            for member, said in found.items()
            if said is not None
        }
        if problems:
            raise OutputError(by_cause(problems))

    def lose(self, member: Member, error: Exception) -> None:
        """A worker does not answer any more, for what Ray says in ``error``."""
        import ray

        if member in self.members:
            self.members.remove(member)
            why = ": its memory was full" if _FULL in str(error) else ""
            self.notes.append(f"a worker of node {member.node.name} was lost during the merge{why}")
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(member.actor)

    def end(self) -> None:
        """End all workers at once."""
        import ray

        for member in self.members:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(member.actor)

    def _introduced(self) -> dict[Member, Introduction]:
        """What each worker says of its node. Those that do not start are left out, and those without this package."""
        import ray

        asked = {member.actor.introduce.remote(): member for member in self.members}
        ready, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE)
        found, problems = {}, {}
        for ref in ready:
            name = asked[ref].node.name
            try:
                found[asked[ref]] = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                problems[name] = [_cause(error)]
            except ray.exceptions.RayError as error:
                if _IN_CREATION in str(error):
                    problems[name] = [_cause(error)]
                else:
                    self.notes.append(f"a worker of node {name} was lost before the merge")
        if problems:
            raise ClusterError(by_cause(problems))
        for ref in waiting:
            ray.kill(asked[ref].actor)
        busy = dict.fromkeys(asked[ref].node.name for ref in waiting)
        if busy:
            self.notes.append(
                f"{some([f'node {name}' for name in busy])} started no worker within {_PATIENCE:.0f} s: other work has "
                "taken the cores, or the disk is slow"
            )
        self.members = [member for member in self.members if member in found]
        return found

    def _ask(self, what: str, *arguments: object) -> dict[Member, Any]:
        """The answers of all workers to one question. Those that are lost meanwhile are left out."""
        import ray

        asked = {member: getattr(member.actor, what).remote(*arguments) for member in self.members}
        answers = {}
        for member, ref in asked.items():
            try:
                answers[member] = ray.get(ref)
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                self.lose(member, error)
        if not answers:
            raise ClusterError(f"all nodes of the cluster are lost: {some(self.notes)}")
        return answers


def _left_of(nodes: list[Node]) -> list[Node]:
    """The nodes with what is free of them, after a moment if that is less than all."""
    # It is for developers, and has no public name.
    from ray._private.state import available_resources_per_node

    end = time.monotonic() + _GIVEN_BACK
    while True:
        free = available_resources_per_node()
        left = [free_of(node, free.get(node.id, {})) for node in nodes]
        if left == nodes or time.monotonic() > end:
            return left
        time.sleep(0.1)


def _start(
    node: Node, count: int, on_gpus: bool, threads: int | None, rules: Sequence[PathRule], nodes: int
) -> list[Member]:
    """Begin to start so many workers of a node, each with a GPU of its own if they are ``on_gpus``."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cores, own = evenly(node.cores, count)
    if threads is not None and threads < own:
        cores, own = float(threads), threads
    settings = Settings(own, "auto" if on_gpus else "cpu", NodePaths.of(rules, node.names), nodes)
    kind = ray.remote(Worker).options(
        num_cpus=cores,
        num_gpus=1 if on_gpus else 0,
        max_concurrency=2,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
    )
    return [Member(node, kind.remote(settings)) for _ in range(count)]


def _cause(error: Exception) -> str:
    """What kept a worker from starting: Ray's text ends with the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return f"no worker starts: {last}; install the same version of merge_engine there"
