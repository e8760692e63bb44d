"""Reading checkpoints in torch's pickle format, only with torch's restricted unpickler.

Import it only for such a checkpoint: it imports torch.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from merge_engine.checkpoint.header import LFS_START, lfs_pointer
from merge_engine.checkpoint.layout import WeightFiles, place_tensors
from merge_engine.dtypes import BY_NAME, DType
from merge_engine.errors import CheckpointError
from merge_engine.operands import Access, Operand
from merge_engine.storage import ByteRange, File

_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class Pickled(Operand):
    """The tensor ``name`` of a ``.bin``, ``.pt`` or ``.pth`` file. ``owner`` is the checkpoint's path.

    Files are mapped into memory (those older than torch 1.6 are loaded) when they are first read.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: File
    owner: str

    @property
    def label(self) -> str:
        """See ``Operand.label``."""
        return f"{self.file.path}: tensor {self.name}"

    @property
    def files(self) -> tuple[File, ...]:
        """See ``Operand.files``."""
        return (self.file,)

    def range(self, start: int, count: int, access: Access) -> ByteRange:
        """See ``Operand.range``."""
        tensor = access.files.kept(self.file, _load).get(self.name)
        if tensor is None or tensor.shape != self.shape or BY_NAME.get(_name_of(tensor.dtype)) != self.dtype:
            raise CheckpointError(
                f"{self.file.path}: tensor {self.name!r}: has changed since the file was looked at"
            )
        return _Copied(tensor.reshape(-1)[start : start + count])


class _Copied(ByteRange):
    """A copy of elements out of a mapped pickle."""

    def __init__(self, elements: torch.Tensor):
        self._bytes = elements.view(torch.uint8) if elements.numel() else elements
        self.length = self.room = elements.numel() * elements.element_size()

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        return memory[: self.room]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
        torch.frombuffer(memory[first:last], dtype=torch.uint8).copy_(self._bytes[first:last])


def describe_pickles(weights: WeightFiles) -> tuple[dict[str, Operand], tuple[tuple[File, str], ...]]:
    """The tensors of torch's pickles by name, and each file with a digest of its tensors' names, dtypes and shapes.

    Raises ``CheckpointError`` for a file that holds more than tensors, or that cannot be read.
    """
    files = {path: File.of(path) for path in weights.files}
    states = {path: _load(path) for path in weights.files}
    places = place_tensors(weights, {path: state.keys() for path, state in states.items()})
    tensors: dict[str, Operand] = {}
    for path, state in sorted(states.items()):
        for name, tensor in state.items():
            dtype = _dtype_of(path, name, tensor)
            if places[name] == path:
                tensors[name] = Pickled(name, dtype, tuple(tensor.shape), files[path], str(weights.path))
    return tensors, tuple((files[path], _digest(state)) for path, state in sorted(states.items()))


def _load(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, each contiguous."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_START))
        can_map = start.startswith(_ZIP_MAGIC)
        if start == LFS_START:
            raise lfs_pointer(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=can_map)
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file}: refused: damaged, or it holds more than tensors, and loading such a file can run any "
            "code; convert it to safetensors"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    except EOFError as error:
        raise CheckpointError(f"{file}: cannot be read as a torch checkpoint: it ends too early") from error
    except Exception as error:  # garbage makes the unpickler raise anything: KeyError, AssertionError, ...
        reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
        raise CheckpointError(f"{file}: cannot be read as a torch checkpoint: {reason}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, not tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{file}: expected only tensors by name, found {name!r:.100} with a "
                f"{type(tensor).__name__}; convert it to safetensors"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{file}: tensor {name!r}: sparse and quantized tensors are not supported")
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def _dtype_of(file: Path, name: str, tensor: torch.Tensor) -> DType:
    dtype_name = _name_of(tensor.dtype)
    dtype = BY_NAME.get(dtype_name)
    if dtype is None or dtype.bits < 8:
        raise CheckpointError(f"{file}: tensor {name!r}: dtype {dtype_name} is not supported")
    return dtype


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(state: Mapping[str, torch.Tensor]) -> str:
    described = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in state.items()]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
