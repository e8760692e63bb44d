"""The manifest of a merge, checked: a folder may hold a file that no merge wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from merge_engine.checkpoint import MANIFEST_NAME
from merge_engine.checkpoint.strict_json import parse_json
from merge_engine.errors import ReportError
from merge_engine.methods import METHODS
from merge_engine.observe.discards import Discards, sum_up
from merge_engine.observe.manifest import FORMAT
from merge_engine.observe.result import ModelCounts, TensorResult
from merge_engine.recipe import Recipe, load_recipe
from merge_engine.text import without_common_folder

_Count = Annotated[int, Field(strict=True)]


class _Counts(BaseModel):
    kept: _Count
    lost: _Count
    saved_by_trim: _Count
    saved_by_sign: _Count

    def plain(self) -> ModelCounts:
        return ModelCounts(self.kept, self.lost, self.saved_by_trim, self.saved_by_sign)


class _Tensor(BaseModel):
    elements: _Count
    counts: dict[int, _Counts] = {}


class Input(BaseModel):
    """One input: its fingerprint when it was merged, and its roles (``base``, or recipe positions)."""

    fingerprint: str
    roles: tuple[str, ...] = ()


class _Manifest(BaseModel):
    format: Literal[2]
    recipe: str
    digest: str
    inputs: dict[str, Input]
    tensors: dict[str, _Tensor]
    counts: dict[int, _Counts]
    notes: list[str] = []


class Record:
    """A finished merge: its recipe, inputs by path, counts, and the labels of its models by recipe position.

    Labels leave out the folder that all models share.
    """

    def __init__(self, folder: Path):
        """Read the manifest in ``folder``.

        Raises ``ReportError`` if there is none, if it is not one of ours, or if it has no counts.
        """
        manifest = _read(folder / MANIFEST_NAME)
        self.folder = folder
        self.recipe: Recipe = load_recipe(manifest.recipe)
        self.digest = manifest.digest
        self.inputs = manifest.inputs
        self.notes = manifest.notes
        if not manifest.counts:
            raise ReportError(
                f"{folder}: merged by {self.recipe.merge_method}, which has no task vectors; a report shows what "
                "became of them"
            )
        unknown = [model for model in manifest.counts if not 0 <= model < len(self.recipe.models)]
        if unknown:
            raise ReportError(f"{folder / MANIFEST_NAME}: counts models that its recipe lacks; merge again")
        names = {model: str(self.recipe.models[model].model) for model in sorted(manifest.counts)}
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


def _read(path: Path) -> _Manifest:
    try:
        document = parse_json(path.read_bytes())
        found = document.get("format") if isinstance(document, dict) else None
        if type(found) is int and found != FORMAT:
            raise ReportError(
                f"{path}: has format {found}, and this version of merge_engine reads format {FORMAT}; "
                "run the merge again"
            )
        return _Manifest.model_validate(document)
    except FileNotFoundError:
        raise ReportError(
            f"{path.parent}: holds no {MANIFEST_NAME}; name the output folder of a merge"
        ) from None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ReportError(f"{path}: not the manifest of a merge: {place!r}: {first['msg']}") from None
    except ValueError as error:
        raise ReportError(f"{path}: no valid JSON: {error}") from None
