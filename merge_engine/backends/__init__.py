"""Ways of computing: one set of primitives, several devices, the same bytes."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re

from merge_engine.arguments import threads_of
from merge_engine.backends.base import HEADROOM, Backend
from merge_engine.errors import (
    BackendChoiceError,
    BackendError,
    DeviceMemoryError,
    NoDeviceError,
    NotBuiltError,
)
from merge_engine.tensors import demand_values

GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What there is where a driver of NVIDIA, of AMD, or of a virtual machine under Windows is loaded."""

NAMES = ("auto", "cpu", "cuda", "reference", "triton")

__all__ = ["HEADROOM", "NAMES", "Backend", "any_driver", "backend_or_kind", "create_backend", "known_backend"]


def create_backend(
    name: str = "auto", threads: int | None = None, device: str = "auto", notes: list[str] | None = None
) -> Backend:
    """Make a backend.

    ``device``: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``, which takes the first GPU that can be used, else the CPU; why
    one that is there cannot be used is added to ``notes``. ``name`` forces a backend: ``cpu`` and ``cuda`` (native
    code), ``triton`` (a GPU), or ``reference`` (plain torch). ``threads`` is the number of threads of the cpu backend,
    by default all that the process may use. Whether a GPU is worth it for a merge of files is decided before, by
    ``engine.choosing``. Raises ``BackendChoiceError`` for what does not exist, other ``BackendError`` for what
    cannot be used, and ``OptionError`` for no number of threads.
    """
    name, device, threads = known_backend(name), str(device), threads_of(threads)
    index = _device_index(device)
    if name == "reference":
        from merge_engine.backends.reference import ReferenceBackend

        demand_values()
        return ReferenceBackend()
    if name == "triton":
        return _triton(index)
    if name == "cuda":
        if device == "cpu":
            raise BackendChoiceError(
                "the cuda backend does not compute on the CPU; choose device auto or cuda"
            )
        return _cuda(index or 0)
    if name == "auto" and device != "cpu" and (index is not None or any_driver()):
        try:
            found = _any_gpu(index)
            if index is None:
                _demand_memory(found)
            return found
        except NoDeviceError:
            if index is not None:
                raise
        except BackendError as error:
            if index is not None:
                raise
            if notes is not None:
                notes.append(f"computing on the CPU: {error}")
    if index is not None:
        raise BackendChoiceError(
            f"the {name} backend does not compute on {device}; choose device auto or cpu"
        )
    from merge_engine.backends.cpu import CpuBackend

    return CpuBackend(threads)


def known_backend(name: object) -> str:
    """The name of a backend. Raises ``BackendChoiceError`` if there is no such backend."""
    if str(name) not in NAMES:
        raise BackendChoiceError(f'there is no backend "{name}"; choose one of {", ".join(NAMES)}')
    return str(name)


def backend_or_kind(name: str, threads: int | None, device: str, notes: list[str]) -> Backend | type[Backend]:
    """The backend that a run would take. Where this machine lacks its device, its class, which says how it works.

    Why it cannot be used here is added to ``notes``. Raises ``BackendError`` as ``create_backend`` does otherwise.
    """
    try:
        return create_backend(name, threads, device, notes)
    except NoDeviceError as error:
        notes.append(f"a run would fail on this machine: {error}")
    if name == "triton":
        from merge_engine.backends.triton import TritonBackend

        return TritonBackend
    from merge_engine.backends.cuda import CudaBackend

    return CudaBackend


def any_driver() -> bool:
    """Whether it is worth looking for a GPU: to load what is needed for that takes longer than small merges do."""
    if any(map(os.path.exists, GPU_FILES)):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _demand_memory(backend: Backend) -> None:
    """Raise ``DeviceMemoryError`` for a GPU that others have filled: the CPU can take its place."""
    free = backend.free_memory()
    if free is not None and free < 2 * HEADROOM:
        raise DeviceMemoryError(f"the GPU has only {free >> 20} MiB of free memory")


def _any_gpu(index: int | None) -> Backend:
    """The native kernels if they were built, else Triton's, which need no compiler on this machine."""
    try:
        return _cuda(index or 0)
    except NotBuiltError as not_built:
        # Triton asks torch, whose import takes seconds; and its interpreter is no GPU.
        if not any(map(os.path.exists, GPU_FILES)) or os.environ.get("TRITON_INTERPRET") == "1":
            raise
        try:
            return _triton(index)
        except BackendError:
            raise not_built from None


def _cuda(index: int) -> Backend:
    from merge_engine.backends.cuda import CudaBackend

    return CudaBackend(index)


def _triton(index: int | None) -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise BackendError(
            "triton is not installed: pip install 'merge_engine[triton]', or choose another backend"
        )
    from merge_engine.backends.triton import TritonBackend

    demand_values()
    return TritonBackend(index)


def _device_index(device: str) -> int | None:
    """The number of a CUDA device; None when no device is demanded or the CPU is."""
    if device in ("auto", "cpu"):
        return None
    if re.fullmatch(r"cuda(:[0-9]+)?", device):
        return int(device.partition(":")[2] or 0)
    raise BackendChoiceError(f'there is no device "{device}"; choose auto, cpu, cuda or cuda:0, cuda:1, ...')
