"""The inputs of a merge against its manifest: whether they are still the files that were merged."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from merge_engine.checkpoint import open_checkpoint
from merge_engine.errors import CheckpointError
from merge_engine.observe.recorded import RecordedInput, RecordedInputFile
from merge_engine.storage import File


def input_changes(path: Path, recorded: RecordedInput) -> list[str]:
    """What has changed in an input since it was merged, a line for each file; empty if nothing has.

    Sizes, times and headers are compared, as in a fingerprint. No tensor is read.
    """
    try:
        if not path.exists():
            return ["is no longer there, seen from the folder that this command is started in"]
        checkpoint = open_checkpoint(path)
    except OSError as error:  # a name too long, a folder without permission
        return [f"cannot be read: {error.strerror}"]
    except CheckpointError as error:
        return [line.removeprefix(f"{path}: ") for line in str(error).splitlines()]
    if checkpoint.fingerprint == recorded.fingerprint:
        return []
    found = {file.path.name: (file, header) for file, header in checkpoint.contents}
    changes = [
        f"{name}: is no longer one of its weight files" for name in recorded.files if name not in found
    ]
    for name, (file, header) in found.items():
        if name not in recorded.files:
            changes.append(f"{name}: is a weight file that it did not have")
        elif change := _change(file, header, recorded.files[name]):
            changes.append(f"{name}: {change}")
    return changes or ["its fingerprint has changed"]


def _change(file: File, header: str, recorded: RecordedInputFile) -> str:
    """The first difference between a file and the one that was merged; "" if there is none."""
    if file.size != recorded.bytes:
        return f"has {file.size} bytes; {recorded.bytes} when it was merged"
    if header != recorded.header:
        return "has another header than when it was merged"
    if file.mtime_ns != recorded.mtime_ns:
        now, then = _time(file.mtime_ns), _time(recorded.mtime_ns)
        return f"was written {now}; the file that was merged was written {then}"
    return ""


def _time(nanoseconds: int) -> str:
    """A time to the second, or as the number it is if it is no date."""
    try:
        return datetime.fromtimestamp(nanoseconds // 10**9, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return f"at {nanoseconds} ns"
