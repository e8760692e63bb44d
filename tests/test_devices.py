"""The device of a merge: the chosen one, or the best one; one line if it cannot be used."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from emulated_cuda.backend import load

from merge_engine import backends
from merge_engine.backends import create_backend
from merge_engine.backends.cuda import CudaBackend
from merge_engine.errors import BackendError, NoDeviceError, NotBuiltError


def unusable(error: Exception) -> Any:
    def make(*_: object) -> None:
        raise error

    return make


def test_auto_takes_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "any_driver", lambda: True)
    for error in (NoDeviceError("no driver"), NotBuiltError("built without CUDA")):
        monkeypatch.setattr(backends, "_cuda", unusable(error))
        notes: list[str] = []
        assert create_backend(notes=notes).name == "cpu" and notes == []


def test_auto_looks_no_further_where_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "any_driver", lambda: False)
    monkeypatch.setattr(backends, "_cuda", unusable(BackendError("looked")))
    notes: list[str] = []
    assert create_backend(notes=notes).name == "cpu" and notes == []


def test_auto_says_why_a_gpu_that_is_there_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "any_driver", lambda: True)
    monkeypatch.setattr(backends, "_cuda", unusable(BackendError("the driver is for CUDA 11.8")))
    notes: list[str] = []
    assert create_backend(notes=notes).name == "cpu"
    assert notes == ["computing on the CPU: the driver is for CUDA 11.8"]
    with pytest.raises(BackendError, match=r"the driver is for CUDA 11\.8"):
        create_backend(device="cuda")


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("fpga", "auto", 'there is no backend "fpga"'),
        ("auto", "gpu", 'there is no device "gpu"; choose auto, cpu, cuda'),
        ("auto", "cuda:x", 'there is no device "cuda:x"'),
        ("cuda", "cpu", "the cuda backend does not compute on the CPU"),
        ("cpu", "cuda:1", "the cpu backend does not compute on cuda:1"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, device: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        create_backend(name, device=device)


def test_devices_that_cannot_be_used_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    native = load()
    with pytest.raises(BackendError, match="there is no CUDA device 1, only 0 to 0"):
        CudaBackend(1, native)
    for found, message in (
        ([("Tesla T4", 7, 5, 16 << 30)], r"Tesla T4, compute capability 7\.5\) is too old: 8\.0 or newer"),
        ([], "there is no CUDA device"),
    ):
        monkeypatch.setattr(native, "devices", lambda found=found: found)
        with pytest.raises(BackendError, match=message):
            CudaBackend(0, native)


def test_a_device_that_is_there_but_full_or_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    native = load()
    for error, message in (
        (MemoryError("std::bad_alloc"), "cannot be used now: it has no free memory"),
        (RuntimeError("making a stream: all devices are busy"), "now: making a stream: all devices are busy"),
    ):
        monkeypatch.setattr(native, "Queue", unusable(error))
        with pytest.raises(BackendError, match=message):
            CudaBackend(0, native)


def test_a_device_loads_neither_the_cpu_backend_nor_torch() -> None:
    """What the engine and a device need of host memory is in a module of its own."""
    code = (
        "import sys, merge_engine.engine.work, merge_engine.backends.cuda\n"
        "loaded = {'torch', 'merge_engine.backends.cpu', 'merge_engine.backends.triton'} & sys.modules.keys()\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
