"""Reading checkpoints in torch's pickle format, with torch's restricted unpickler and nothing else.

Import it only for such a checkpoint: it imports torch.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from merge_engine.checkpoint.header import LFS_START, TensorInfo, lfs_pointer
from merge_engine.checkpoint.layout import WeightFiles
from merge_engine.checkpoint.source import Checkpoint
from merge_engine.dtypes import BY_NAME
from merge_engine.errors import CheckpointError
from merge_engine.storage.ranges import ByteRange, Way

_ZIP_MAGIC = b"PK\x03\x04"


class TorchCheckpoint(Checkpoint):
    """``.bin``, ``.pt`` or ``.pth`` files, mapped into memory (files older than torch 1.6 are loaded).

    ``TensorInfo.start`` orders the tensors as the file does; it is not a position in the file.
    """

    def __init__(self, weights: WeightFiles):
        """Unpickles all files. Their tensors' data stays on disk until it is read."""
        self._loaded = {file: _load(file) for file in weights.files}
        super().__init__(weights, {file: _describe(file, state) for file, state in self._loaded.items()})

    def range(self, name: str, offset: int, nbytes: int, way: Way, in_place: bool) -> ByteRange:
        """See ``Checkpoint.range``. It is always a copy of what torch has mapped or loaded."""
        flat = self._loaded[self._file_of[name]][name].reshape(-1).view(torch.uint8)
        return _LoadedRange(flat[offset : offset + nbytes])

    def close(self) -> None:
        """See ``Checkpoint.close``."""
        self._loaded = {}


class _LoadedRange(ByteRange):
    """Copied from the bytes of a tensor (a flat one of uint8)."""

    def __init__(self, flat: torch.Tensor):
        self.length = self.room = flat.numel()
        self._flat = flat

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        return memory[: self.room]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
        if first < last:  # torch makes no tensor of an empty buffer
            torch.frombuffer(memory[first:last], dtype=torch.uint8).copy_(self._flat[first:last])


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


def _describe(file: Path, state: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    start = 0
    for name, tensor in state.items():
        dtype_name = str(tensor.dtype).removeprefix("torch.")
        dtype = BY_NAME.get(dtype_name)
        if dtype is None or dtype.bits < 8:
            raise CheckpointError(f"{file}: tensor {name!r}: dtype {dtype_name} is not supported")
        nbytes = tensor.numel() * dtype.itemsize
        tensors[name] = TensorInfo(name, dtype, tuple(tensor.shape), start, nbytes)
        start += nbytes
    return tensors
