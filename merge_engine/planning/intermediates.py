"""Outputs of recipes that other recipes of the same file merge further."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_engine.checkpoint import Checkpoint, open_reference
from merge_engine.operands import Stored, Unwritten
from merge_engine.recipe import ModelReference, Recipe, parts_of

if TYPE_CHECKING:
    from merge_engine.planning.plan import MergePlan


@dataclass(frozen=True)
class Intermediate:
    """The output of a recipe with a name, in ``folder``, and the plan that it is made by.

    ``digest`` is that of its tensors in hexadecimal; None while the folder holds no values yet, only headers and the
    files beside the weights. ``kept`` says that the folder stays when the result is there.
    """

    name: str
    folder: Path
    plan: MergePlan
    digest: str | None = None
    kept: bool = False


def open_model(reference: ModelReference, intermediates: Mapping[str, Intermediate]) -> Checkpoint:
    """Open the checkpoint that a recipe names: an intermediate, a folder or file, or one on the hub.

    Raises ``CheckpointError``.
    """
    made = intermediates.get(reference.path)
    if made is None:
        return open_reference(reference)
    opened = open_reference(reference.model_copy(update={"path": str(made.folder)}))
    if made.digest is not None:
        return opened
    unwritten = {
        name: Unwritten(o.name, o.dtype, o.shape, o.file, o.position, o.owner)
        for name, o in opened.tensors.items()
        if isinstance(o, Stored)
    }
    return replace(opened, tensors=unwritten)


def used_by(recipe: Recipe, intermediates: Mapping[str, Intermediate]) -> tuple[Intermediate, ...]:
    """The intermediates that a recipe is made of, and those that these are made of, in the order of their making."""
    used: dict[str, Intermediate] = {}
    for name in parts_of(recipe, intermediates):
        for each in (*intermediates[name].plan.intermediates, intermediates[name]):
            used.setdefault(each.name, each)
    return tuple(used.values())


def named(text: str, intermediates: Iterable[Intermediate]) -> str:
    """A message with names in place of the folders that do not stay."""
    for each in intermediates:
        if not each.kept:
            text = text.replace(str(each.folder), each.name)
    return text
