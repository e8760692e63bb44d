"""Memory as native code sees it: where it lies, and whether several pieces hold the same."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import merge_engine._native as _native
from merge_engine.dtypes import DType


def address_of(memory: memoryview) -> int:
    """Where a buffer lies."""
    return _native.address_of(memory)


def view_at(address: int, nbytes: int) -> memoryview:
    """Memory of a device as a view. It can be cut, and its address asked for; nobody may look at its bytes."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def identical(memories: Sequence[memoryview], dtype: DType | None) -> bool:
    """Whether all buffers hold the same bytes and, if they are floats of ``dtype``, no negative zero."""
    return _native.identical(memories, element_bytes=dtype.itemsize if dtype is not None else 0)
