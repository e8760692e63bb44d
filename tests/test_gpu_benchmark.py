"""The GPU benchmark runs on the emulated device; all of its results but the times are checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulated_cuda.backend import EmulatedCudaBackend

from benchmarks import gpu


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = EmulatedCudaBackend()

    def run_once(device: torch.device, body: Callable[[], object]) -> float:
        body()
        backend.fetch(backend.mark())
        return 1.0

    monkeypatch.setattr(gpu, "timed", run_once)
    timings = gpu.kernels(backend, 2, 5_000, torch.device("cpu"))
    own_bytes = {timing.what: timing.nbytes for timing in timings}
    assert own_bytes == {"histogram": 30_000, "consensus": 40_000, "ties": 70_000, "combine": 30_000}
    assert "| emulated cuda | ties | 2 |" in gpu.table(timings, 1e9)


def test_a_whole_merge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "RAM", tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    merge = gpu.end_to_end("tiny", None, torch.device("cpu"))
    assert merge["same_bytes_as_cpu"] and merge["bytes_up"] > 0
    assert list(tmp_path.iterdir()) == []
