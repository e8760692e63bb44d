"""Files with the name of a weight file that hold something else, as an unfinished download leaves them."""

from __future__ import annotations

import string
from pathlib import Path

from merge_engine.errors import CheckpointError

START_BYTES = 19
"""So many bytes from the start of a file tell."""

# No header of a safetensors file can start with any of these: as a length, they are beyond the limit.
_FETCH = "download it again; the address may need a token"
_KINDS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the weights; run git lfs pull in its repository to fetch them",
    ),
    (b"<!DOCTYPE", f"a web page, not the weights; {_FETCH}"),
    (b"<!doctype", f"a web page, not the weights; {_FETCH}"),
    (b"<html", f"a web page, not the weights; {_FETCH}"),
    (b"<?xml", f"an error message of a server, not the weights; {_FETCH}"),
    (b"GGUF", "a GGUF file; convert it to safetensors"),
    (b"\x89HDF", "a file of Keras (HDF5); convert it to safetensors"),
)
_TEXT = frozenset(string.printable.encode())


def check_kind(path: Path, start: bytes) -> None:
    """Raise ``CheckpointError`` if a file that starts with these bytes is certainly no weight file."""
    for first, what in _KINDS:
        if start.startswith(first[:START_BYTES]):
            raise CheckpointError(f"{path}: {what}")
    if start and _TEXT.issuperset(start):  # "Access denied", {"error": ...}
        raise CheckpointError(f"{path}: a text, not the weights; {_FETCH}")
