"""Reading a checkpoint: what tensors it has, and any range of their bytes, from any thread."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_engine.checkpoint.header import TensorInfo, read_header
from merge_engine.checkpoint.layout import WeightFiles, find_weights, place_tensors
from merge_engine.checkpoint.ranges import (
    CopiedRange,
    DirectRange,
    MappedRange,
    TensorRange,
    Way,
    became_shorter,
)
from merge_engine.errors import CheckpointError
from merge_engine.storage.direct import open_direct, read_direct
from merge_engine.storage.files import allow_many_files
from merge_engine.storage.memory import as_bytes

if TYPE_CHECKING:
    from merge_engine._native import Mapping as NativeMapping

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
        self._stats = {file: _stat(file) for file in contents}

    @abstractmethod
    def read_into(self, name: str, offset: int, buffer: memoryview, past_page_cache: bool = False) -> None:
        """Fill ``buffer`` with the tensor's bytes from byte ``offset`` of the tensor on. Thread-safe.

        The buffer is C-contiguous and writable. ``past_page_cache``: from storage, wherever the file system can do
        that. Raises ``CheckpointError`` when the file cannot be read or has changed, and ``ValueError`` when the
        range is not within the tensor.
        """

    def range(self, name: str, offset: int, nbytes: int, way: Way, in_place: bool) -> TensorRange:
        """Bytes [offset, offset + nbytes) of a tensor, to be brought into memory in some way, or in one that works.

        ``in_place``: they may lie at any multiple of their elements' size, instead of on a page. Raises
        ``CheckpointError`` when the file cannot be opened or has changed.
        """
        return CopiedRange(self, name, offset, nbytes)

    def maps(self, name: str) -> bool:
        """Whether a tensor can be used in place."""
        return False

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
                self._stats[file].st_size,
                self._stats[file].st_mtime_ns,
                [[t.name, t.dtype.code, t.shape, t.start] for t in self._contents[file].values()],
            ]
            for file in sorted(self._contents)
        ]
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _flat_range(self, name: str, offset: int, buffer: memoryview) -> memoryview:
        """The buffer as bytes, once it is known that the tensor has that many from ``offset`` on."""
        self.file_of(name)
        nbytes = self.tensors[name].nbytes
        if offset < 0 or offset + buffer.nbytes > nbytes:
            raise ValueError(f"{name!r} has {nbytes} bytes, not {buffer.nbytes} from {offset} on")
        return as_bytes(buffer)


class SafetensorsCheckpoint(Checkpoint):
    """One or many safetensors files, read by ``preadv`` straight into the caller's memory."""

    def __init__(self, weights: WeightFiles):
        """Reads the headers of all files."""
        super().__init__(weights, {file: read_header(file).tensors for file in weights.files})
        if len(weights.files) > 1:
            allow_many_files()
        self._descriptors: dict[Path, int] = {}
        self._direct: dict[Path, int] = {}  # descriptors past the page cache, -1 where that does not work
        self._mappings: dict[Path, NativeMapping | None] = {}  # None for files that cannot be mapped
        self._lock = threading.Lock()

    def read_into(self, name: str, offset: int, buffer: memoryview, past_page_cache: bool = False) -> None:
        """See ``Checkpoint.read_into``."""
        view = self._flat_range(name, offset, buffer)
        file = self._file_of[name]
        position = self.tensors[name].start + offset
        try:
            descriptor = self._descriptor(file)
            direct = self._direct_descriptor(file) if past_page_cache else -1
            while view.nbytes:
                past = direct >= 0
                got = read_direct(direct, view, position) if past else os.preadv(descriptor, [view], position)
                if got == 0:
                    raise became_shorter(file, name, position)
                view, position = view[got:], position + got
        except OSError as error:
            raise CheckpointError(f"{file}: tensor {name!r}: cannot be read: {error.strerror}") from error

    def range(self, name: str, offset: int, nbytes: int, way: Way, in_place: bool) -> TensorRange:
        """See ``Checkpoint.range``."""
        file, info = self._file_of[name], self.tensors[name]
        in_place = in_place and _aligned(info)
        if way in ("mapped", "present") and in_place and (mapping := self._mapping(file)) is not None:
            return MappedRange(mapping, file, info, offset, nbytes, present=way == "present")
        if way == "direct" and in_place and (descriptor := self._direct_descriptor(file)) >= 0:
            return DirectRange(descriptor, file, info, offset, nbytes)
        return CopiedRange(self, name, offset, nbytes, past=way == "direct")

    def maps(self, name: str) -> bool:
        """See ``Checkpoint.maps``."""
        return _aligned(self.tensors[name]) and self._mapping(self._file_of[name]) is not None

    def close(self) -> None:
        """See ``Checkpoint.close``."""
        self._mappings = {}
        with self._lock:
            for descriptors in (self._descriptors, self._direct):
                while descriptors:
                    if (descriptor := descriptors.popitem()[1]) >= 0:
                        os.close(descriptor)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                if os.fstat(descriptor).st_size != self._stats[file].st_size:
                    os.close(descriptor)
                    raise CheckpointError(f"{file}: its size has changed since its header was read")
                self._descriptors[file] = descriptor
            return self._descriptors[file]

    def _direct_descriptor(self, file: Path) -> int:
        """-1 where only reading through the page cache works."""
        with self._lock:
            if file not in self._direct:
                try:
                    self._direct[file] = open_direct(file)
                except OSError:
                    self._direct[file] = -1
            return self._direct[file]

    def _mapping(self, file: Path) -> NativeMapping | None:
        if file not in self._mappings:
            import merge_engine._native as native

            try:
                descriptor = self._descriptor(file)
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
            with self._lock:
                if file not in self._mappings:
                    try:
                        self._mappings[file] = native.Mapping(descriptor, self._stats[file].st_size)
                    except OSError:  # a file system without mappings, or no address space
                        self._mappings[file] = None
        return self._mappings[file]


def _aligned(info: TensorInfo) -> bool:
    return info.start % max(info.dtype.itemsize, 1) == 0


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


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
