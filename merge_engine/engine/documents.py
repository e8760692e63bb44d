"""Several recipes of one file: what one makes is an input of others.

All recipes are planned before the first is merged. In place of an output that is not there yet, the others are planned
with its headers and the files beside its weights, in a folder of their own. Then the recipes are merged one after the
other, each into an ordinary checkpoint: on the RAM disk if it has the room, or else beside the output.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from merge_engine.checkpoint import MANIFEST_NAME, CheckpointTransaction
from merge_engine.engine.records import plan_key
from merge_engine.engine.side_files import add_side_files, side_files_of
from merge_engine.errors import ManifestError, MergeError, OutputError, PlanError, RecipeError, way_out
from merge_engine.observe.digests import digest_of
from merge_engine.observe.recorded import read_manifest
from merge_engine.observe.result import MergeResult
from merge_engine.observe.versions import versions
from merge_engine.planning import Intermediate, MergePlan, check_recipe, make_plan, named
from merge_engine.recipe import Recipe, parts_of
from merge_engine.storage.scratch import RAM_DISK, room_in_memory, scratch_folder
from merge_engine.text import counted, shown, size_text, some


class Merge(Protocol):
    """Carries out a plan, into a folder or, without one, into memory. ``resumable``: so that it can be gone on with."""

    def __call__(self, planned: MergePlan, folder: Path | None, *, resumable: bool = True) -> MergeResult: ...  # noqa: D102


@dataclass(frozen=True)
class DocumentOptions:
    """Settings for all recipes of a file.

    ``shard_size``, ``overwrite`` and ``lenient``: see ``make_plan``. ``keep`` is the folder that keeps the outputs of
    recipes with a name; None removes them. ``lazy`` takes over those that are there already, made by the same recipe
    from the same inputs.
    """

    shard_size: int
    overwrite: bool = False
    lenient: bool = False
    keep: Path | None = None
    lazy: bool = True


@contextmanager
def planned_together(
    recipes: Sequence[Recipe], output: Path | None, options: DocumentOptions
) -> Iterator[list[MergePlan]]:
    """Plan recipes from ``load_recipes``; the last one is the result's, which goes to ``output``.

    Without ``keep`` recipes that the result does not need have no plan. The files that stand for outputs are there
    until the context ends. Raises ``MergeError`` with all problems of all recipes.
    """
    with scratch_folder(_place_of_headers()) as scratch:
        intermediates: dict[str, Intermediate] = {}
        failed: set[str] = set()
        errors: list[MergeError] = []
        plans: list[MergePlan] = []
        for recipe in needed(recipes, options):
            is_result = recipe is recipes[-1]
            target = output if is_result else _kept_folder(recipe, options)
            try:
                if lacking := failed.intersection(parts_of(recipe, dict.fromkeys(failed))):
                    failed.add(_name(recipe))
                    check_recipe(
                        recipe, lenient=options.lenient, intermediates=intermediates, unknown=lacking
                    )
                    continue
                planned = _plan(recipe, target, options, intermediates)
                plans.append(planned)
                if not is_result:
                    folder = scratch / _name(recipe)
                    _write_headers(planned, folder)
                    intermediates[_name(recipe)] = Intermediate(_name(recipe), folder, planned)
            except MergeError as error:
                failed.add(_name(recipe))
                place = "" if recipe.name is None else f"{recipe.name}: "
                lines = [named(line, intermediates.values()) for line in error.problems]
                errors.append(type(error)([place + line for line in lines]))
        if problems := _overlaps(recipes, output, options):
            errors.append(PlanError(problems))
        if errors:
            raise _together(errors)
        yield plans


def merge_documents(
    recipes: Sequence[Recipe],
    output: Path | None,
    options: DocumentOptions,
    merge: Merge,
) -> MergeResult:
    """Merge recipes from ``load_recipes``, the last one into ``output`` (None: into memory), and return its result.

    ``merge`` carries out one plan. Raises ``MergeError`` as ``planned_together`` does, before anything is merged, and
    what ``merge`` raises. The bytes are those of the same recipes merged one after the other into folders.
    """
    with planned_together(recipes, output, options) as plans:
        nbytes = sum(planned.bytes_written for planned in plans[:-1])
    with _folder_for(nbytes, plans[-1], output, options) as folder:
        intermediates: dict[str, Intermediate] = {}
        for recipe in needed(recipes, options)[:-1]:
            name = _name(recipe)
            try:
                made = _make(recipe, folder / name, options, intermediates, merge)
            except MergeError as error:
                lines = [f"{name}: {named(line, intermediates.values())}" for line in error.problems]
                MergeError.__init__(error, [line.replace(f"{folder / name}", name) for line in lines])
                raise
            intermediates[name] = made
        planned = _plan(recipes[-1], output, options, intermediates)
        try:
            result = merge(planned, output)
        except MergeError as error:
            MergeError.__init__(error, [named(line, intermediates.values()) for line in error.problems])
            raise
    unused = [each.name or "" for each in recipes if each not in needed(recipes, options)]
    if unused:
        result.warnings.append(f"not merged, because the result does not need them: {some(unused)}")
    return result


def needed(recipes: Sequence[Recipe], options: DocumentOptions) -> list[Recipe]:
    """The recipes that are merged: all if their outputs are kept, or else those that the last one is made of."""
    if options.keep is not None:
        return list(recipes)
    names = {_name(recipe): recipe for recipe in recipes}
    found: set[str] = set()
    waiting = [_name(recipes[-1])]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += parts_of(names[name], names)
    return [recipe for recipe in recipes if _name(recipe) in found]


def check_result(recipes: Sequence[Recipe], options: DocumentOptions) -> None:
    """Raise ``RecipeError`` if all recipes have names and no other uses several: which one is the result's?"""
    if recipes[-1].name is None or options.keep is not None:
        return
    names = {_name(recipe): recipe for recipe in recipes}
    used = {part for recipe in recipes for part in parts_of(recipe, names)}
    ends = [name for name in names if name not in used]
    if len(ends) > 1:
        raise RecipeError(
            f"which recipe is the result is not clear: no other uses {some([shown(name) for name in ends])}; leave out "
            "the name of the one that is"
        )


def _plan(
    recipe: Recipe, target: Path | None, options: DocumentOptions, intermediates: Mapping[str, Intermediate]
) -> MergePlan:
    """The plan of one recipe. Its messages have names in place of folders that do not stay, and those of its
    intermediates come first.
    """
    planned = make_plan(
        recipe,
        target,
        shard_size=options.shard_size,
        overwrite=options.overwrite,
        lenient=options.lenient,
        intermediates=intermediates,
    )
    used = planned.intermediates
    before = [line for each in used for line in each.plan.warnings]
    place = "" if recipe.name is None else f"{recipe.name}: "
    own = [place + named(line, used) for line in planned.warnings]
    notes = tuple(named(line, used) for line in planned.notes)
    return replace(planned, notes=notes, warnings=tuple(dict.fromkeys([*before, *own])))


def _make(
    recipe: Recipe,
    folder: Path,
    options: DocumentOptions,
    intermediates: Mapping[str, Intermediate],
    merge: Merge,
) -> Intermediate:
    """The output of a recipe with a name, merged now or taken over."""
    kept = options.keep is not None
    planned = _plan(recipe, None, options, intermediates)
    if not (kept and options.lazy and _is_made(planned, folder)):
        merge(_plan(recipe, folder, options, intermediates), folder, resumable=kept)
    return Intermediate(_name(recipe), folder, planned, read_manifest(folder).digest, kept)


def _is_made(planned: MergePlan, folder: Path) -> bool:
    """Whether a folder holds the output of this plan, by its manifest and the sizes of its files."""
    if not plan_key(planned) or not (folder / MANIFEST_NAME).exists():
        return False
    try:
        manifest = read_manifest(folder)
    except ManifestError:
        return False
    inputs = {each.label: each for each in (planned.donor, *planned.bases, *planned.models.values())}
    shards = {shard.name: (shard.size, digest_of(shard.header)) for shard in planned.shards}
    sizes = {name: file.bytes for name, file in manifest.files.items()} | {
        name: shard.bytes for name, shard in manifest.shards.items()
    }
    return (
        manifest.versions.get("merge_engine") == versions()["merge_engine"]
        and manifest.recipe == planned.recipe.to_yaml()
        and {path: one.fingerprint for path, one in manifest.inputs.items()}
        == {str(path): given.fingerprint for path, given in inputs.items()}
        and {name: (shard.bytes, shard.header) for name, shard in manifest.shards.items()} == shards
        and all(_size(folder / name) == nbytes for name, nbytes in sizes.items())
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def _write_headers(planned: MergePlan, folder: Path) -> None:
    """Write what a plan needs of an output: weight files without values, and the files beside them."""
    try:
        with CheckpointTransaction(folder, planned.shards) as transaction:
            for shard in planned.shards:
                with transaction.part_of(shard).open("xb") as file:
                    file.write(shard.header)
                    file.truncate(shard.size)
            add_side_files(planned, transaction, side_files_of(planned))
            transaction.finish()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}{way_out(error)}") from error


def _kept_folder(recipe: Recipe, options: DocumentOptions) -> Path | None:
    """The folder of an output to check before anything is merged; None if it does not stay, or may be taken over."""
    if options.keep is None:
        return None
    folder = options.keep / _name(recipe)
    return None if options.lazy and (folder / MANIFEST_NAME).exists() else folder


def _overlaps(recipes: Sequence[Recipe], output: Path | None, options: DocumentOptions) -> list[str]:
    """The problems of outputs that would lie in each other."""
    if output is None or options.keep is None:
        return []
    one = output.resolve()
    folders = [options.keep / _name(recipe) for recipe in recipes[:-1]]
    return [
        f"{output}: lies inside or around {folder}, which another recipe writes; write somewhere else"
        for folder in folders
        if one.is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(one)
    ]


def _place_of_headers() -> Path:
    return RAM_DISK if room_in_memory(1) else Path(tempfile.gettempdir())


@contextmanager
def _folder_for(
    nbytes: int, result: MergePlan, output: Path | None, options: DocumentOptions
) -> Iterator[Path]:
    """The folder for outputs of ``nbytes`` in all that others are made of. Raises ``PlanError`` if no disk has room."""
    if options.keep is not None:
        yield options.keep
        return
    place = RAM_DISK
    if not room_in_memory(nbytes):
        place = Path(tempfile.gettempdir()) if output is None else _nearest_existing(output.absolute().parent)
        more = 0 if output is None else result.bytes_written
        free = shutil.disk_usage(place).free
        if nbytes + more > free:
            raise PlanError(
                f"{place}: {counted(len(result.intermediates), 'output')} that the result is made of, and the result "
                f"itself, need {size_text(nbytes + more)}, its disk has {size_text(free)} free"
            )
    try:
        with scratch_folder(place) as folder:
            yield folder
    except PermissionError as error:
        if Path(os.fspath(error.filename or "")).parent != place:
            raise
        raise OutputError(f"{place}: cannot be written: {error.strerror}{way_out(error)}") from error


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _name(recipe: Recipe) -> str:
    """The name by which others refer to it; "" without one."""
    return recipe.name or ""


def _together(errors: Sequence[MergeError]) -> MergeError:
    """One error with the problems of all, of their kind if they have the same."""
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else PlanError
    return kind([line for error in errors for line in error.problems])
