"""The change from an earlier output to a new one, as renames that can be undone at any moment.

All files of the new output are complete under other names. A journal says which files give way and which ones come.
Then the earlier files move into the folder ``merge.part``, first those that make the output folder a checkpoint (its
index or ``model.safetensors``), and the new files get their names, such a file last. So a reader finds the earlier
model, no model, or the new one.

If a step fails, the same process undoes all of them. If the process is killed, the next merge into the folder reads
the journal and undoes them, or deletes the earlier files if the last step was done. Each step that is undone
is found by the places of its file alone, so undoing can be interrupted and begun again.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeGuard

from merge_engine.checkpoint.durable import sync
from merge_engine.checkpoint.layout import INDEX_FILE, SINGLE_FILE
from merge_engine.checkpoint.output_folder import HEADS, is_inside
from merge_engine.checkpoint.staged_files import staged_name
from merge_engine.checkpoint.unfinished import (
    PART_SUFFIX,
    RECORD_SUFFIX,
    STAGING,
    discard,
    drafts_in,
    is_unfinished,
)
from merge_engine.errors import OutputError
from merge_engine.storage.bounded import MAX_MANIFEST, read_bounded

_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR)  # or there is no such folder
_JOURNAL = "journal"
_FIELDS = ("earlier", "files", "shards")


class Publication:
    """Files that change places in an output folder. All names are relative to it.

    ``earlier`` are the files that give way, those that make the folder a checkpoint first. ``files`` are the staged
    files in the order of their numbers, ``shards`` the names of the shards.
    """

    def __init__(self, folder: Path, earlier: Sequence[str], files: Sequence[str], shards: Sequence[str]):
        self._folder = folder
        self._staging = folder / STAGING
        self._names = dict(zip(_FIELDS, map(list, (earlier, files, shards)), strict=True))
        self._aside = {name: self._staging / f"old-{number}" for number, name in enumerate(earlier)}
        self._heads = [name for name in earlier if name in HEADS]
        self._come = {name: self._staging / staged_name(number) for number, name in enumerate(files)}
        self._come |= {name: folder / (name + PART_SUFFIX) for name in shards}
        self._last = INDEX_FILE if INDEX_FILE in files else SINGLE_FILE

    @classmethod
    def read(cls, folder: Path) -> Publication | None:
        """The publication that was begun in ``folder`` and neither undone nor finished; None if there is none.

        Raises ``OutputError`` for a journal that is damaged, and ``OSError``.
        """
        path = folder / STAGING / _JOURNAL
        if not _exists(path):
            return None
        try:
            # Not parse_json: a file's name may be no UTF-8, which Python writes as halves of characters.
            names = None if path.is_symlink() else json.loads(read_bounded(path, MAX_MANIFEST))
        except (ValueError, RecursionError):
            names = None
        if not _is_journal(names, folder):
            raise OutputError(
                f"{path}: is damaged, so the earlier output in {path.parent} cannot be brought back; move that folder "
                "away, and choose another output"
            )
        return cls(folder, *(names[field] for field in _FIELDS))

    def begin(self) -> None:
        """Write the journal. Raises ``OSError``."""
        self._staging.mkdir(exist_ok=True)
        new = self._staging / f"{_JOURNAL}{PART_SUFFIX}"
        new.write_text(json.dumps(self._names), encoding="utf-8")
        sync(new)
        new.rename(self._staging / _JOURNAL)
        for folder in (self._staging, self._folder):
            sync(folder)

    def carry_out(self) -> None:
        """Do all renames. After an error, ``undo``. Raises ``OSError``."""
        for name in self._come:
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
        for name in self._heads:
            (self._folder / name).rename(self._aside[name])
        if self._heads:
            self._sync()
        for name, place in self._aside.items():
            if name not in self._heads:
                (self._folder / name).rename(place)
        for name, staged in self._come.items():
            if name != self._last:
                staged.rename(self._folder / name)
        self._sync()
        self._come[self._last].rename(self._folder / self._last)
        sync(self._folder)

    def is_done(self) -> bool:
        """Whether the last rename was done. Raises ``OSError``."""
        return self._has_come(self._last)

    def undo(self) -> None:
        """Bring the earlier files back, and give the new ones their former names. May be repeated after an error.

        Raises ``OutputError`` if somebody has put a file where an earlier one was, and ``OSError``.
        """
        self._send_back([self._last])
        self._send_back(name for name in self._come if name != self._last)
        self._bring_back(name for name in self._aside if name not in self._heads)
        self._bring_back(reversed(self._heads))
        self._remove_empty(self._come)

    def after_undoing(self, names: set[str]) -> set[str]:
        """The top-level ``names`` in the folder once ``recover`` has undone or finished this. Raises ``OSError``."""
        if self.is_done():
            return names
        come = {PurePosixPath(name).parts[0] for name in self._come}
        aside = {PurePosixPath(name).parts[0] for name in self._aside if not name.endswith(RECORD_SUFFIX)}
        return names - come | aside

    def clear_away(self) -> None:
        """Delete the journal and all files beside it, once everything is done or undone. Raises ``OSError``."""
        self._remove_empty(self._aside)
        discard(self._staging)

    def _send_back(self, names: Iterable[str]) -> None:
        for name in names:
            if self._has_come(name):
                (self._folder / name).rename(self._come[name])
        self._sync()

    def _bring_back(self, names: Iterable[str]) -> None:
        for name in names:
            target = self._folder / name
            if _exists(self._aside[name]):
                if _exists(target):
                    raise OutputError(
                        f"{target}: is in the place of an earlier file, {self._aside[name]}; move it away"
                    )
                target.parent.mkdir(parents=True, exist_ok=True)
                self._aside[name].rename(target)
        self._sync()

    def _has_come(self, name: str) -> bool:
        """Whether the file with this name is the new one."""
        if _exists(self._come[name]) or not _exists(self._folder / name):
            return False
        return name not in self._aside or _exists(self._aside[name])

    def _sync(self) -> None:
        homes = {(self._folder / name).parent for name in (*self._aside, *self._come)}
        levels = {
            level for home in homes for level in (home, *home.parents) if level.is_relative_to(self._folder)
        }
        for level in levels | {self._staging, self._folder}:
            if level.is_dir():
                sync(level)

    def _remove_empty(self, names: Iterable[str]) -> None:
        """Remove the subfolders of these files that are empty now, the deepest first."""
        levels = {level for name in names for level in PurePosixPath(name).parents if level.name}
        for level in sorted(levels, key=lambda level: -len(level.parts)):
            try:
                (self._folder / level).rmdir()
            except OSError as error:
                if error.errno not in _NOT_EMPTY:
                    raise


def recover(folder: Path) -> None:
    """Finish or undo what an interrupted merge began in ``folder``, and delete its staged files and drafts.

    Raises ``OutputError`` if that cannot be done without a loss, and ``OSError``.
    """
    if begun := _begun(folder):
        if not begun.is_done():
            begun.undo()
        begun.clear_away()
    elif _exists(folder / STAGING):
        discard(folder / STAGING)
    for drafts in drafts_in(folder):
        discard(drafts)


def names_after_recovery(folder: Path) -> list[str]:
    """The names in ``folder`` that ``recover`` leaves, without parts and records. Raises as ``recover`` does."""
    names = {entry.name for entry in folder.iterdir() if not is_unfinished(entry)}
    begun = _begun(folder)
    return sorted(names if begun is None else begun.after_undoing(names))


def _begun(folder: Path) -> Publication | None:
    """The publication that was begun in ``folder``. Raises ``OutputError`` if the files left by it are not known."""
    staging = folder / STAGING
    if staging.is_symlink() or (_exists(staging) and not staging.is_dir()):
        raise OutputError(f"{staging}: is in the way of a folder that a merge needs; move it away")
    begun = Publication.read(folder)
    if begun is None and _exists(staging):
        known = ("new-", _JOURNAL + PART_SUFFIX)
        others = [file for file in staging.iterdir() if not file.name.startswith(known)]
        if others:
            raise OutputError(f"{others[0]}: no merge knows this file; move it out of {staging}")
    return begun


def _exists(path: Path) -> bool:
    """Whether there is a file, folder or link. Raises ``OSError`` where that cannot be seen."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_journal(names: object, folder: Path) -> TypeGuard[dict[str, list[str]]]:
    if not isinstance(names, dict) or {*names} != {*_FIELDS}:
        return False
    inside = (
        isinstance(part, list) and all(is_inside(folder, name) for name in part) for part in names.values()
    )
    return all(inside) and not {*HEADS}.isdisjoint([*names["files"], *names["shards"]])
