"""A bare copy: read all inputs once, write as many bytes as the output has, and fsync.

    python -m merge_engine.bench.bare_copy OUTPUT_FOLDER OUTPUT_BYTES SHARD_BYTES INPUT [INPUT ...]

The first bytes of the inputs are written, to several files side by side. Nothing of merge_engine is used. As in a
merge, the inputs are read side by side, threads read and write at the same time, and whole pieces are written past
the page cache.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE = 8 << 20
THREADS = 4


class _Target:
    """A file that is written, past the page cache where the file system can do that."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.direct = self.descriptor
        with contextlib.suppress(OSError):
            self.direct = os.open(path, os.O_WRONLY | os.O_DIRECT)


def copy(folder: Path, nbytes: int, shard: int, inputs: list[Path]) -> None:
    """Read every byte of ``inputs`` in pieces, writing ``nbytes`` of them to files of ``shard`` bytes."""
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    pieces = sorted(
        (position, source) for source in sources for position in range(0, os.fstat(source).st_size, PIECE)
    )
    files = -(-nbytes // shard)
    ends = [nbytes // files + (number < nbytes % files) for number in range(files)]
    targets = [_Target(folder / f"{number}.safetensors") for number in range(files)]
    for target, end in zip(targets, ends, strict=True):
        os.posix_fallocate(target.descriptor, 0, end)
    writes = sorted((place, number) for number, end in enumerate(ends) for place in range(0, end, PIECE))
    # As in a merge, writes are spread over the whole time.
    shares = [number * len(writes) // len(pieces) for number in range(len(pieces) + 1)]

    def worker(first: int) -> None:
        buffer = memoryview(mmap.mmap(-1, PIECE))
        for number in range(first, len(pieces), THREADS):
            position, source = pieces[number]
            os.preadv(source, [buffer], position)
            for place, file in writes[shares[number] : shares[number + 1]]:
                data = buffer[: ends[file] - place]
                whole = len(data) % mmap.PAGESIZE == 0
                os.pwrite(targets[file].direct if whole else targets[file].descriptor, data, place)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(worker, range(THREADS)))
    for target in targets:
        os.fsync(target.descriptor)


if __name__ == "__main__":
    copy(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
