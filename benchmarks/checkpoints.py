"""Synthetic checkpoints of real shapes in bfloat16, made once and kept.

    python -m benchmarks.checkpoints --size 1.1b --tuned 2

The base is N(0, 0.02). A fine-tune adds N(0, 0.0002), a relative change of one hundredth, to 85 % of the
entries; about a quarter of those then round back to the base's value. As in real bfloat16 fine-tunes, task
vectors take few distinct magnitudes, and many entries lie exactly at any threshold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.shapes import ARCHITECTURES, Architecture
from merge_engine.checkpoint import CheckpointWriter, OutputTensor, open_checkpoint, plan_shards
from merge_engine.dtypes import BF16

FOLDER_VARIABLE = "MERGE_ENGINE_BENCH_DIR"
BASE_DEVIATION = 0.02
DELTA_DEVIATION = 0.0002
CHANGED = 0.85
SINGLE_FILE = 1 << 62
SHARD_BYTES = 500_000_000
_PIECE = 1 << 22  # elements drawn at a time


def cache_folder() -> Path:
    """Where checkpoints are kept: ``$MERGE_ENGINE_BENCH_DIR``, else a folder in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "merge_engine" / "benchmarks"
    return Path(os.environ.get(FOLDER_VARIABLE, default))


def draw_base(count: int, seed: int) -> torch.Tensor:
    """``count`` base weights in bfloat16, seeded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count).normal_(0, BASE_DEVIATION, generator=generator).bfloat16()


def draw_tuned(base: torch.Tensor, seed: int) -> torch.Tensor:
    """A fine-tune of ``base`` in bfloat16, seeded."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.empty(len(base)).normal_(0, DELTA_DEVIATION, generator=generator)
    # The lowest bits of a normal draw are as good as a second draw, and cost nothing.
    delta[(delta.view(torch.int32) & 0xFF) >= int(CHANGED * 256)] = 0
    return (base.float() + delta).bfloat16()


def make_checkpoints(
    size: str, tuned: int, *, distinct: int | None = None, sharded: bool = False
) -> tuple[Path, list[Path]]:
    """Folders of a base and ``tuned`` fine-tunes of it, made now unless they exist.

    Only ``distinct`` fine-tunes (default: all) have data of their own, the others are links to them.
    """
    architecture = ARCHITECTURES[size]
    description = repr((architecture, BASE_DEVIATION, DELTA_DEVIATION, CHANGED, _PIECE, sharded))
    root = cache_folder() / f"{size}-{hashlib.sha256(description.encode()).hexdigest()[:8]}"
    shard_size = SHARD_BYTES if sharded else SINGLE_FILE
    base = root / "base"
    _write(architecture, base, None, 0, shard_size)
    folders = []
    for number in range(1, tuned + 1):
        folder = root / f"tuned-{number}"
        original = (number - 1) % (distinct or tuned) + 1
        if original == number:
            _write(architecture, folder, base, number, shard_size)
        elif not folder.exists():
            folder.symlink_to(f"tuned-{original}", target_is_directory=True)
        folders.append(folder)
    return base, folders


def input_files(folders: list[Path]) -> list[Path]:
    """The weight files in checkpoint folders, each once."""
    return sorted({file.resolve() for folder in folders for file in folder.glob("*.safetensors")})


def weight_bytes(folder: Path) -> int:
    """Size of a checkpoint's weight files in bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _write(architecture: Architecture, folder: Path, base: Path | None, number: int, shard_size: int) -> None:
    """Write the base (``base`` is None), or fine-tune ``number`` of it, unless it is there and complete."""
    if folder.is_symlink():
        folder.unlink()  # only a link until now, but now its own data is wanted
    if any(folder.glob("*.safetensors")):
        return
    tensors = [OutputTensor(name, BF16, shape) for name, shape in architecture.tensors().items()]
    source = open_checkpoint(base) if base is not None else None

    def write_piece(name: str, start: int, count: int) -> None:
        digest = hashlib.blake2b(f"{name} {start} {number}".encode(), digest_size=7).digest()
        seed = int.from_bytes(digest, "little")
        if source is None:
            values = draw_base(count, seed)
        else:
            values = torch.empty(count, dtype=torch.bfloat16)
            source.read_into(name, 2 * start, memoryview(values.view(torch.uint8).numpy()))
            values = draw_tuned(values, seed)
        writer.write(name, 2 * start, memoryview(values.view(torch.uint8).numpy()))

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)  # pieces run side by side instead
    with CheckpointWriter(folder, plan_shards(tensors, shard_size)) as writer:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda piece: write_piece(*piece), _pieces(tensors)))
        writer.add_file("config.json", json.dumps(architecture.config(), indent=2).encode())
        writer.finish()
    torch.set_num_threads(threads)
    if source is not None:
        source.close()


def _pieces(tensors: list[OutputTensor]) -> Iterator[tuple[str, int, int]]:
    """(tensor, first element, number of elements) of what is drawn at a time."""
    for tensor in tensors:
        total = tensor.nbytes // BF16.itemsize
        for start in range(0, total, _PIECE):
            yield tensor.name, start, min(_PIECE, total - start)


def main() -> None:
    """Make checkpoints and print their folders."""
    parser = argparse.ArgumentParser(description="Make synthetic checkpoints for benchmarks.")
    parser.add_argument("--size", choices=ARCHITECTURES, default="1.1b")
    parser.add_argument("--tuned", type=int, default=2, help="number of fine-tunes (default 2)")
    parser.add_argument("--sharded", action="store_true", help="files of 500 MB instead of one")
    options = parser.parse_args()
    base, tuned = make_checkpoints(options.size, options.tuned, sharded=options.sharded)
    for folder in (base, *tuned):
        print(f"{weight_bytes(folder) / 1e9:8.3f} GB  {folder}")


if __name__ == "__main__":
    main()
