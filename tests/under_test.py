"""The backends that the conformance suite compares with the reference.

``MERGE_ENGINE_TEST_BACKENDS`` names them: ``cpu`` (once for each instruction set), ``emulated_cuda``, ``cuda`` (needs a
GPU). By default the first two, which need nothing.
"""

from __future__ import annotations

import os

import torch
from emulated_cuda.backend import EmulatedCudaBackend

from merge_engine import _native
from merge_engine.backends import Backend, create_backend
from merge_engine.backends.cpu import CpuBackend

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
    return tensor.cuda() if backend.name == "cuda" else tensor
