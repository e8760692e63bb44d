"""Checks of an output folder: before a merge is planned, and again when the folder is locked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from merge_engine.checkpoint.output_folder import HEADS, OUR_SHARD, listed_files
from merge_engine.checkpoint.publication import names_after_recovery
from merge_engine.checkpoint.unfinished import drafts_in, is_unfinished
from merge_engine.errors import OutputError
from merge_engine.text import size_text, some

# Loaders take these for a model, or for a part of one.
_FOREIGN = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json")


def check_output_folder(
    folder: Path, inputs: Sequence[Path], overwrite: bool, needed_bytes: int
) -> list[str]:
    """The reasons why the output cannot be written to ``folder``, one line each; empty if it can.

    ``inputs`` are the folders or files of the input checkpoints. ``needed_bytes`` must be free even if an earlier
    output is overwritten, because that one is kept until the new one is complete.
    """
    try:
        return _problems(folder, inputs, overwrite, needed_bytes)
    except OutputError as error:  # what an interrupted merge has left cannot be brought back
        return error.problems
    except OSError as error:  # a name too long, a folder without permission
        return [f"{folder}: cannot be used as the output: {error.strerror}; choose another folder"]
    except RuntimeError:  # pathlib's error for links in a circle
        return [f"{folder}: a link in it leads back to itself; choose another folder"]


def _problems(folder: Path, inputs: Sequence[Path], overwrite: bool, needed_bytes: int) -> list[str]:
    problems = []
    if folder.exists() and not folder.is_dir():
        return [f"{folder}: is a file; the output is a folder"]
    resolved = folder.resolve()
    for source in dict.fromkeys(inputs):  # one may be named with and without a slash at its end
        # The folder of an input file is no input, but the file could be deleted as an earlier output.
        homes = [source.resolve()] if source.is_dir() else [source.parent.resolve(), source.resolve().parent]
        if resolved in homes:
            problems.append(f"{folder}: is the folder of the input {source}; write somewhere else")
        elif source.is_dir() and (resolved.is_relative_to(homes[0]) or homes[0].is_relative_to(resolved)):
            problems.append(f"{folder}: lies inside or around the input {source}; write somewhere else")
    if folder.is_symlink() and not folder.exists():
        return [
            *problems,
            f"{folder}: a link to {resolved}, which does not exist; make that folder, or remove the link",
        ]
    existing = _nearest_existing(resolved)
    if not existing.is_dir():
        return [*problems, f"{folder}: {existing} is a file, no folder can be made in it"]
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        return [*problems, f"{folder}: no permission to write to {existing}"]
    problems += contents_in_the_way(folder, overwrite)
    free = shutil.disk_usage(existing).free + _bytes_of_parts(folder)
    if free < needed_bytes:
        problems.append(
            f"{folder}: the output needs {size_text(needed_bytes)}, its disk has {size_text(free)} free"
        )
    return problems


def check_disk_space(needed: Mapping[Path, int]) -> list[str]:
    """The disks that have too little room for several outputs together, one line each.

    ``needed`` has the bytes of each output by its folder. Raises ``OSError``.
    """
    by_disk: dict[int, list[Path]] = {}
    for folder in needed:
        by_disk.setdefault(_nearest_existing(folder.resolve()).stat().st_dev, []).append(folder)
    problems = []
    for folders in by_disk.values():
        place = _nearest_existing(folders[0].resolve())
        free = shutil.disk_usage(place).free + sum(map(_bytes_of_parts, folders))
        total = sum(needed[folder] for folder in folders)
        if total > free:
            problems.append(
                f"{place}: {len(folders)} outputs need {size_text(total)} together, its disk has {size_text(free)} "
                "free; merge fewer recipes at a time, or choose another place"
            )
    return problems


def contents_in_the_way(folder: Path, overwrite: bool) -> list[str]:
    """The reasons why an output cannot take the place of what ``folder`` holds, one line each.

    Unfinished files of a merge are in nobody's way; files that it has put aside count as brought back. ``overwrite``
    allows an earlier output and other files, but no weights that loaders take and a merge never writes: beside the new
    configuration they would be a mixture. Raises ``OutputError`` as ``recover`` does, and ``OSError``.
    """
    if not folder.is_dir():
        return []
    names = names_after_recovery(folder)
    if names and not overwrite:
        return [f"{folder}: is not empty; choose another folder or pass --overwrite"]
    foreign = sorted({*names} & {*_FOREIGN})
    if foreign:
        foreign = sorted({*foreign} - {*listed_files(folder)})
    if not {*names} & {*HEADS}:
        foreign += sorted(
            name for name in names if name.endswith(".safetensors") and not OUR_SHARD.fullmatch(name)
        )
    if foreign:
        return [
            f"{folder}: holds {some(foreign)}, which a loader could take together with the new files; "
            "remove it or choose another folder"
        ]
    return []


def _bytes_of_parts(folder: Path) -> int:
    """Bytes on the disk of unfinished files: they are a part of the new output, or deleted before it is written."""
    if not folder.is_dir():
        return 0
    parts = [entry for entry in folder.iterdir() if is_unfinished(entry)]
    parts += [draft for drafts in drafts_in(folder) for draft in drafts.iterdir()]
    return sum(512 * part.lstat().st_blocks for part in parts)


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
