"""Merge tensors that are in memory, with the methods, options and bytes of ``run``."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_engine.backends import Backend, create_backend
from merge_engine.engine.collecting import seldom_collected
from merge_engine.engine.in_memory import WHOLE, Lane, Values, device_of, merge_in_memory
from merge_engine.engine.runs import Runs
from merge_engine.errors import BackendError, OptionError, PlanError, RecipeError
from merge_engine.methods import Method, Task, find_method
from merge_engine.operands import InMemory
from merge_engine.planning import Catalogue, Input, Inputs, MergePlan, Schedule, make_tasks
from merge_engine.recipe import Recipe, load_recipe
from merge_engine.tensors import demand_values, new_tensor

if TYPE_CHECKING:
    import torch

StateDict = Mapping[str, "torch.Tensor"]
RECIPE_OPTIONS = ("dtype", "out_dtype", "arithmetic", "seed", "allow", "allow_nonfinite", "tensors")


def merge_tensors(
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    method: str = "ties",
    *,
    name: str = "tensor",
    backend: str | Backend = "auto",
    **options: Any,
) -> torch.Tensor:
    """Merge one tensor.

    ``base`` (None for methods without one) and ``models`` have the same shape and a floating-point dtype. ``name``
    is part of the seed of random draws. For the options, and for the errors raised, see ``merge_state_dicts``.
    Returns a new contiguous tensor of this shape on the device of the inputs.
    """
    merged = merge_state_dicts(
        None if base is None else {name: base},
        [{name: model} for model in _listed(models, "tensors")],
        method,
        backend=backend,
        **options,
    )
    return merged[name]


def merge_state_dicts(
    base: StateDict | None,
    models: Sequence[StateDict],
    method: str = "ties",
    *,
    backend: str | Backend = "auto",
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Merge state dicts as ``run`` merges checkpoints.

    ``options`` are the keys of a recipe (``dtype``, ``out_dtype``, ``arithmetic``, ``seed``, ``allow``,
    ``allow_nonfinite``, ``tensors``) and the method's parameters. A parameter of scope "model", such as ``weight``,
    takes one value for all models or a list with one for each. ``lambda`` is a keyword of Python: write
    ``**{"lambda": 0.5}``. Weights default to 1. ``backend`` is a name, or a backend.

    Tensors of one name have the same shape in all inputs. They may have any layout, and all are on one device. On a
    CUDA device they are merged there, on the current stream. Returns new contiguous tensors by name, of dtype
    ``out_dtype``, else ``dtype``, else the promoted type of the inputs; autograd records nothing, whether or not
    inputs require gradients. A base that the method does not use is not looked at. Raises ``OptionError`` and
    ``RecipeError`` for wrong arguments, ``PlanError`` for tensors that do not fit together or have no values in
    memory (sparse, nested, on the meta device), ``BackendError`` for a backend that cannot be used, and
    ``NonFiniteError``.
    """
    found = find_method(method)
    if found.uses_base and found.requires_base and base is None:
        raise RecipeError(f"{method} needs a base model")
    import torch

    demand_values()
    plan = _plan(found, base if found.uses_base else None, _listed(models, "state dicts"), options)
    chosen = _backend_for(backend, plan)
    schedule = Schedule(plan, WHOLE)
    merged: dict[str, torch.Tensor] = {}

    def target(task: Task) -> torch.Tensor:
        return new_tensor(task.shape, getattr(torch, task.out.name), device_of(task.inputs[0]))

    lane = Lane(Runs(schedule, chosen), Values())
    with seldom_collected:
        merge_in_memory(
            schedule, lambda task: lane, target, lambda task, tensor: merged.update({task.name: tensor})
        )
    return {task.name: merged[task.name] for task in plan.tasks}


def _plan(
    method: Method, base: StateDict | None, models: Sequence[StateDict], options: Mapping[str, Any]
) -> MergePlan:
    """The plan of a merge into memory."""
    recipe = _recipe(method, len(models), options)
    catalogue = None if base is None else catalogue_of("the base model", base)
    inputs = {i: catalogue_of(f"model {i}", model) for i, model in enumerate(models)}
    reference = catalogue or next(iter(inputs.values()), None)
    planned = make_tasks(recipe, method, [Inputs(catalogue, inputs, reference)])
    if planned.problems:
        raise PlanError(planned.problems)
    nowhere = Input(Path(), "", {})
    return MergePlan(
        recipe,
        method,
        {} if base is None else {"base": nowhere},
        dict.fromkeys(inputs, nowhere),
        nowhere,
        tuple(planned.tasks),
        (),
        tuple(planned.notes),
        tuple(planned.warnings),
    )


def _recipe(method: Method, models: int, options: Mapping[str, Any]) -> Recipe:
    """The recipe with the same meaning as the arguments."""
    top = {
        key: str(value) if "dtype" in key and value is not None else value
        for key, value in options.items()
        if key in RECIPE_OPTIONS
    }
    per_model: list[dict[str, Any]] = [{} for _ in range(models)]
    common: dict[str, Any] = {}
    scopes = {parameter.name: parameter.scope for parameter in method.parameters}
    given = {key: value for key, value in options.items() if key not in RECIPE_OPTIONS}
    if "weight" in scopes:
        given.setdefault("weight", 1.0)
    for key, value in given.items():
        if scopes.get(key) == "model" and isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != models:
                raise RecipeError(
                    f"{key}: {len(value)} values for {models} model(s); give one for each, or one for all"
                )
            for parameters, single in zip(per_model, value, strict=True):
                parameters[key] = single
        else:
            common[key] = value
    entries = [{"model": f"model {i}", "parameters": parameters} for i, parameters in enumerate(per_model)]
    return load_recipe({"merge_method": method.name, "models": entries, "parameters": common, **top})


def _listed(models: object, of: str) -> list[Any]:
    """The argument ``models`` as a list. A state dict, a text and one tensor are iterable, but no lists of models."""
    import torch

    if not isinstance(models, Iterable) or isinstance(models, str | bytes | Mapping | torch.Tensor):
        kind = type(models).__qualname__
        raise OptionError(f"models: must be a list of {of}, not an object of type {kind}; write [model]")
    return list(models)


def catalogue_of(label: str, tensors: object) -> Catalogue:
    """The tensors of a state dict. Raises ``PlanError`` that names each tensor that cannot be merged."""
    if not isinstance(tensors, Mapping):
        kind = type(tensors).__qualname__
        way_out = (
            "give its state_dict()"
            if hasattr(tensors, "state_dict")
            else "give a mapping of names to tensors"
        )
        raise PlanError(f"{label}: is no state dict, but an object of type {kind}; {way_out}")
    operands: dict[str, InMemory] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        try:
            if not isinstance(name, str) or not _is_utf8(name):
                raise PlanError(f"{label}: names of tensors must be text in UTF-8, not {reprlib.repr(name)}")
            operands[name] = InMemory.of(name, tensor, label)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(problems)
    return Catalogue(label, operands)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _backend_for(name: str | Backend, plan: MergePlan) -> Backend:
    """The backend for the device of the tensors; the reference backend if no other works on that device."""
    if isinstance(name, Backend):
        return name
    devices = {device for task in plan.tasks for device in map(device_of, task.inputs)}
    if len(devices) > 1:
        raise PlanError(
            f"the tensors are on several devices ({', '.join(sorted(devices))}); move them to one"
        )
    device = devices.pop() if devices else "cpu"
    if name != "auto":
        return create_backend(name, device=device if device.startswith("cuda") else "auto")
    try:
        return create_backend(device=device)
    except BackendError as error:
        warnings.warn(f"merging with the reference backend, which is slow: {error}", stacklevel=3)
        return create_backend("reference")
