"""The zip archive of a torch checkpoint: checked before torch reads it, because mapped records are not compared."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

from merge_engine.errors import CheckpointError

_MAX_PICKLE = 50_000_000
"""Bytes of the pickle that describes the tensors: about 200 for each of them."""
_LOCAL_HEADER = struct.Struct(
    "<26xHH"
)  # ends with the lengths of the name and the extra field before the data


def read_records(file: Path) -> dict[int, int]:
    """The records of the archive: the size of each in bytes by the place of its first byte in the file.

    Raises ``CheckpointError`` for what torch never writes: compressed, encrypted or repeated records, records that
    overlap, code, and a pickle of more than 50 MB; and what ``zipfile`` raises for a damaged archive.
    """
    with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        size = os.fstat(stream.fileno()).st_size
        records: dict[int, int] = {}
        names = set()
        infos = archive.infolist()
        if any(info.filename.endswith("/constants.pkl") for info in infos):
            raise CheckpointError(
                f"{file}: a TorchScript archive, which holds code; save its state_dict as safetensors"
            )
        for info in infos:
            name = info.filename.partition("/")[2] or info.filename
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise CheckpointError(f"{file}: refused: its record {name!r:.100} is compressed or encrypted")
            if info.filename in names:
                raise CheckpointError(f"{file}: refused: its record {name!r:.100} is there twice")
            if name.endswith(".pkl") and info.file_size > _MAX_PICKLE:
                raise CheckpointError(
                    f"{file}: refused: its record {name!r:.100} has {info.file_size:,} bytes"
                )
            names.add(info.filename)
            stream.seek(info.header_offset)
            start = info.header_offset + _LOCAL_HEADER.size
            start += sum(_LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size)))
            if info.file_size:
                records[start] = info.file_size
    end = 0
    for start, length in sorted(records.items()):
        if start < end:
            raise CheckpointError(f"{file}: refused: its records overlap; download it again")
        end = start + length
    if end > size:
        raise CheckpointError(f"{file}: truncated: a record ends at byte {end} of {size}; download it again")
    return records


def check_storages(file: Path, records: Mapping[int, int], storages: Collection[tuple[int, int]]) -> None:
    """Raise ``CheckpointError`` unless each storage is one whole record.

    ``storages`` are addresses and sizes in bytes in a mapping of the file. Where it begins is not known, but there is
    one place for which all storages begin where records do.
    """
    held = sorted(storage for storage in set(storages) if storage[1])
    if not held:
        return
    first = held[0][0]
    for start in records:
        if all(records.get(address - first + start) == length for address, length in held):
            return
    raise CheckpointError(
        f"{file}: damaged: the sizes of its records do not agree with its tensors; download it again"
    )
