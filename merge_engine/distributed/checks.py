"""Whether nodes fit together, judged from what they say: pure, and one line for each problem."""

from __future__ import annotations

from collections.abc import Mapping

from merge_engine.distributed.worker import Introduction
from merge_engine.text import size_text

_PROCESS = 300_000_000
"""Bytes of memory that a process takes beside tensor data: Python, Ray, tables of counts."""


def differing(here: Introduction, nodes: Mapping[str, Introduction]) -> list[str]:
    """The nodes with other versions than this machine. ``nodes`` are by name."""
    lines = []
    for name, there in nodes.items():
        if there.version != here.version:
            lines.append(f"node {name}: has merge_engine {there.version}, this machine has {here.version}")
        elif there.sources != here.sources:
            lines.append(f"node {name}: has another state of merge_engine {there.version} than this machine")
        elif there.python != here.python:
            lines.append(f"node {name}: has Python {there.python}, this machine has {here.python}")
    return [f"{line}; install the same on all nodes" for line in lines]


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
