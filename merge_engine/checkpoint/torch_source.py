"""Reading checkpoints in torch's pickle format, only with torch's restricted unpickler.

Import it only for such a checkpoint: it imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge_engine.checkpoint.layout import WeightFiles, place_tensors
from merge_engine.checkpoint.mistaken import START_BYTES, check_kind
from merge_engine.checkpoint.torch_zip import check_storages, read_records
from merge_engine.dtypes import BY_NAME, DType
from merge_engine.errors import CheckpointError, way_out
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
    def reads_parts(self) -> bool:
        """See ``Operand.reads_parts``."""
        return False

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
        state = _unpickle(file)
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file}: refused: damaged, or it holds more than tensors, and loading such a file can run any "
            "code; convert it to safetensors"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}{way_out(error)}") from error
    except EOFError as error:
        raise CheckpointError(f"{file}: cannot be read as a torch checkpoint: it ends too early") from error
    except (KeyError, IndexError, AssertionError) as error:  # the unpickler met bytes that are no pickle
        raise CheckpointError(
            f"{file}: cannot be read as a torch checkpoint: damaged, or of another format"
        ) from error
    except Exception as error:  # garbage makes the unpickler raise anything
        reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
        raise CheckpointError(f"{file}: cannot be read as a torch checkpoint: {reason:.300}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, not tensors by name")
    return _plain_tensors(file, state)


def _unpickle(file: Path) -> object:
    """What torch's restricted unpickler makes of a file. Storages are mapped if it is a zip archive."""
    with file.open("rb") as stream:
        start = stream.read(START_BYTES)
        size = os.fstat(stream.fileno()).st_size
    check_kind(file, start)
    records = read_records(file) if start.startswith(_ZIP_MAGIC) else None
    storages: list[tuple[int, int]] = []
    claimed = 0

    def stays(storage: Any, _: str) -> Any:
        nonlocal claimed
        storages.append((storage.data_ptr(), storage.nbytes()))
        claimed += storage.nbytes()
        if claimed > size:
            raise CheckpointError(f"{file}: damaged: it claims more data than it has; download it again")
        return storage

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own old formats; an error says what matters
        state: object = torch.load(file, map_location=stays, weights_only=True, mmap=records is not None)
    if records is not None:
        check_storages(file, records, storages)
    return state


def _plain_tensors(file: Path, state: Mapping[object, object]) -> dict[str, torch.Tensor]:
    """The tensors, each contiguous. Raises ``CheckpointError`` for what is no tensor, and for tensors without data."""
    tensors: dict[str, torch.Tensor] = {}
    copied = 0
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{file}: expected only tensors by name, found {name!r:.100} with a "
                f"{type(tensor).__name__}; convert it to safetensors"
            )
        if reason := _unsupported(tensor):
            raise CheckpointError(f"{file}: tensor {name!r:.300}: {reason}; save it as a plain tensor")
        plain = tensor.detach().resolve_neg().contiguous()
        if plain.data_ptr() != tensor.data_ptr():
            copied += plain.nbytes
            if copied > file.stat().st_size:  # few bytes can be seen as many tensors
                raise CheckpointError(
                    f"{file}: tensor {name!r:.300}: its turned or negated tensors have more data than the file; "
                    "save them contiguous"
                )
        tensors[name] = plain
    return tensors


def _unsupported(tensor: torch.Tensor) -> str | None:
    """Why the bytes of a tensor cannot be read as they are; None if they can."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__} is not supported"
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        return "sparse, nested and quantized tensors are not supported"
    if tensor.device.type != "cpu":
        return f"it has no data: it is on the device {tensor.device.type}"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"it has {tensor.numel():,} elements, but the file does not hold so many: an expanded tensor"
    return None


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
