"""A finished merge, from the manifest in its folder: what a report is about."""

from __future__ import annotations

from pathlib import Path

from merge_engine.checkpoint import MANIFEST_NAME
from merge_engine.errors import ReportError
from merge_engine.methods import METHODS
from merge_engine.observe.discards import Discards, sum_up
from merge_engine.observe.recorded import read_manifest
from merge_engine.observe.result import TensorResult
from merge_engine.recipe import Recipe, load_recipe
from merge_engine.text import without_common_folder


class Record:
    """A finished merge: its recipe, inputs by path, counts, and the labels of its models by recipe position.

    Labels leave out the folder that all models share. ``removed`` are the names of the inputs that were made by other
    recipes, and removed.
    """

    def __init__(self, folder: Path):
        """Read the manifest in ``folder``.

        Raises ``ManifestError`` if there is none or it is not one of ours, and ``ReportError`` if it has no counts.
        """
        manifest = read_manifest(folder)
        self.folder = folder
        self.recipe: Recipe = load_recipe(manifest.recipe)
        self.digest = manifest.digest
        self.inputs = manifest.inputs
        self.removed = {name for name, each in manifest.intermediates.items() if each.path is None}
        self.notes = manifest.notes
        if not manifest.counts:
            raise ReportError(
                f"{folder}: merged by {self.recipe.merge_method}, which has no task vectors; a report shows what "
                "became of them"
            )
        named = self.recipe.stacks.models
        unknown = [model for model in manifest.counts if not 0 <= model < len(named)]
        if unknown:
            raise ReportError(f"{folder / MANIFEST_NAME}: counts models that its recipe lacks; merge again")
        names = {model: str(named[model]) for model in sorted(manifest.counts)}
        self.labels = dict(zip(names, without_common_folder(list(names.values())), strict=True))
        self.elements = sum(tensor.elements for tensor in manifest.tensors.values())
        tensors = [
            TensorResult(name, tensor.elements, {model: c.plain() for model, c in tensor.counts.items()})
            for name, tensor in manifest.tensors.items()
        ]
        total = {model: manifest.counts[model].plain() for model in self.labels}
        self.discards: Discards = sum_up(tensors, total)

    @property
    def elects(self) -> bool:
        """Whether the method elects signs. Without an election no entry is lost."""
        method = METHODS.get(self.recipe.merge_method)
        return method is not None and method.elects

    @property
    def trims_whole_model(self) -> bool:
        """Whether one trim spans all tensors, so that entries saved by its slack are counted in total only."""
        return self.recipe.parameters.get("trim_scope") == "model"
