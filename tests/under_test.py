"""The backends that the conformance suite compares with the reference.

``MERGE_ENGINE_TEST_BACKENDS`` names them: ``cpu`` (once for each instruction set), ``emulated_cuda``, and ``cuda`` and
``triton``, which need a GPU, or the latter TRITON_INTERPRET=1. By default the first two, which need nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from emulated_cuda.backend import EmulatedCudaBackend

from merge_engine import _native
from merge_engine.backends import Backend, create_backend
from merge_engine.backends.cpu import CpuBackend

T = TypeVar("T")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTRUCTION_SETS = [name for name in ("avx512", "avx2", "baseline") if _native.runs(name)]


def backends() -> dict[str, Backend]:
    """The backends by name. Raises ``BackendError`` for one that cannot be used here."""
    found: dict[str, Backend] = {}
    for name in os.environ.get("MERGE_ENGINE_TEST_BACKENDS", "cpu,emulated_cuda").split(","):
        if name == "cpu":
            found |= {isa: CpuBackend(threads=3, instruction_set=isa) for isa in INSTRUCTION_SETS}
        elif name == "emulated_cuda":
            found[name] = EmulatedCudaBackend()
        else:
            found[name] = create_backend(name)
    return found


def on(backend: Backend, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where the backend works."""
    on_gpu = backend.name == "cuda" or (backend.name == "triton" and not INTERPRETED)
    return tensor.cuda() if on_gpu else tensor


def thinned(values: Sequence[T], step: int) -> Sequence[T]:
    """All of the values, but every ``step``-th where Triton's interpreter takes a thousand times as long."""
    return values[::step] if INTERPRETED else values
