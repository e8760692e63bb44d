"""The header of a safetensors file, checked against the size of the file.

A file is 8 bytes (little-endian length of the header), the header (a JSON object, maybe padded with spaces), then the
tensors' bytes with no gap before, between or after them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TypeGuard

from merge_engine.checkpoint.mistaken import START_BYTES, check_kind
from merge_engine.checkpoint.strict_json import parse_json
from merge_engine.dtypes import BY_CODE, DType
from merge_engine.errors import CheckpointError, OutputError, way_out
from merge_engine.storage import PAGE
from merge_engine.text import shown

MAX_HEADER = 100_000_000
_LENGTH_BYTES = 8
_MAX_COUNT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file. ``start`` is its first byte, counted from the beginning of the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def count(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written: its name, dtype and shape, which decide its place in a file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.bits // 8


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: ``tensors`` in file order, the file's own ``metadata``, first byte of the data.

    ``digest`` is the SHA-256 (hex) of the header's bytes.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    digest: str


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    Raises ``CheckpointError`` for every way in which the header can be malformed or disagree with the file.
    """
    raw, file_size = _read_raw(path)
    if not raw.startswith(b"{"):
        raise CheckpointError(
            f"{path}: its header does not start with '{{': no safetensors file, or damaged; download it again"
        )
    try:
        entries = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is no valid JSON: {error}; download it again") from None
    assert isinstance(entries, dict)  # it starts with {
    metadata = _checked_metadata(path, entries.pop("__metadata__", None))
    data_start = _LENGTH_BYTES + len(raw)
    tensors = [_checked_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=attrgetter("start", "nbytes"))
    _check_coverage(path, tensors, data_start, file_size)
    return Header(
        {tensor.name: tensor for tensor in tensors}, metadata, data_start, hashlib.sha256(raw).hexdigest()
    )


def encode_header(tensors: Sequence[OutputTensor], metadata: dict[str, str]) -> bytes:
    """The first bytes of a safetensors file that holds ``tensors`` one after the other, in this order.

    They are padded with spaces, so that the data, which follows directly, starts on a page boundary. Raises
    ``OutputError`` when the header would be longer than readers accept.
    """
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype.code,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    length = len(text) + -(_LENGTH_BYTES + len(text)) % PAGE
    if length > MAX_HEADER:
        raise OutputError(
            f"a shard of {len(tensors)} tensors needs a header of {length} bytes, readers stop at "
            f"{MAX_HEADER}; choose a smaller shard size"
        )
    return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


def _read_raw(path: Path) -> tuple[bytes, int]:
    """The JSON bytes of the header and the size of the file."""
    try:
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            prefix = file.read(_LENGTH_BYTES)
            start = prefix + file.read(START_BYTES - _LENGTH_BYTES)
            check_kind(path, start)
            if len(prefix) < _LENGTH_BYTES:
                raise CheckpointError(
                    f"{path}: only {file_size} bytes, too short for a safetensors file; download it again"
                )
            if start.startswith(b"PK\x03\x04") and not start.startswith(b"{", _LENGTH_BYTES):
                raise CheckpointError(
                    f"{path}: a zip archive, not safetensors; torch's archives are named .bin"
                )
            file.seek(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER:
                raise CheckpointError(
                    f"{path}: claims a header of {length} bytes, more than the {MAX_HEADER} allowed; "
                    "no safetensors file, or damaged; download it again"
                )
            if _LENGTH_BYTES + length > file_size:
                raise CheckpointError(
                    f"{path}: truncated: claims a header of {length} bytes, the file has {file_size}; "
                    "download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}{way_out(error)}") from error
    if len(raw) < length:
        raise CheckpointError(f"{path}: became shorter while its header was read")
    return raw, file_size


def _checked_metadata(path: Path, metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{path}: __metadata__ key {key!r:.100} holds {shown(value)}, not a text")
    return metadata


def _checked_tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    try:
        dtype, shape, begin, end = _checked_entry(entry)
    except ValueError as error:
        raise CheckpointError(f"{path}: tensor {name!r}: {error}") from None
    return TensorInfo(name, dtype, shape, data_start + begin, end - begin)


def _checked_entry(entry: object) -> tuple[DType, tuple[int, ...], int, int]:
    """Dtype, shape, and the positions in the data of the first byte and after the last. Raises ``ValueError``."""
    if not isinstance(entry, dict):
        raise ValueError(f"is {shown(entry)}, not an object with dtype, shape and data_offsets")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ValueError(f"unknown dtype {shown(code)}; known are {', '.join(BY_CODE)}")
    if not _are_natural(shape):
        raise ValueError(f"shape {shown(shape)} is not a list of sizes from 0 to 2^63 - 1")
    if not _are_natural(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets {shown(offsets)} are not two positions in the file")
    begin, end = offsets
    if begin > end:
        raise ValueError(f"data_offsets {offsets} are reversed")
    count = 1
    for size in shape:
        count *= size
        if count > _MAX_COUNT:  # checked at each step: the product of a hostile shape takes minutes
            raise ValueError(f"shape {shown(shape)} has more than 2^63 - 1 elements")
    nbytes, stray_bits = divmod(count * dtype.bits, 8)
    if stray_bits:
        raise ValueError(f"{count} elements of {dtype.code} do not fill whole bytes")
    if nbytes != end - begin:
        raise ValueError(
            f"shape {shown(shape)} of {dtype.code} is {nbytes} bytes, but data_offsets {offsets} hold {end - begin}"
        )
    return dtype, tuple(shape), begin, end


def _are_natural(values: object) -> TypeGuard[list[int]]:
    """Whether this is a list of whole numbers that fit 63 bits; JSON's true and 1.0 are not."""
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110, all() takes twice as long
        if type(value) is not int or not 0 <= value <= _MAX_COUNT:
            return False
    return True


def _check_coverage(path: Path, tensors: Sequence[TensorInfo], data_start: int, file_size: int) -> None:
    """Raise ``CheckpointError`` unless the tensors, in order of their place, fill the data exactly."""
    end = data_start
    for tensor in tensors:
        if tensor.start < end:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r}: its data overlaps by {end - tensor.start} bytes with the "
                "tensor before it"
            )
        if tensor.start > end:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r}: the {tensor.start - end} bytes before it "
                "belong to no tensor"
            )
        end = tensor.start + tensor.nbytes
    promised, held = end - data_start, file_size - data_start
    if held < promised:
        raise CheckpointError(
            f"{path}: truncated: the header promises {promised} bytes of data, the file has {held}; "
            "download it again"
        )
    if held > promised:
        raise CheckpointError(
            f"{path}: the last {held - promised} bytes belong to no tensor; the file is damaged"
        )
