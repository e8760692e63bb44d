"""Reading a checkpoint: what tensors it has, and any range of their bytes, from any thread."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_engine.checkpoint.header import TensorInfo, read_header
from merge_engine.checkpoint.layout import WeightFiles, find_weights, place_tensors
from merge_engine.errors import CheckpointError
from merge_engine.storage.files import File, OpenFiles
from merge_engine.storage.memory import as_bytes
from merge_engine.storage.ranges import ByteRange, Extent, Way, maps, open_range

_MAX_DEPTH = 100  # of config.json, far below what exhausts the stack when it is copied or written


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in a folder, or a single weight file. Tensor data is not read yet.

    Raises ``CheckpointError`` when there are no weights or when a header, an index or config.json is wrong.
    """
    weights = find_weights(path)
    if weights.is_safetensors:
        return SafetensorsCheckpoint(weights)
    from merge_engine.checkpoint.torch_source import TorchCheckpoint  # imports torch

    return TorchCheckpoint(weights)


class Checkpoint(ABC):
    """An open checkpoint: ``tensors`` by name, and ``config``, the parsed config.json ({} if none).

    ``path`` is the folder or file that was opened. Close it, or use it as a context manager.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]

    def __init__(self, weights: WeightFiles, contents: Mapping[Path, Mapping[str, TensorInfo]]):
        """Called by subclasses with what each weight file holds."""
        self.path = weights.path
        self.config = _read_config(weights.folder / "config.json")
        self._file_of = place_tensors(weights, contents)
        self.tensors = {name: contents[file][name] for name, file in self._file_of.items()}
        self._contents = contents
        self._files = {file: File.of(file) for file in contents}

    @property
    def files(self) -> tuple[File, ...]:
        """The weight files, as they were when their headers were read."""
        return tuple(self._files.values())

    @abstractmethod
    def range(self, name: str, offset: int, nbytes: int, way: Way, in_place: bool) -> ByteRange:
        """Bytes [offset, offset + nbytes) of a tensor, to be brought into memory: see ``open_range``.

        Raises ``CheckpointError`` when the file cannot be opened or has changed.
        """

    def maps(self, name: str) -> bool:
        """Whether a tensor can be used in place."""
        return False

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the tensor's bytes from byte ``offset`` of the tensor on. Thread-safe.

        The buffer is C-contiguous and writable. Raises ``CheckpointError`` when the file cannot be read or has
        changed, and ``ValueError`` when the range is not within the tensor.
        """
        self.file_of(name)
        nbytes = self.tensors[name].nbytes
        if offset < 0 or offset + buffer.nbytes > nbytes:
            raise ValueError(f"{name!r} has {nbytes} bytes, not {buffer.nbytes} from {offset} on")
        copied = self.range(name, offset, buffer.nbytes, "cached", in_place=False)
        copied.read(as_bytes(buffer), 0, copied.length)

    @abstractmethod
    def close(self) -> None:
        """Release the files. No read may be under way."""

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor. Raises ``CheckpointError`` for an unknown name."""
        try:
            return self._file_of[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}") from None

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the weight files' names, sizes, modification times and what their headers say.

        It tells whether a checkpoint has been rewritten since, without reading it. It does not identify the
        values: a copy with new modification times has another fingerprint.
        """
        layout = [
            [
                file.name,
                self._files[file].size,
                self._files[file].mtime_ns,
                [[t.name, t.dtype.code, t.shape, t.start] for t in self._contents[file].values()],
            ]
            for file in sorted(self._contents)
        ]
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SafetensorsCheckpoint(Checkpoint):
    """One or many safetensors files. Each is opened when it is first read."""

    def __init__(self, weights: WeightFiles):
        """Reads the headers of all files."""
        super().__init__(weights, {file: read_header(file).tensors for file in weights.files})
        self._opened = OpenFiles()

    def range(self, name: str, offset: int, nbytes: int, way: Way, in_place: bool) -> ByteRange:
        """See ``Checkpoint.range``."""
        return open_range(self._opened, self._extent(name, offset, nbytes), way, in_place)

    def maps(self, name: str) -> bool:
        """See ``Checkpoint.maps``."""
        return maps(self._opened, self._extent(name, 0, self.tensors[name].nbytes))

    def close(self) -> None:
        """See ``Checkpoint.close``."""
        self._opened.close()

    def _extent(self, name: str, offset: int, nbytes: int) -> Extent:
        info = self.tensors[name]
        file = self._files[self._file_of[name]]
        return Extent(file, name, info.start + offset, nbytes, alignment=max(info.dtype.itemsize, 1))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: object = json.loads(path.read_bytes())
        too_deep = _depth(config) > _MAX_DEPTH
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: no valid JSON: {error}") from None
    except RecursionError:
        too_deep = True
    if too_deep:
        raise CheckpointError(f"{path}: nested more than {_MAX_DEPTH} levels deep; no model's configuration")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds {config!r:.60}, not a JSON object")
    return config


def _depth(value: object) -> int:
    """How many objects and lists lie inside each other. Level by level: recursion is what must not happen."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth
