"""From what inputs hold to what must be done: one task per output tensor, and every problem found.

Works on catalogues (names, dtypes, shapes), so that checkpoints on disk and state dicts in memory are
planned by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from merge_engine.dtypes import DType, promote
from merge_engine.methods import MergeTask, Method
from merge_engine.recipe import ParameterResolver, Recipe, layer_positions
from merge_engine.text import some

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")
HEAD = "lm_head.weight"


class TensorType(NamedTuple):
    """Dtype and shape of an input tensor."""

    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Catalogue:
    """The tensors of one input. ``label`` names it in messages.

    ``tied`` says whether its head is its embedding, None that its config does not say.
    """

    label: str
    tensors: Mapping[str, TensorType]
    tied: bool | None = False

    def find(self, name: str) -> str | None:
        """The tensor to use for ``name``: itself, or the embedding for the head of a model without one."""
        if name in self.tensors:
            return name
        if self.tied is not False and name.endswith(HEAD):
            candidates = [other for other in self.tensors if other.endswith(EMBEDDINGS)]
            if len(candidates) == 1:
                return candidates[0]
        return None


@dataclass(frozen=True)
class TensorJob:
    """One output tensor: the names under which its inputs have it (base first, None without one).

    ``task`` is None for a tensor that is copied: one that only the base has, which is rounded to ``working`` and
    ``out`` like any other, or one of a type that cannot be merged and must be the same everywhere.
    """

    name: str
    shape: tuple[int, ...]
    working: DType
    out: DType
    base: str | None
    models: Mapping[int, str]
    task: MergeTask | None

    @cached_property
    def count(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


@dataclass
class Jobs:
    """All output tensors in the order of the donor's files. ``notes`` are worth telling; problems forbid."""

    jobs: list[TensorJob] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    untied: bool = False


def make_jobs(
    recipe: Recipe, method: Method, base: Catalogue | None, models: Mapping[int, Catalogue]
) -> Jobs:
    """Plan every output tensor.

    ``base`` is given if the method uses one; ``models`` by recipe position. Raises ``RecipeError`` when a
    parameter has no value for a tensor.
    """
    resolver = ParameterResolver(recipe, method.parameters)
    result = Jobs(problems=_count_problems(method, models))
    inputs = ([base] if base is not None else []) + list(models.values())
    names = list(dict.fromkeys(name for catalogue in inputs for name in catalogue.tensors))
    positions = layer_positions(names)
    absent: dict[int, list[str]] = {}
    if not names:
        result.problems.append("the inputs hold no tensors")
    for name in names:
        found = {i: used for i, model in models.items() if (used := model.find(name)) is not None}
        base_name = base.find(name) if base is not None else None
        types = [models[i].tensors[used] for i, used in found.items()]
        if base is not None:
            if base_name is None:
                having = ", ".join(models[i].label for i in found)
                result.problems.append(f"{name}: in {having}, but not in the base model {base.label}")
                continue
            types.insert(0, base.tensors[base_name])
        problem = _disagreement(name, types, base if base_name else None, [models[i] for i in found])
        if problem:
            result.problems.append(problem)
            continue
        for i in models.keys() - found.keys():
            absent.setdefault(i, []).append(name)
        if name.endswith(HEAD):
            owners = [models[i] for i in found] + ([base] if base is not None else [])
            result.untied |= any(owner.tied is False or owner.find(name) != name for owner in owners)
        common = resolver.for_tensor(name, positions[name])
        working = recipe.working_dtype
        mergeable = all(kind.dtype.mergeable for kind in types)
        if not mergeable:
            kind = types[0].dtype
            result.jobs.append(TensorJob(name, types[0].shape, kind, kind, base_name, found, None))
            continue
        working = working or promote(*(kind.dtype for kind in types))
        out = recipe.output_dtype or working
        task = MergeTask(
            name,
            types[0].shape,
            working,
            out,
            tuple(found),
            tuple(resolver.for_model(i, used, positions[name]) for i, used in found.items()),
            common,
            recipe.seed,
            recipe.arithmetic == "mergekit",
        )
        result.jobs.append(
            TensorJob(name, types[0].shape, working, out, base_name, found, task if found else None)
        )
    result.notes += [
        f"{models[i].label} lacks {some(lacking)}; merged from the inputs that have them"
        for i, lacking in sorted(absent.items())
    ]
    labels = [model.label for model in models.values()]
    result.notes += [
        f"{label} is merged more than once" for label in dict.fromkeys(labels) if labels.count(label) > 1
    ]
    tasks = [job.task for job in result.jobs if job.task is not None]
    if recipe.arithmetic == "mergekit" and any(task.working.name == "float64" for task in tasks):
        result.problems.append("arithmetic: mergekit is for bfloat16, float16 and float32, not for float64")
    result.problems += method.check(recipe, tasks)
    return result


def _count_problems(method: Method, models: Mapping[int, Catalogue]) -> list[str]:
    if not models:
        return [f"{method.name}: there is no model to merge besides the base"]
    if method.max_models is not None and len(models) > method.max_models:
        return [f"{method.name}: takes at most {method.max_models} model(s), not {len(models)}"]
    return []


def _disagreement(
    name: str, types: Sequence[TensorType], base: Catalogue | None, models: Sequence[Catalogue]
) -> str | None:
    """Why these inputs cannot be one tensor."""
    labels = [catalogue.label for catalogue in ([base] if base is not None else []) + list(models)]
    if len({kind.shape for kind in types}) > 1:
        shapes = ", ".join(
            f"{list(kind.shape)} in {label}" for label, kind in zip(labels, types, strict=True)
        )
        return f"{name}: the shapes differ: {shapes}"
    kinds = {kind.dtype for kind in types}
    if len(kinds) > 1 and not all(kind.mergeable for kind in kinds):
        dtypes = ", ".join(f"{kind.dtype} in {label}" for label, kind in zip(labels, types, strict=True))
        return f"{name}: these types cannot be merged with each other: {dtypes}"
    return None
