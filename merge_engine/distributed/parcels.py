"""Jobs as bytes for other machines. In place of an input file stands its number: each node has its own copy."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from merge_engine.storage import File


def pack(value: object, numbers: Mapping[File, int]) -> bytes:
    """The value as bytes. ``numbers`` has the numbers of the input files, by what they are on this machine.

    Classes of a program or notebook itself go by value, so that methods defined there work on nodes.
    """
    import ray.cloudpickle

    class Pickler(ray.cloudpickle.CloudPickler):
        def persistent_id(self, part: object) -> int | None:
            return numbers.get(part) if isinstance(part, File) else None

    buffer = io.BytesIO()
    pickler: Any = Pickler
    pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def unpack(data: bytes, files: Sequence[File]) -> Any:
    """The value. ``files`` are the input files as they are on this machine, by number.

    Raises ``ImportError`` or ``AttributeError`` for a class that this machine does not have.
    """

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> File:
            return files[number]

    return Unpickler(io.BytesIO(data)).load()
