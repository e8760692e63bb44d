"""Opening a session: from paths, from a recipe, or from state dicts."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from merge_engine.arguments import threads_of
from merge_engine.backends import Backend
from merge_engine.engine.run import parse_memory
from merge_engine.errors import OptionError
from merge_engine.planning import open_all
from merge_engine.recipe import ModelReference, Recipe, RecipeSource, load_recipe
from merge_engine.session.places import places_of
from merge_engine.session.residents import bring_all
from merge_engine.session.session import Inputs, Session
from merge_engine.session.watching import Watched
from merge_engine.tensors import demand_values

if TYPE_CHECKING:
    import torch

Model: TypeAlias = "str | os.PathLike[str] | ModelReference | Mapping[str, torch.Tensor]"


def load(
    base: RecipeSource | Model | None,
    models: Sequence[Model] | None = None,
    *,
    device: str | Sequence[str] = "auto",
    backend: str | Backend = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
) -> Session:
    """Bring models into memory, to merge them again and again.

    ``load(base, models)`` takes folders, weight files or names on the hub, each with a LoRA adapter behind a ``+`` if
    it has one; ``base`` may be None. Or it takes state dicts, whose tensors are used where they are. ``load(recipe)``
    takes a recipe (a path, YAML text, a mapping or a ``Recipe``) and brings all models that it merges.

    ``device``: ``cpu``, ``cuda``, ``cuda:1``, a list of several, over which the tensors are spread, or ``auto``: the
    first GPU that can be used, else the CPU. For state dicts it is the device of their tensors. ``memory``: bytes of
    each GPU that inputs may take, or text such as "20GB"; by default all that is free but what a merge needs. What
    does not fit stays in pinned memory of the host, and goes up for each merge. ``backend`` and ``threads``: see
    ``run``.

    Files are read once, and may be removed then. Raises ``RecipeError``, ``CheckpointError`` (also for a file that
    changes while it is read), ``OptionError``, ``BackendError``, and ``DeviceMemoryError``, which is one, before
    anything is read if the memory is too small.
    """
    threads, limit = threads_of(threads), parse_memory(memory)
    demand_values()
    if models is None:
        recipe = load_recipe(cast(RecipeSource, base))
        return _of_files(recipe, True, device, backend, threads, limit)
    given = _listed(models)
    kinds = {isinstance(each, Mapping) for each in (given if base is None else [base, *given])}
    if len(kinds) > 1:
        raise OptionError("models: give paths alone, or state dicts alone")
    if kinds == {True}:
        return _of_state_dicts(base, given, device, backend, threads, limit)
    entries = [{"model": _reference(each)} for each in given]
    document: dict[str, Any] = {"merge_method": "linear", "models": entries}
    if base is not None:
        document["base_model"] = _reference(base)
    return _of_files(load_recipe(document), False, device, backend, threads, limit)


def _of_files(
    recipe: Recipe,
    complete: bool,
    device: str | Sequence[str],
    backend: str | Backend,
    threads: int | None,
    memory: int | None,
) -> Session:
    opened = open_all(recipe)
    notes: list[str] = []
    places = places_of(device, backend, threads, memory, notes)
    brought, goes_up = bring_all(opened, places)
    return Session(Inputs(brought, recipe, complete, goes_up), places, notes)


def _of_state_dicts(
    base: object,
    models: Sequence[Any],
    device: str | Sequence[str],
    backend: str | Backend,
    threads: int | None,
    memory: int | None,
) -> Session:
    names = [f"model {i}" for i in range(len(models))]
    document: dict[str, Any] = {"merge_method": "linear", "models": [{"model": name} for name in names]}
    given = dict(zip(map(_named, names), models, strict=True))
    if base is not None:
        document["base_model"] = BASE
        given[_named(BASE)] = cast(Any, base)
    watched = Watched(given)
    inputs = Inputs(watched.opened(), load_recipe(document), False, watched=watched)
    devices = {str(tensor.device) for tensor in inputs.tensors}
    if len(devices) > 1:
        raise OptionError(f"models: their tensors are on several devices ({', '.join(sorted(devices))})")
    there = next(iter(devices), "cpu")
    if device not in ("auto", there):
        raise OptionError(f"device: the tensors of the state dicts are on {there}, not on {device}")
    notes: list[str] = []
    return Session(inputs, places_of(there, backend, threads, memory, notes), notes)


BASE = "the base model"
"""What recipes call the state dict of the base model. The others are "model 0", "model 1" and so on."""


def _named(name: str) -> ModelReference:
    return ModelReference(path=name)


def _listed(models: object) -> list[Any]:
    if not isinstance(models, Iterable) or isinstance(models, str | bytes | Mapping | os.PathLike):
        raise OptionError(f"models: must be a list of models, not {reprlib.repr(models)}; write [model]")
    listed = list(models)
    if not listed:
        raise OptionError("models: at least one is needed")
    return listed


def _reference(model: object) -> Any:
    """A model as it stands in a recipe."""
    if isinstance(model, ModelReference | os.PathLike | str):
        return model
    way_out = "; give its state_dict()" if hasattr(model, "state_dict") else ""
    raise OptionError(
        f"models: must be paths, names on the hub or state dicts, not {reprlib.repr(model)}{way_out}"
    )
