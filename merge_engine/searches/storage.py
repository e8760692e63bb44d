"""Where a search is kept: a file, a database, or memory; and whether what is there belongs to this search."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_engine.arguments import path_of
from merge_engine.errors import SearchError, way_out
from merge_engine.report.history_data import Objective
from merge_engine.text import shortened, some

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

STUDY = "merge_engine"
"""The name of our study in a storage, and of the attribute with its fingerprint."""


@contextlib.contextmanager
def open_study(
    storage: str | Path | None, objectives: Sequence[Objective], fingerprint: Mapping[str, object]
) -> Iterator[Study]:
    """The study in a storage, new or as an earlier call left it, until the context ends.

    ``storage``: the path of a SQLite file, a URL as Optuna takes it, or None for memory. ``fingerprint`` is what the
    search depends on, as JSON has it. Raises ``SearchError`` if the storage cannot be used, if it holds another
    search, or if a search is going on in it now.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    place = "storage" if storage is None else shortened(storage)
    with _quiet(), contextlib.ExitStack() as stack:
        try:
            kept = _opened(storage, stack)
            study = optuna.create_study(
                storage=kept,
                study_name=STUDY,
                directions=[objective.direction for objective in objectives],
                load_if_exists=True,
            )
            _check(study, fingerprint, place)
            yield study
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError, ImportError) as error:
            said = str(error.__cause__ or error).split("\n")[0]
            raise SearchError(f"{place}: cannot be used as the storage of a search: {said}") from error


def _opened(storage: str | Path | None, stack: contextlib.ExitStack) -> BaseStorage:
    from optuna.storages import InMemoryStorage, RDBStorage

    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, str) and "://" in storage:
        url = storage
    else:
        file = path_of("storage", storage).absolute()
        stack.enter_context(_locked(file))
        url = f"sqlite:///{file}".replace("{", "{{").replace("}", "}}")  # Optuna fills in what is in braces
    kept = RDBStorage(url)
    stack.callback(kept.engine.dispose)
    return kept


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """A lock of a file against other searches. An empty file is a new database of SQLite's."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise SearchError(f"{file}: cannot be opened: {error.strerror}{way_out(error)}") from None
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SearchError(f"{file}: another search is going on in it; wait for its end") from None
        yield
    finally:
        os.close(descriptor)


def _check(study: Study, fingerprint: Mapping[str, object], place: str) -> None:
    """Leave the fingerprint in a new study. Raise ``SearchError`` for one that has another."""
    ours: dict[str, Any] = json.loads(json.dumps(fingerprint))
    found = study.user_attrs.get(STUDY)
    if found is None and not study.trials:
        study.set_user_attr(STUDY, ours)
        return
    other = "it goes on with the same search only; give this one another storage"
    if not isinstance(found, dict):
        raise SearchError(f"{place}: holds a study of another program; {other}")
    different = [name for name in ours if found.get(name) != ours[name]]
    if different:
        raise SearchError(
            f"{place}: holds a search with {some([_difference(n, found, ours) for n in different])}; {other}"
        )


def _difference(name: str, found: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Which part of a search differs, with the names in it: ``another space (density)``."""
    theirs, mine = found.get(name) or {}, ours[name]
    names = [each for each in {**mine, **theirs} if mine.get(each) != theirs.get(each)]
    return f"{'other' if name.endswith('s') else 'another'} {name} ({some(names)})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's own messages, a line for each trial, are not printed."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
