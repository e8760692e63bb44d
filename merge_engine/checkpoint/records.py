"""Records of complete parts. An interrupted merge goes on from them.

A record stands beside its part. It holds the key of the plan, the size, time and inode of the part, and bytes that
the merge needs again, such as counts and digests. It is trusted only if the part is still the file that it describes.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from xxhash import xxh3_128_hexdigest

from merge_engine.checkpoint.durable import sync
from merge_engine.checkpoint.shards import ShardLayout
from merge_engine.storage.bounded import MAX_MANIFEST, read_bounded


def write_record(folder: Path, shard: ShardLayout, key: str, record: bytes) -> None:
    """Note durably that the part of ``shard`` in ``folder`` is complete. Raises ``OSError``.

    The part must be on the disk already.
    """
    path = folder / shard.record_name
    found = os.lstat(folder / shard.part_name)
    described = json.dumps(_description(found, key)).encode() + b"\n" + record
    path.unlink(missing_ok=True)
    with path.open("xb") as file:  # a record that is cut off has another digest and counts as none
        file.write(xxh3_128_hexdigest(described).encode() + b"\n" + described)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def complete_parts(folder: Path, shards: Sequence[ShardLayout], key: str) -> dict[str, bytes]:
    """The records of the shards that a merge with the same key left complete in ``folder``, by the shard's name."""
    found = ((shard.name, _trusted_record(folder, shard, key)) for shard in shards)
    return {name: record for name, record in found if record is not None}


def open_own(path: Path | str, flags: int) -> int:
    """Open a file of this name as ``open`` does: follow no link, and do not wait for a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _description(found: os.stat_result, key: str) -> dict[str, object]:
    return {"key": key, "size": found.st_size, "mtime_ns": found.st_mtime_ns, "inode": found.st_ino}


def _trusted_record(folder: Path, shard: ShardLayout, key: str) -> bytes | None:
    path = folder / shard.record_name
    try:
        if path.is_symlink():
            return None
        digest, _, described = read_bounded(path, MAX_MANIFEST).partition(b"\n")
        with open(folder / shard.part_name, "rb", opener=open_own) as part:
            found = os.fstat(part.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size != shard.size:
                return None
            header = part.read(len(shard.header))
    except OSError:  # no record, no part, or a disk that cannot read them: the shard is merged again
        return None
    description, _, record = described.partition(b"\n")
    whole = digest == xxh3_128_hexdigest(described).encode()
    if not whole or header != shard.header or description != json.dumps(_description(found, key)).encode():
        return None
    return record
