"""Merge tensors that are already in memory, with the methods, options and bytes of ``run``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge_engine.backends import Backend, create_backend
from merge_engine.backends.operations import Chunk, Line
from merge_engine.backends.statistics import SUM_BLOCK
from merge_engine.dtypes import BY_NAME
from merge_engine.engine.merging import apply, check_finite, differing
from merge_engine.engine.tasks import Catalogue, TensorJob, TensorType, make_jobs
from merge_engine.engine.visits import COPY
from merge_engine.errors import BackendError, PlanError, RecipeError
from merge_engine.methods import MergeTask, Method, Program, find_method
from merge_engine.methods.base import Statistic
from merge_engine.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    import torch

StateDict = Mapping[str, "torch.Tensor"]
RECIPE_OPTIONS = ("dtype", "out_dtype", "arithmetic", "seed", "allow_nonfinite")
_CHUNK = 2**30  # elements handed to a backend at a time


def merge_tensors(
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    method: str = "ties",
    *,
    name: str = "tensor",
    backend: str = "auto",
    **options: Any,
) -> torch.Tensor:
    """Merge one tensor.

    ``base`` is None for methods without one. ``name`` seeds the random draws. For the options see
    ``merge_state_dicts``. Returns a new contiguous tensor on the device of the inputs.
    """
    merged = merge_state_dicts(
        None if base is None else {name: base},
        [{name: model} for model in models],
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
    backend: str = "auto",
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Merge state dicts as ``run`` merges checkpoints.

    ``options`` are the keys of a recipe (``dtype``, ``out_dtype``, ``arithmetic``, ``seed``,
    ``allow_nonfinite``) and the method's parameters; a parameter that each model has of its own, such as
    ``weight``, takes one value for all models or a list with one for each. ``lambda`` is a word of Python:
    write ``**{"lambda": 0.5}``. Weights default to 1.

    Tensors of any layout, all on one device. On a CUDA device they are merged there, on the current stream.
    Returns new contiguous tensors; nothing of autograd is recorded. Raises ``RecipeError`` for options,
    ``PlanError`` for tensors that do not fit together, and ``NonFiniteError``.
    """
    found = find_method(method)
    if found.uses_base and base is None:
        raise RecipeError(f"{method} needs a base model")
    recipe = _recipe(found, len(models), options)
    catalogue = None if base is None or not found.uses_base else _catalogue("the base model", base)
    inputs = {i: _catalogue(f"model {i}", model) for i, model in enumerate(models)}
    planned = make_jobs(recipe, found, catalogue, inputs)
    if planned.problems:
        raise PlanError(planned.problems)
    chosen = _backend_for(backend, [*([base] if base is not None else []), *models])
    tasks = [job.task for job in planned.jobs if job.task is not None and job.task.count > 0]
    share = found.share(tasks)
    sources = {job.name: _Source(job, base if found.uses_base else None, models) for job in planned.jobs}

    for statistic in share.statistics if share is not None else ():
        for task in sorted(tasks, key=lambda task: task.name):
            _measure(statistic, chosen, sources[task.name].chunks(chosen, found), task)
        statistic.finish(chosen)
    merged, checks = {}, []
    for job in planned.jobs:
        program = COPY if job.task is None else found.program(job.task, share)
        chunks = list(sources[job.name].chunks(chosen, found)) if job.out.mergeable else []
        if job.task is not None and chunks:
            for statistic in program.statistics:
                _measure(statistic, chosen, chunks, job.task)
                statistic.finish(chosen)
        merged[job.name], check = sources[job.name].merge(chosen, chunks, program, recipe.allow_nonfinite)
        checks.append(check)
    for check in checks:  # not before everything is under way: a device need not wait for the host
        check()
    return merged


def _measure(statistic: Statistic, backend: Backend, chunks: Iterable[Chunk], task: MergeTask) -> None:
    for chunk in chunks:
        statistic.measure(backend, chunk, task)


class _Source:
    """The inputs of one output tensor: the base first, if the method uses one, then the models."""

    def __init__(self, job: TensorJob, base: StateDict | None, models: Sequence[StateDict]):
        self._job = job
        self._inputs = [models[i][name].detach() for i, name in job.models.items()]
        self._labels = [f"model {i}" for i in job.models]
        self._has_base = base is not None and job.base is not None
        if base is not None and job.base is not None:
            self._inputs.insert(0, base[job.base].detach())
            self._labels.insert(0, "the base model")

    def chunks(self, backend: Backend, method: Method) -> Iterator[Chunk]:
        """The tensor in pieces that a backend accepts. A tensor that is copied has one input."""
        job, line = self._job, Line.of(self._job.shape)
        inputs = self._inputs if job.task is not None else self._inputs[:1]
        inputs = [tensor.contiguous().view(-1) for tensor in inputs]
        unit = (
            math.lcm(SUM_BLOCK, line.length * line.stride) if method.whole_lines and job.count else SUM_BLOCK
        )
        step = max(_CHUNK // unit, 1) * unit
        for start in range(0, job.count, step):
            stop = min(start + step, job.count)
            arrays = [backend.tensor(tensor[start:stop]) for tensor in inputs]
            has_base = self._has_base and job.task is not None
            yield Chunk(arrays, has_base, job.working, start, stop - start, line)

    def merge(
        self, backend: Backend, chunks: Sequence[Chunk], program: Program, allow_nonfinite: bool
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        """The merged tensor, and what raises ``NonFiniteError`` if it must, once the backend is done."""
        import torch

        job = self._job
        if not job.out.mergeable:
            self._demand_equal(self._inputs)
            return self._inputs[0].contiguous().clone(), lambda: None
        output = torch.empty(job.shape, dtype=getattr(torch, job.out.name), device=self._inputs[0].device)
        outcomes = []
        for chunk in chunks:
            target = backend.tensor(output.view(-1)[chunk.start : chunk.start + chunk.count])
            outcomes.append((chunk, apply(backend, program.solve(backend).operation, chunk, target)))

        def check() -> None:
            sources = [
                (f"{job.name}: {label}", BY_NAME[str(tensor.dtype).removeprefix("torch.")])
                for label, tensor in zip(self._labels, self._inputs, strict=True)
            ]
            for chunk, handle in outcomes:
                check_finite(job, backend.fetch(handle), chunk, sources, allow_nonfinite)

        return output, check

    def _demand_equal(self, inputs: Sequence[torch.Tensor]) -> None:
        for label, other in zip(self._labels[1:], inputs[1:], strict=True):
            if not _same_bytes(other, inputs[0]):
                raise differing(self._job, self._labels[0], label)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _recipe(method: Method, models: int, options: Mapping[str, Any]) -> Recipe:
    """The recipe that the arguments amount to."""
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
            for parameters, own in zip(per_model, value, strict=True):
                parameters[key] = own
        else:
            common[key] = value
    entries = [{"model": f"model {i}", "parameters": parameters} for i, parameters in enumerate(per_model)]
    return load_recipe({"merge_method": method.name, "models": entries, "parameters": common, **top})


def _catalogue(label: str, tensors: StateDict) -> Catalogue:
    types = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in BY_NAME:
            raise PlanError([f"{name}: {label} has it as {tensor.dtype}, which no checkpoint can hold"])
        types[name] = TensorType(BY_NAME[dtype], tuple(tensor.shape))
    return Catalogue(label, types)


def _backend_for(name: str, inputs: Sequence[StateDict]) -> Backend:
    """The backend for the device that the tensors are on; torch's own operations where no other reaches it."""
    devices = {str(tensor.device) for tensors in inputs for tensor in tensors.values()}
    if len(devices) > 1:
        raise PlanError(
            [f"the tensors are on several devices ({', '.join(sorted(devices))}); move them to one"]
        )
    device = devices.pop() if devices else "cpu"
    if name != "auto":
        return create_backend(name, device=device if device.startswith("cuda") else "auto")
    try:
        return create_backend(device=device)
    except BackendError as error:
        warnings.warn(f"merging with the reference backend, which is slow: {error}", stacklevel=3)
        return create_backend("reference")
