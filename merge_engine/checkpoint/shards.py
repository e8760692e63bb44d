"""Dividing the output into shards by the rules of the Hugging Face hub, and the layout of each.

The header of a file follows from names, dtypes and shapes alone. It is encoded first, and the tensors can then be
written in any order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_engine.checkpoint.header import OutputTensor, TensorInfo, encode_header
from merge_engine.checkpoint.layout import SINGLE_FILE
from merge_engine.checkpoint.unfinished import PART_SUFFIX, RECORD_SUFFIX
from merge_engine.storage import PAGE

DEFAULT_SHARD_SIZE = 5_000_000_000

_MAX_SIZE = 2**63 - 1
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B?|B)?\s*", re.IGNORECASE)
# A lone B is mergekit's billion: 5B is its default shard size.
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class ShardLayout:
    """One file to write: its final name, its header, the place of each tensor by name, and its size in bytes."""

    name: str
    header: bytes
    tensors: dict[str, TensorInfo]
    size: int

    @property
    def part_name(self) -> str:
        """The name of the file until all files of the checkpoint are complete."""
        return self.name + PART_SUFFIX

    @property
    def record_name(self) -> str:
        """The name of the record of this file while it is complete and others are not."""
        return self.name + RECORD_SUFFIX


def plan_shards(
    tensors: Sequence[OutputTensor], limit: int, extra_metadata: Mapping[str, str] | None = None
) -> list[ShardLayout]:
    """Lay out the tensors in files of at most ``limit`` bytes of data.

    As on the hub, files are filled in the order given, and a tensor above the limit gets a file of its own.
    Inside a file, tensors of whole pages come first so that each starts on a page boundary; the others
    follow, widest elements first, so that each starts at a multiple of its element size. Every file's
    metadata is ``format: pt``, which loaders require, and ``extra_metadata``.
    """
    metadata = {"format": "pt", **(extra_metadata or {})}
    groups = _divide(tensors, limit)
    if len(groups) == 1:
        return [_lay_out(SINGLE_FILE, groups[0], metadata)]
    return [
        _lay_out(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, metadata)
        for number, group in enumerate(groups, start=1)
    ]


def parse_size(size: int | str) -> int:
    """Bytes from a number or from text with a decimal unit: ``5GB``, ``500M``, ``1.5 TB``, ``200_000``.

    Units are powers of 1000 as on the hub; ``B`` alone is a billion, as in mergekit.
    Raises ``ValueError`` for anything else and for sizes below one byte.
    """
    match = _SIZE.fullmatch(str(size).replace("_", ""))
    if match is None or isinstance(size, bool):
        raise ValueError(f"{size!r} is not a size; write 5GB, 500MB or a number of bytes")
    number, unit = match.groups()
    unit = (unit or "").upper()
    try:
        count = int(float(number) * _UNITS[unit[:1]]) if "." in number else int(number) * _UNITS[unit[:1]]
    except (OverflowError, ValueError):  # no double holds it, or more digits than Python converts
        count = _MAX_SIZE + 1
    if count > _MAX_SIZE:
        raise ValueError(f"{size!r:.60} is more bytes than any file has")
    if count < 1:
        raise ValueError(f"{size!r} is less than one byte")
    return count


def _divide(tensors: Sequence[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    groups: list[list[OutputTensor]] = []
    current: list[OutputTensor] = []
    filled = 0
    for tensor in tensors:
        if tensor.nbytes > limit:
            groups.append([tensor])
            continue
        if filled + tensor.nbytes > limit:
            groups.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += tensor.nbytes
    if current or not groups:
        groups.append(current)
    return groups


def _lay_out(name: str, tensors: Sequence[OutputTensor], metadata: dict[str, str]) -> ShardLayout:
    ordered = sorted(tensors, key=_alignment_rank)
    header = encode_header(ordered, metadata)
    places: dict[str, TensorInfo] = {}
    end = len(header)
    for tensor in ordered:
        places[tensor.name] = TensorInfo(tensor.name, tensor.dtype, tensor.shape, end, tensor.nbytes)
        end += tensor.nbytes
    return ShardLayout(name, header, places, end)


def _alignment_rank(tensor: OutputTensor) -> int:
    """Whole pages sort first; the rest by falling element size. Sorting is stable."""
    return -PAGE if tensor.nbytes % PAGE == 0 else -tensor.dtype.bits
