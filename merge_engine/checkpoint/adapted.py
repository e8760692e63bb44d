"""Opening what a reference names: a model, or a model with a LoRA adapter put into it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import islice

from merge_engine.checkpoint.adapter import Adapter, Factors, named, open_adapter
from merge_engine.checkpoint.hub import locate
from merge_engine.checkpoint.lora_settings import SETTINGS_FILE
from merge_engine.checkpoint.source import Checkpoint, open_checkpoint
from merge_engine.errors import CheckpointError
from merge_engine.operands import LowRank, Operand
from merge_engine.recipe import ModelReference
from merge_engine.text import counted

_PARTS = 3
"""Leading parts of an adapter's names that the model's names may lack."""


def open_reference(reference: ModelReference) -> Checkpoint:
    """Open a model, or a model with an adapter: then its tensors are those of the model with the adapter put into it.

    Names on the hub are downloaded. Tensor data is not read. Raises ``CheckpointError`` with every problem of model and
    adapter, and where the two do not fit together.
    """
    if reference.lora is None:
        return open_checkpoint(locate(reference.path, reference.revision))
    opened: list[Checkpoint | Adapter] = []
    problems = []
    for one, open_it in ((reference, open_checkpoint), (reference.lora, open_adapter)):
        try:
            opened.append(open_it(locate(one.path, one.revision)))
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)
    model, adapter = opened
    assert isinstance(model, Checkpoint) and isinstance(adapter, Adapter)
    return adapted(model, adapter)


def adapted(model: Checkpoint, adapter: Adapter) -> Checkpoint:
    """A model with an adapter put into it. Raises ``CheckpointError`` if the two do not fit together."""
    fit = _Fit(model, adapter)
    label = f"{model.path}+{adapter.files.path}"
    tensors = dict(model.tensors)
    for meanings, operand in adapter.replaced:
        if (name := fit.place(meanings, fit.replaced)) is not None and fit.replaces(name, operand):
            tensors[name] = operand
    # They come second: of an embedding with factors, PEFT saves the weights that these belong to as well.
    for module, factors in adapter.factors.items():
        if (name := fit.place((f"{module}.weight",), fit.summed)) is not None:
            summed = fit.sum(name, tensors[name], module, factors, label)
            if summed is not None:
                tensors[name] = summed
    if problems := list(fit.problems()):
        raise CheckpointError(problems)
    return replace(model, tensors=tensors, adapter=adapter.files)


class _Fit:
    """Holds the tensors of an adapter against those of a model, and collects what does not fit."""

    def __init__(self, model: Checkpoint, adapter: Adapter):
        self._model = model
        self._adapter = adapter
        self._old, self._new = _prefix([f"{module}.weight" for module in adapter.factors], model.tensors)
        self._strange: list[str] = []
        self._twice: list[str] = []
        self._quantised: list[str] = []
        self._unfit: list[str] = []
        self._left_out: list[str] = []
        self.replaced: set[str] = set()
        self.summed: set[str] = set()

    def place(self, meanings: tuple[str, ...], taken: set[str]) -> str | None:
        """The name of the model's tensor that one of the adapter's belongs to, which is ``taken`` then."""
        moved = (self._new + name[len(self._old) :] for name in meanings if name.startswith(self._old))
        known = next((name for name in (*moved, *meanings) if name in self._model.tensors), None)
        if known is None:
            self._strange.append(meanings[0])
        elif known in taken:
            self._twice.append(known)
        else:
            taken.add(known)
            return known
        return None

    def sum(self, name: str, base: Operand, module: str, factors: Factors, owner: str) -> Operand | None:
        """A tensor with the product of the factors."""
        settings = self._adapter.settings
        made = factors.b.shape[0], factors.a.shape[1]
        # PEFT corrects the setting for layers of the other kind, so it decides only where the shape does not.
        fits_turned = made[::-1] == base.shape and (settings.fan_in_fan_out or made != base.shape)
        turned = factors.embedding or fits_turned
        shape = made[::-1] if turned else made
        if not base.dtype.mergeable:
            self._quantised.append(name)
        elif shape != base.shape:
            self._unfit.append(f"{name} ({list(base.shape)}, its factors make {list(shape)})")
        elif not settings.has_factors(module):
            self._left_out.append(module)
        else:
            scale = settings.scale(module, factors.a.shape[0])
            return LowRank(base, factors.a, factors.b, scale, owner, turned)
        return None

    def replaces(self, name: str, operand: Operand) -> bool:
        """Whether a tensor can replace that of the model."""
        base = self._model.tensors[name]
        if not base.dtype.mergeable:
            self._quantised.append(name)
        elif not operand.dtype.mergeable:
            self._unfit.append(f"{name} ({base.dtype}, the adapter has {operand.dtype})")
        elif base.shape != operand.shape:
            self._unfit.append(f"{name} ({list(base.shape)}, the adapter has {list(operand.shape)})")
        else:
            return True
        return False

    def problems(self) -> Iterator[str]:
        """A line for each kind of tensors that do not fit."""
        path, model = self._adapter.files.path, self._model.path
        trained_on = (
            f"it was trained on {self._adapter.settings.base}; " if self._adapter.settings.base else ""
        )
        if self._strange:
            yield (
                f"{path}: {counted(len(self._strange), 'tensor')} of the adapter without a place in {model}: "
                f"{named(self._strange)}; {trained_on}name the model that it belongs to before the +"
            )
        if self._twice:
            yield f"{path}: several tensors for one of {model}: {named(self._twice)}; save the adapter again"
        if self._quantised:
            yield (
                f"{model}: tensors that are quantised, or no floats of 16 to 64 bits: {named(self._quantised)}; "
                "a LoRA can only be put into floats: dequantise the model first"
            )
        if self._unfit:
            yield (
                f"{path}: tensors that do not fit {model}: {named(self._unfit)}; {trained_on}name the model that it "
                "belongs to before the +"
            )
        if self._left_out:
            yield (
                f"{path}: holds factors that {SETTINGS_FILE} leaves out (target_modules, layers_to_transform): "
                f"{named(self._left_out)}; correct one of them"
            )


def _prefix(wanted: Collection[str], known: Mapping[str, Operand]) -> tuple[str, str]:
    """What stands at the start of the adapter's names, and what at the start of the same names of the model.

    Both are empty if the names are the model's, or if no start, or more than one, makes them so.
    """
    missing = next((name for name in wanted if name not in known), None)
    if missing is None:
        return "", ""
    for end in islice(_ends(missing), _PARTS + 1):
        starts = [
            name.removesuffix(end)
            for name in known
            if name.endswith(end) and name[-len(end) - 1 : -len(end)] in ("", ".")
        ]
        old = missing.removesuffix(end)
        fitting = [
            new
            for new in starts
            if all(one.startswith(old) and new + one[len(old) :] in known for one in wanted)
        ]
        if fitting:
            return (old, fitting[0]) if len(fitting) == 1 else ("", "")
    return "", ""


def _ends(name: str) -> Iterator[str]:
    """The name, and what follows each of its dots but the last, the longest first."""
    at = -1
    while (following := name.find(".", at + 1)) >= 0:
        yield name[at + 1 :]
        at = following
