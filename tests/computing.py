"""The backends that the tests of conformance compare with the reference: ``pytest --backends cpu`` (the default) ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from merge_engine import _native
from merge_engine.backends.base import Backend
from merge_engine.backends.cpu import CpuBackend

NAMES = ("cpu", "triton")
T = TypeVar("T")

BACKENDS: dict[str, Backend] = {}
_interpreted = False


def choose(name: str) -> None:
    """Fill ``BACKENDS``: every instruction set of the processor, or Triton as it is (interpreted, or on a GPU)."""
    global _interpreted
    BACKENDS.clear()
    if name == "triton":
        from merge_engine.backends.triton import TritonBackend
        from merge_engine.kernels.launching import INTERPRETED

        _interpreted = INTERPRETED
        BACKENDS["triton"] = TritonBackend()
        return
    for instruction_set in ("avx512", "avx2", "baseline"):
        if _native.runs(instruction_set):
            BACKENDS[instruction_set] = CpuBackend(threads=3, instruction_set=instruction_set)


def thinned(values: Sequence[T], step: int) -> Sequence[T]:
    """All of the values; every ``step``-th where an interpreter takes a thousand times as long."""
    return values[::step] if _interpreted else values
