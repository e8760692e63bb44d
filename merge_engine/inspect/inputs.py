"""The inputs of a merge against its manifest: whether they are still the files that were merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from merge_engine.checkpoint import open_adapter, open_checkpoint
from merge_engine.errors import CheckpointError
from merge_engine.observe.recorded import RecordedInput, RecordedInputFile
from merge_engine.storage import File

_GONE = "is no longer there, seen from the folder that this command is started in"


def input_changes(label: str, recorded: RecordedInput) -> list[str]:
    """What has changed in an input since it was merged, a line for each file; empty if nothing has.

    ``label`` is what it is recorded under. Sizes, times and headers are compared, as in a fingerprint. No tensor is
    read.
    """
    model, lora = recorded.paths(label)
    gone = _GONE if lora is None else f"a part of it {_GONE}"
    try:
        if not all(Path(path).exists() for path in (model, lora) if path is not None):
            return [gone]
        checkpoint = open_checkpoint(Path(model))
        if lora is not None:
            checkpoint = replace(checkpoint, adapter=open_adapter(Path(lora)).files)
    except OSError as error:  # a name too long, a folder without permission
        return [f"cannot be read: {error.strerror}"]
    except CheckpointError as error:
        return [line.removeprefix(f"{model}: ") for line in str(error).splitlines()]
    if checkpoint.fingerprint == recorded.fingerprint:
        return []
    changes = list(_changes(checkpoint.contents, recorded.files))
    if checkpoint.adapter is not None and recorded.adapter is not None:
        changes += _changes(checkpoint.adapter.contents, recorded.adapter.files)
    return changes or ["its fingerprint has changed"]


def _changes(
    contents: Iterable[tuple[File, str]], recorded: Mapping[str, RecordedInputFile]
) -> Iterator[str]:
    found = {file.path.name: (file, header) for file, header in contents}
    for name in recorded:
        if name not in found:
            yield f"{name}: is no longer one of its weight files"
    for name, (file, header) in found.items():
        if name not in recorded:
            yield f"{name}: is a weight file that it did not have"
        elif change := _change(file, header, recorded[name]):
            yield f"{name}: {change}"


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
