"""Opening a checkpoint: its tensors as operands, and its config.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_engine.checkpoint.header import Header, read_header
from merge_engine.checkpoint.layout import WeightFiles, find_weights, place_tensors
from merge_engine.checkpoint.strict_json import read_settings
from merge_engine.errors import CheckpointError, way_out
from merge_engine.operands import Operand, Stored
from merge_engine.storage import File
from merge_engine.storage.bounded import MAX_CONFIG


@dataclass(frozen=True)
class AdapterFiles:
    """The files of a LoRA adapter. ``path`` is the folder or file that was opened, ``folder`` that of its settings.

    ``contents`` has its settings and each weight file, with a digest of what they say or of the header.
    """

    path: Path
    folder: Path
    contents: tuple[tuple[File, str], ...] = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read from its headers. Nothing is kept open.

    ``path`` is the folder or file that was opened, ``folder`` the folder of its config.json. ``tensors`` are in
    the order of the files and of their places in them. ``config`` is the parsed config.json ({} if there is
    none). ``contents`` has each weight file with a digest of its header. ``adapter`` is the LoRA adapter that was put
    into it, which has changed ``tensors`` and nothing else.
    """

    path: Path
    folder: Path
    tensors: Mapping[str, Operand]
    config: Mapping[str, Any]
    contents: tuple[tuple[File, str], ...] = field(repr=False)
    adapter: AdapterFiles | None = None

    @property
    def label(self) -> str:
        """A name for messages: the path, and that of the adapter behind a "+"."""
        return input_label(self.path, self.adapter)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the names, sizes, modification times and headers of all files, those of the adapter too.

        It shows whether a checkpoint has been rewritten, without reading its tensors. It does not identify their
        values: a copy with new modification times has another fingerprint.
        """
        described = [[file.path.name, file.size, file.mtime_ns, digest] for file, digest in self._files]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    @cached_property
    def file_ids(self) -> frozenset[tuple[int, int, int, int]]:
        """What identifies each file on the disk: the same for one checkpoint under several paths.

        These are device, inode, size and time of the last change: not every network file system has true inodes.
        Raises ``CheckpointError`` if a file is not there any more.
        """
        try:
            found = [file.path.stat() for file, _ in self._files]
        except OSError as error:
            raise CheckpointError(
                f"{error.filename}: cannot be read: {error.strerror}{way_out(error)}"
            ) from error
        return frozenset((file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns) for file in found)

    @property
    def _files(self) -> tuple[tuple[File, str], ...]:
        return self.contents if self.adapter is None else (*self.contents, *self.adapter.contents)


def input_label(path: Path, adapter: AdapterFiles | None) -> str:
    """The name of an input: its path, and that of an adapter behind a "+"."""
    return str(path) if adapter is None else f"{path}+{adapter.path}"


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in a folder, or a single weight file. Tensor data is not read.

    Raises ``CheckpointError`` when there are no weights or when a header, an index or config.json is wrong.
    """
    return open_weights(find_weights(path))


def open_weights(weights: WeightFiles) -> Checkpoint:
    """Open the checkpoint in these files. Tensor data is not read. Raises ``CheckpointError``."""
    config = read_settings(weights.folder / "config.json", MAX_CONFIG) or {}
    if weights.is_safetensors:
        return _open_safetensors(weights, config)
    from merge_engine.checkpoint.torch_source import describe_pickles  # imports torch

    tensors, contents = describe_pickles(weights)
    return Checkpoint(weights.path, weights.folder, tensors, config, contents)


def _open_safetensors(weights: WeightFiles, config: Mapping[str, Any]) -> Checkpoint:
    # Each file is looked at before its header is read: one that is rewritten meanwhile has changed for the run.
    files = {path: File.of(path) for path in weights.files}
    headers: dict[Path, Header] = {path: read_header(path) for path in weights.files}
    places = place_tensors(weights, {path: header.tensors.keys() for path, header in headers.items()})
    owner = str(weights.path)
    tensors: dict[str, Operand] = {}
    for path in sorted(headers, key=str):
        file = files[path]
        for name, info in headers[path].tensors.items():
            place = places[name]
            if place is path or place == path:
                tensors[name] = Stored(name, info.dtype, info.shape, file, info.start, owner)
    contents = tuple((files[path], headers[path].digest) for path in sorted(headers))
    return Checkpoint(weights.path, weights.folder, tensors, config, contents)
