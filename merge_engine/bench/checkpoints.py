"""Synthetic checkpoints in bfloat16 with the shapes of real models, made once and kept.

The base is N(0, 0.02). A fine-tune adds N(0, 0.0002), a relative change of one hundredth, to 85 % of the
entries; about a quarter of those then round back to the base's value. As in real bfloat16 fine-tunes, task
vectors take few distinct magnitudes, and many entries lie exactly at any threshold.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from merge_engine.bench.limits import user_cache
from merge_engine.bench.shapes import ARCHITECTURES
from merge_engine.bench.tensor_memory import memory_of
from merge_engine.checkpoint import CheckpointWriter, OutputTensor, open_checkpoint, plan_shards
from merge_engine.checkpoint.shards import DEFAULT_SHARD_SIZE
from merge_engine.dtypes import BF16
from merge_engine.storage import OpenFiles, cores

FOLDER_VARIABLE = "MERGE_ENGINE_BENCH_DIR"
BASE_DEVIATION = 0.02
DELTA_DEVIATION = 0.0002
CHANGED = 0.85
_PIECE = 1 << 22  # elements drawn at a time


def cache_folder() -> Path:
    """Where checkpoints are kept by default: ``$MERGE_ENGINE_BENCH_DIR``, else a folder in the user's cache.

    Raises ``OptionError`` where there is neither.
    """
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else user_cache() / "benchmarks"


def draw_base(count: int, seed: int) -> torch.Tensor:
    """``count`` base weights in bfloat16, seeded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count).normal_(0, BASE_DEVIATION, generator=generator).bfloat16()


def draw_tuned(base: torch.Tensor, seed: int, changed: float = CHANGED) -> torch.Tensor:
    """A fine-tune of ``base`` in bfloat16, seeded. A share of entries is ``changed`` before rounding."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.empty(len(base)).normal_(0, DELTA_DEVIATION, generator=generator)
    # The lowest bits of a normal draw are as good as a second draw, and cost nothing.
    delta[(delta.view(torch.int32) & 0xFF) >= int(changed * 256)] = 0
    return (base.float() + delta).bfloat16()


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes below ``root``.

    The name of their shape, the most bytes of a weight file, and the share of entries that fine-tunes change before
    they are rounded.
    """

    root: Path
    size: str
    shard_size: int = DEFAULT_SHARD_SIZE
    changed: float = CHANGED

    @property
    def folder(self) -> Path:
        """The folder of its checkpoints. Its name has a digest of all settings that make the data."""
        about = (
            ARCHITECTURES[self.size],
            BASE_DEVIATION,
            DELTA_DEVIATION,
            self.changed,
            _PIECE,
            self.shard_size,
        )
        return self.root / f"{self.size}-{hashlib.sha256(repr(about).encode()).hexdigest()[:8]}"

    def make(self, tuned: int, distinct: int | None = None) -> tuple[Path, list[Path]]:
        """Folders of the base and of ``tuned`` fine-tunes, made now unless they exist.

        Only ``distinct`` fine-tunes (default: all) have data of their own, the others are links to them.
        Raises ``OutputError`` when the disk is too small.
        """
        base = self.folder / "base"
        _write(self, base, None, 0)
        folders = [self.folder / f"tuned-{number}" for number in range(1, tuned + 1)]
        for number, folder in enumerate(folders, start=1):
            original = (number - 1) % (distinct or tuned) + 1
            if original == number:
                _write(self, folder, base, number)
            elif not folder.exists():
                folder.symlink_to(f"tuned-{original}", target_is_directory=True)
        return base, folders

    def missing_bytes(self, tuned: int, distinct: int | None = None) -> int:
        """Disk space that ``make`` would take."""
        names = ["base", *(f"tuned-{number}" for number in range(1, min(tuned, distinct or tuned) + 1))]
        missing = [name for name in names if not _complete(self.folder / name)]
        return len(missing) * ARCHITECTURES[self.size].weight_bytes


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, links followed."""
    return sorted(file.resolve() for file in folder.glob("*.safetensors"))


def weight_bytes(folder: Path) -> int:
    """Size of a checkpoint's weight files in bytes."""
    return sum(file.stat().st_size for file in weight_files(folder))


def _complete(folder: Path) -> bool:
    """Whether there is a checkpoint with data of its own."""
    return not folder.is_symlink() and any(folder.glob("*.safetensors"))


def _write(family: Family, folder: Path, base: Path | None, number: int) -> None:
    """Write the base (``base`` is None), or fine-tune ``number`` of it, unless it is there and complete."""
    if _complete(folder):
        return
    if folder.is_symlink():
        folder.unlink()  # a link until now, but now with data of its own
    architecture = ARCHITECTURES[family.size]
    tensors = [OutputTensor(name, BF16, shape) for name, shape in architecture.tensors().items()]
    source = open_checkpoint(base).tensors if base is not None else {}
    files = OpenFiles()

    def write_piece(name: str, start: int, count: int) -> None:
        digest = hashlib.blake2b(f"{name} {start} {number}".encode(), digest_size=7).digest()
        seed = int.from_bytes(digest, "little")
        if base is None:
            values = draw_base(count, seed)
        else:
            values = torch.empty(count, dtype=torch.bfloat16)
            source[name].read_into(memory_of(values), start, files)
            values = draw_tuned(values, seed, family.changed)
        writer.write(name, 2 * start, memory_of(values))

    threads = cores()
    torch.set_num_threads(1)  # pieces run side by side instead
    with files, CheckpointWriter(folder, plan_shards(tensors, family.shard_size)) as writer:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda piece: write_piece(*piece), _pieces(tensors)))
        writer.add_file("config.json", json.dumps(architecture.config(), indent=2).encode())
        writer.finish()
    torch.set_num_threads(threads)


def _pieces(tensors: list[OutputTensor]) -> Iterator[tuple[str, int, int]]:
    """(tensor, first element, number of elements) of each piece that is drawn at a time."""
    for tensor in tensors:
        total = tensor.nbytes // BF16.itemsize
        for start in range(0, total, _PIECE):
            yield tensor.name, start, min(_PIECE, total - start)
