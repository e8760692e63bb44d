"""The tensors of weight files, block by block, against the digests of a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from xxhash import xxh3_128

from merge_engine.checkpoint import TensorInfo
from merge_engine.errors import CheckpointError
from merge_engine.inspect.reading import STEP, access_to, in_threads, load
from merge_engine.observe.digests import BLOCK, tensor_digest
from merge_engine.observe.recorded import RecordedTensor
from merge_engine.operands import Access
from merge_engine.storage import Extent, File, is_cached, open_range

_COPIED = 1 << 20  # bytes that are copied out of the page cache at a time

CHANGED = "not as they were merged"


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a tensor: bytes [start, end) of the file. ``number`` counts from 1 to ``of``.

    ``digest`` (32 hexadecimal digits) is the manifest's: the block's own, or the tensor's if it is the only block.
    """

    tensor: str
    number: int
    of: int
    start: int
    end: int
    digest: str


@dataclass(frozen=True, slots=True)
class Damage:
    """Blocks of a file that follow each other and are wrong for one ``reason``."""

    file: File
    blocks: tuple[Block, ...]
    reason: str


def blocks_of(tensor: TensorInfo, recorded: RecordedTensor) -> list[Block]:
    """The blocks of a tensor in a file.

    Raises ``ValueError`` if the manifest has digests for another number of blocks.
    """
    starts = range(tensor.start, tensor.start + tensor.nbytes, BLOCK)
    digests = recorded.blocks if len(starts) > 1 else [recorded.digest] * len(starts)
    if len(digests) != len(starts):
        raise ValueError(f"digests of {len(digests)} blocks, and not of {len(starts)}")
    end = tensor.start + tensor.nbytes
    return [
        Block(tensor.name, number, len(starts), start, min(start + BLOCK, end), digest)
        for number, (start, digest) in enumerate(zip(starts, digests, strict=True), start=1)
    ]


def check_blocks(files: Mapping[File, Sequence[Block]], progress: Callable[[int], None]) -> Iterator[Damage]:
    """Read the blocks of each file, and yield those that are not as they were merged, or that cannot be read.

    Blocks are in the order of the file and leave no gap. Each byte is read once. ``progress`` is called with the number
    of bytes that were read.
    """
    work = [(file, unit) for file, blocks in files.items() for unit in _units(blocks)]
    bad: list[tuple[File, Block, str]] = []
    with access_to(files.keys()) as access, in_threads(partial(_check, access), work) as results:
        for (file, unit), reasons in zip(work, results, strict=True):
            bad += [(file, block, why) for block, why in zip(unit, reasons, strict=True) if why]
            progress(unit[-1].end - unit[0].start)
    yield from _runs(bad)


def _units(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks that are read together: one large one, or small ones that follow each other."""
    unit: list[Block] = []
    for block in blocks:
        if unit and block.end - unit[0].start > BLOCK:
            yield unit
            unit = []
        unit.append(block)
    if unit:
        yield unit


def _check(access: Access, work: tuple[File, list[Block]]) -> list[str]:
    """For each block the reason why it is wrong, or ""."""
    file, unit = work
    try:
        digests = _digests(access, file, unit)
    except CheckpointError as error:
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else "the file has changed"
        return [f"cannot be read: {reason}"] * len(unit)
    return [
        "" if block.digest == (digest.hex() if block.of > 1 else tensor_digest([digest])) else CHANGED
        for block, digest in zip(unit, digests, strict=True)
    ]


def _digests(access: Access, file: File, unit: Sequence[Block]) -> list[bytes]:
    """The digest (16 bytes) of each block."""
    digests: list[bytes] = []
    running, at = xxh3_128(), unit[0].start
    # A page that is missing in a mapping makes the system read a little ahead and wait. A read asks for more, and
    # a small buffer stays in the processor's cache until it is digested.
    copied = access.way == "cached" and not is_cached(access.files.descriptor(file), unit[-1].end - 1)
    step = _COPIED if copied else STEP
    for start in range(at, unit[-1].end, step):
        extent = Extent(file, unit[0].tensor, start, min(step, unit[-1].end - start))
        found = open_range(access.files, extent, access.way, in_place=not copied)
        data = load(found)
        while data.nbytes:
            block = unit[len(digests)]
            piece = data[: block.end - at]
            running.update(piece)
            at, data = at + piece.nbytes, data[piece.nbytes :]
            if at == block.end:
                digests.append(running.digest())
                running = xxh3_128()
        found.verify()
        found.release()
    return digests


def _runs(bad: Sequence[tuple[File, Block, str]]) -> Iterator[Damage]:
    """Wrong blocks that follow each other, together."""
    run: list[Block] = []
    for number, (file, block, reason) in enumerate(bad):
        run.append(block)
        following = bad[number + 1] if number + 1 < len(bad) else None
        if following is None or (following[0], following[1].start, following[2]) != (file, block.end, reason):
            yield Damage(file, tuple(run), reason)
            run = []
