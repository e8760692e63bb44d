"""Whether nodes fit together, judged from what they say: pure, and one line for each problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_engine.distributed.worker import Introduction
from merge_engine.text import size_text, some

_PROCESS = 300_000_000
"""Bytes of memory that a process takes beside tensor data: Python, Ray, tables of counts."""


def differing(here: Introduction, nodes: Mapping[str, Introduction]) -> list[str]:
    """The nodes with other versions than this machine. ``nodes`` are by name."""
    return by_cause({name: _differences(here, there) for name, there in nodes.items()})


def short_of_memory(
    nodes: Mapping[str, Introduction], workers: Mapping[str, int], tensors: Mapping[str, int]
) -> list[str]:
    """The nodes with too little memory. By name: their number of workers, and bytes of tensors of all of them."""
    lines = []
    for name, there in nodes.items():
        needed = tensors[name] + workers[name] * _PROCESS
        if there.memory is not None and there.memory < needed:
            lines.append(
                f"node {name}: has {size_text(there.memory)} of memory available, the merge takes {size_text(needed)} "
                "there; choose a smaller memory, or end what else runs there"
            )
    return lines


def by_cause(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """The problems of nodes by name, one line for each cause, with all nodes that have it."""
    nodes: dict[str, list[str]] = {}
    for name, lines in problems.items():
        for line in lines:
            nodes.setdefault(line, []).append(name)
    return [f"node{'s' * (len(names) > 1)} {some(names)}: {line}" for line, names in nodes.items()]


def _differences(here: Introduction, there: Introduction) -> list[str]:
    install = "; install the same on all nodes"
    if there.version != here.version:
        return [f"merge_engine {there.version}, but {here.version} on this machine{install}"]
    if there.python != here.python:
        return [f"Python {there.python}, but {here.python} on this machine{install}"]
    if there.sources != here.sources:
        return [f"another state of merge_engine {there.version} than on this machine{install}"]
    return []
