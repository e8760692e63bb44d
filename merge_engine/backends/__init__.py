"""Ways of computing: one set of primitives, several devices, the same bytes."""

import importlib.util

from merge_engine.backends.base import Backend
from merge_engine.errors import BackendError

NAMES = ("auto", "cpu", "reference", "triton")

__all__ = ["NAMES", "Backend", "create_backend"]


def create_backend(name: str = "auto", threads: int | None = None) -> Backend:
    """Make a backend by name: ``cpu`` (native code), ``reference`` (plain torch), ``triton`` (a GPU) or ``auto``.

    ``threads`` is the number of threads of the cpu backend, by default all that the process may use.
    Raises ``BackendError`` for another name, and where what a backend needs is missing.
    """
    if name in ("auto", "cpu"):
        from merge_engine.backends.cpu import CpuBackend

        return CpuBackend(threads)
    if name == "reference":
        from merge_engine.backends.reference import ReferenceBackend

        return ReferenceBackend()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            raise BackendError("triton is not installed; pip install 'merge_engine[triton]', or choose cpu")
        from merge_engine.backends.triton import TritonBackend

        return TritonBackend()
    raise BackendError(f'there is no backend "{name}"; choose one of {", ".join(NAMES)}')
