"""Work of other processes on a checkpoint that is written in parts. Imports no torch, so that they start quickly."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from merge_engine.checkpoint import CheckpointTransaction, ShardLayout, write_shard


def write_one(drafts: Path, layout: ShardLayout, data: dict[str, bytes]) -> int:
    """Write a shard, each tensor in two pieces, the later one first. Returns the number of the process."""
    with write_shard(drafts, layout) as shard:
        for name in reversed(layout.tensors):
            half = len(data[name]) // 2
            shard.write(name, half, memoryview(data[name])[half:])
            shard.write(name, 0, memoryview(data[name])[:half])
    return os.getpid()


def die_in_the_middle(drafts: Path, layout: ShardLayout, data: dict[str, bytes]) -> None:
    """Write the first tensor of a shard, and be killed."""
    with write_shard(drafts, layout) as shard:
        name = next(iter(layout.tensors))
        shard.write(name, 0, memoryview(data[name]))
        os.kill(os.getpid(), signal.SIGKILL)


def open_and_die(folder: Path, shards: list[ShardLayout], data: dict[str, bytes]) -> None:
    """Open a transaction, write its first shard and some of the next, and be killed."""
    drafts = CheckpointTransaction(folder, shards).open_drafts()
    write_one(drafts, shards[0], data)
    die_in_the_middle(drafts, shards[1], data)
