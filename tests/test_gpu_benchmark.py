"""The GPU benchmarks run on the emulated device; all of their results but the times are checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulated_cuda.backend import EmulatedCudaBackend

from benchmarks import gpu_kernels, gpu_merges


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = EmulatedCudaBackend()

    def run_once(device: torch.device, body: Callable[[], object]) -> float:
        body()
        backend.fetch(backend.mark())
        return 1.0

    monkeypatch.setattr(gpu_kernels, "timed", run_once)
    timings = gpu_kernels.measured(backend, 2, 5_000, torch.device("cpu"))
    own_bytes = {timing.what: timing.nbytes for timing in timings}
    assert own_bytes == {
        "histogram": 30_000,
        "ranks": 30_000,
        "consensus": 40_000,
        "consensus, slack": 40_000,
        "dare": 40_000,
        "ties": 70_000,
        "norms": 30_000,
        "combine": 30_000,
        "della": 150_000,
    }
    assert "| emulated cuda | ties | 2 |" in gpu_kernels.table(timings, 1e9)


def test_merges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_merges, "RAM", tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    outcomes = gpu_merges.merges("tiny", ["ties", "linear"], "cpu")
    assert all(outcome.same_bytes and outcome.nbytes > 0 for outcome in outcomes)
    assert "| tiny | linear |" in gpu_merges.table(outcomes, 1e9)
    assert list(tmp_path.iterdir()) == []
