"""A measurement answers the needs of several recipes at once as it answers each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from under_test import backends, on

from merge_engine.backends import Backend
from merge_engine.backends.operations import Chunk, Consensus, Line, Outcome
from merge_engine.backends.statistics import SUM_BLOCK
from merge_engine.dtypes import BF16
from merge_engine.engine.measuring import Measurement
from merge_engine.engine.records import ShardResult
from merge_engine.methods import Action, KeyRanks, Method, Need, Task, find_method
from merge_engine.methods.needs import steps
from merge_engine.operands import InMemory
from merge_engine.planning import Catalogue, Inputs, make_tasks
from merge_engine.recipe import load_recipe

COUNT = 2 * SUM_BLOCK + 100
BACKENDS = backends()

recipes = st.builds(
    lambda method, density, ties, rescale: {
        "merge_method": method,
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 1, "density": density}},
            {"model": "b", "parameters": {"weight": 0.5, "density": 0.6}},
        ],
        "parameters": {"rescale": rescale, "ties": ties},
    },
    st.sampled_from(["ties", "breadcrumbs"]),
    st.sampled_from([0.1, 0.3, 0.6, 0.9]),
    st.sampled_from(["index", "spread", "all"]),
    st.booleans(),
)


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(COUNT).bfloat16()
    return [base, *(base + torch.randint(-3, 4, (COUNT,)) * 2.0**-6 for _ in range(2))]


def task_of(recipe: dict[str, object], inputs: Sequence[torch.Tensor]) -> Task:
    loaded = load_recipe(recipe)
    names = ["base", "a", "b"]
    base, *models = [
        Catalogue(name, {"w": InMemory.of("w", tensor.bfloat16(), name)})
        for name, tensor in zip(names, inputs, strict=True)
    ]
    method = find_method(loaded.merge_method)
    planned = make_tasks(loaded, method, [Inputs(base, dict(enumerate(models)), base)])
    assert not planned.problems
    (task,) = planned.tasks
    assert task.action is Action.MERGE
    return task


def arrays_of(backend: Backend, task: Task, start: int, count: int) -> list[Any]:
    tensors = [operand.tensor for operand in task.inputs if isinstance(operand, InMemory)]
    return [backend.tensor(on(backend, tensor)[start : start + count]) for tensor in tensors]


def chunk_of(backend: Backend, task: Task, start: int, count: int) -> Chunk:
    return Chunk(arrays_of(backend, task, start, count), True, BF16, start, count, Line.of(task.shape))


def merged(backend: Backend, method: Method, task: Task, answers: Measurement) -> tuple[list[int], Outcome]:
    """The bits of the merged tensor, and the counts."""
    operation = method.solve(task, answers)
    assert isinstance(operation, Consensus)
    by_model = {model: e.mask for model, e in zip(task.models, operation.entries, strict=True)}
    solved = answers.masks(task, by_model)
    entries = [e._replace(mask=each.mask) for e, each in zip(operation.entries, solved, strict=True)]
    output = on(backend, torch.empty(COUNT, dtype=torch.bfloat16))
    operation = operation._replace(entries=tuple(entries))
    handle = backend.consensus(chunk_of(backend, task, 0, COUNT), operation, backend.tensor(output))
    outcome = backend.fetch(handle)
    return output.view(torch.int16).tolist(), outcome


def measured(backend: Backend, needs: Sequence[Need], task: Task, chunk: int) -> Measurement:
    found = Measurement(backend, needs, BF16, COUNT)
    for step in steps(needs, BF16):
        for start in range(0, COUNT, chunk):
            count = min(chunk, COUNT - start)
            last = start + count == COUNT
            found.add(step, chunk_of(backend, task, start, count), task, last)
    return found


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(st.lists(recipes, min_size=2, max_size=4), st.sampled_from([COUNT, SUM_BLOCK]))
def test_needs_of_several_recipes(name: str, several: list[dict[str, object]], chunk: int) -> None:
    backend, inputs = BACKENDS[name], tensors()
    tasks = [task_of(recipe, inputs) for recipe in several]
    methods = [find_method(str(recipe["merge_method"])) for recipe in several]
    needs = [method.needs(task) for method, task in zip(methods, tasks, strict=True)]
    together = measured(backend, list(dict.fromkeys(each for of in needs for each in of)), tasks[0], chunk)
    for method, task, of in zip(methods, tasks, needs, strict=True):
        alone = measured(backend, of, task, chunk)
        assert merged(backend, method, task, together) == merged(backend, method, task, alone)
        for need in of:
            if isinstance(need, KeyRanks):
                assert {rank: together[need][rank] for rank in need.ranks} == alone[need]
            else:
                assert together[need] == alone[need]


def test_answers_are_sent() -> None:
    """The answers to the shared needs of a mask by index survive the record of a shard."""
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 1, "density": 0.3}} for m in "ab"],
        "parameters": {"ties": "index", "trim_scope": "model"},
    }
    task = task_of(recipe, tensors())
    task = replace(task, elements={0: COUNT, 1: COUNT})
    found = measured(
        next(iter(BACKENDS.values())),
        find_method("ties").needs(task),
        task,
        COUNT,
    ).data()
    assert found.places
    record = ShardResult("model.safetensors", {}, {}, {}, [], "cpu", found)
    assert ShardResult.decode(record.encode()) == record
