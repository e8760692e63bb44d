"""What moving the bytes takes: read all inputs once, write as many bytes as the output has, and fsync.

    python -m merge_engine.bench.bare_copy OUTPUT_FOLDER OUTPUT_BYTES INPUT [INPUT ...]

The first bytes read are what is written, to one file. Nothing of merge_engine is used. As in a merge, the inputs are
read side by side, threads read and write at the same time, and whole pieces are written past the page cache.
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


def copy(output: Path, nbytes: int, inputs: list[Path]) -> None:
    """Read every byte of ``inputs`` in pieces, writing ``nbytes`` of them to the file ``output``."""
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    pieces = sorted(
        (position, source) for source in sources for position in range(0, os.fstat(source).st_size, PIECE)
    )
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    direct = target
    with contextlib.suppress(OSError):  # file systems without direct writes
        direct = os.open(output, os.O_WRONLY | os.O_DIRECT)
    os.posix_fallocate(target, 0, nbytes)
    # As in a merge, writing is spread over all of the time.
    writes = [number * nbytes // len(pieces) // PIECE for number in range(len(pieces) + 1)]

    def worker(first: int) -> None:
        buffer = memoryview(mmap.mmap(-1, PIECE))
        for number in range(first, len(pieces), THREADS):
            position, source = pieces[number]
            os.preadv(source, [buffer], position)
            for place in range(writes[number], writes[number + 1]):
                os.pwrite(direct, buffer, place * PIECE)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(worker, range(THREADS)))
    rest = nbytes % PIECE
    os.pwrite(target, bytes(rest), nbytes - rest)
    os.fsync(target)


if __name__ == "__main__":
    copy(Path(sys.argv[1]) / "model.safetensors", int(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
