"""The inputs on a node: whether they are there, and those that the merge was planned with.

Headers are compared first. Two fine-tunes of one base have the same, so of a file that is a copy, with another time
or inode, some bytes are compared too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from xxhash import xxh3_128

from merge_engine.checkpoint import read_header
from merge_engine.errors import CheckpointError
from merge_engine.planning import MergePlan
from merge_engine.storage import File, Way, cached_share
from merge_engine.text import some

_SAMPLES = 64
_SAMPLE = 4096


@dataclass(frozen=True)
class Wanted:
    """An input file of a plan: ``file`` as it is on the planning machine, with an absolute path.

    ``header`` is the digest of its header (see ``Header``), None for files that are not safetensors.
    """

    file: File
    header: str | None


@dataclass(frozen=True)
class Seen:
    """A wanted file as a node sees it, or why it cannot be used: ``problem``.

    ``samples`` is a digest of some of its bytes, if the node's file is another one than that of the planning machine.
    """

    path: Path
    problem: str | None = None
    file: File | None = None
    samples: str | None = None


def wanted_files(plan: MergePlan) -> tuple[list[Wanted], dict[File, int]]:
    """The input files of a plan, and the number of each by the file as the plan has it."""
    headers = {file: digest for given in plan.inputs for file, digest in given.contents}
    adapters = [given.adapter for given in plan.inputs if given.adapter is not None]
    headers |= {file: digest for adapter in adapters for file, digest in adapter.contents}
    numbers = {file: number for number, file in enumerate(sorted(plan.files, key=lambda one: str(one.path)))}
    wanted = []
    for file in numbers:
        absolute = replace(file, path=Path(os.path.normpath(file.path.absolute())))
        wanted.append(Wanted(absolute, headers.get(file) if file.path.suffix == ".safetensors" else None))
    return wanted, numbers


def look(wanted: Sequence[Wanted], there: Callable[[Path], Path]) -> list[Seen]:
    """The wanted files on this machine. ``there`` gives their paths here."""
    return [_look_at(one, there(one.file.path)) for one in wanted]


def shares(files: Sequence[File], way: Way) -> list[float]:
    """The share of each file that the page cache of this machine holds; none where it is not read through it."""
    if way == "direct":
        return [0.0] * len(files)
    found = []
    for file in files:
        try:
            found.append(cached_share(file.path, len(files)))
        except OSError:  # the merge will say so
            found.append(0.0)
    return found


def differences(wanted: Sequence[Wanted], seen: Sequence[Seen]) -> list[str]:
    """The reasons why a node cannot use its files, one line for each folder and cause."""
    found: dict[tuple[str, str], list[str]] = {}
    for one, there in zip(wanted, seen, strict=True):
        problem = there.problem
        if problem is None and there.samples is not None and there.samples != samples_of(one.file):
            problem = "with other values than here"
        if problem is not None:
            found.setdefault((str(there.path.parent), problem), []).append(there.path.name)
    return [
        f"{folder}: {problem}: {some(names, 2)}; give the node the same files, or say where they are (ray paths)"
        for (folder, problem), names in found.items()
    ]


@cache
def samples_of(file: File) -> str:
    """A digest of pieces that are evenly spread over a file. Raises ``CheckpointError``."""
    digest = xxh3_128()
    step = max(file.size // _SAMPLES, 1)
    try:
        with file.path.open("rb", buffering=0) as data:
            for start in range(0, file.size, step):
                digest.update(os.pread(data.fileno(), _SAMPLE, start))
            digest.update(os.pread(data.fileno(), _SAMPLE, max(file.size - _SAMPLE, 0)))
    except OSError as error:
        raise CheckpointError(f"{file.path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _look_at(wanted: Wanted, path: Path) -> Seen:
    expected = wanted.file
    try:
        if not path.is_file():
            return Seen(path, "not there")
        file = File.of(path)
        if file.size != expected.size:
            return Seen(path, "with another size than here")
        if wanted.header is not None and read_header(path).digest != wanted.header:
            return Seen(path, "with another header than here")
        same = (file.mtime_ns, file.inode) == (expected.mtime_ns, expected.inode)
        return Seen(path, None, file, None if same else samples_of(file))
    except CheckpointError as error:
        return Seen(path, error.problems[0].removeprefix(f"{path}: "))
    except OSError as error:
        return Seen(path, f"cannot be read: {error.strerror}")
