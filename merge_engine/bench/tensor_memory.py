"""The bytes of a tensor, without numpy."""

from __future__ import annotations

import ctypes

import torch


def memory_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory. Keep the tensor while it is used."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
