"""The CUDA backend with its kernels emulated: works on CPU tensors and host memory."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch

from merge_engine.backends.cuda import CudaBackend

from .build import CUDA, HERE, NAME, build

CACHE = Path(__file__).parents[2] / "build" / "emulated_cuda"


@cache
def load() -> Any:
    """The emulated module, compiled again when its sources are newer."""
    sources = [*CUDA.parent.rglob("*.h"), *CUDA.glob("*"), *HERE.glob("*.*")]
    modules = list(CACHE.glob(f"{NAME}*.so"))
    if not modules or modules[0].stat().st_mtime < max(source.stat().st_mtime for source in sources):
        CACHE.mkdir(parents=True, exist_ok=True)
        modules = [build(CACHE)]
    spec = importlib.util.spec_from_file_location(NAME, modules[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _device() -> ctypes.CDLL:
    library = ctypes.CDLL(load().__file__)
    library.held.restype = ctypes.c_uint64
    return library


def handed_in() -> int:
    """How many kernels, copies and fillings the device was given so far."""
    return ctypes.c_uint64.in_dll(_device(), "handed_in").value


def held() -> int:
    """How many streams, events and pieces of device memory and pinned memory there are."""
    return int(_device().held())


def set_schedule(seed: int) -> None:
    """Let streams do work early, in an order that the seed decides. With 0 they do all work as late as they may."""
    ctypes.c_uint64.in_dll(_device(), "schedule").value = seed


class EmulatedCudaBackend(CudaBackend):
    """Takes CPU tensors for device tensors."""

    name = "emulated cuda"

    def __init__(self, native: Any = None) -> None:
        super().__init__(native=native if native is not None else load())
        self.tensors_on = "cpu"

    def _here(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def _callers_stream(self) -> int:
        return 0
