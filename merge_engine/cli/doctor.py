"""``merge-engine doctor``: the backends that can be used on this machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import merge_engine._native as _native
from merge_engine.backends import create_backend
from merge_engine.errors import BackendError
from merge_engine.observe.versions import versions
from merge_engine.storage import cores


def examine() -> list[tuple[str, str]]:
    """Pairs of subject and finding."""
    runs = [name for name in ("avx512", "avx2", "baseline") if _native.runs(name)]
    return [
        ("merge_engine", f"{versions()['merge_engine']}, Python {platform.python_version()}"),
        ("machine", f"{platform.system()} {platform.machine()}, {cores()} usable cores"),
        ("chosen", _chosen()),
        ("backend cpu", f"instruction set {_native.instruction_set()} (of {', '.join(runs)})"),
        ("backend reference", f"available with torch {_package('torch')}; slow, for checking"),
        ("backend cuda", _cuda()),
        ("backend triton", _triton()),
        ("hub", f"huggingface_hub {_package('huggingface_hub')}"),
    ]


def _chosen() -> str:
    found = create_backend()
    either = "where it is expected to be faster, else cpu: plan says which" if found.has_link else ""
    return f"backend {found.name} {either}".rstrip()


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    from merge_engine.backends.cuda import CudaBackend

    try:
        return f"usable: {CudaBackend().label}"
    except BackendError as error:
        return str(error)


def _triton() -> str:
    try:
        create_backend("triton")
    except BackendError as error:
        return str(error)
    return f"usable (triton {_package('triton')})"
