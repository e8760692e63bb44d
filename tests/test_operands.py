"""Operands: a merge reads any operand like a tensor in a file."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from adversarial import quantised_models
from conftest import SaveCheckpoint
from hypothesis import given
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.backends import create_backend
from merge_engine.dtypes import BF16, F32, DType
from merge_engine.engine.carrying import carry_out
from merge_engine.engine.sinks import MemorySink, Target
from merge_engine.operands import Access, InMemory, Operand
from merge_engine.planning import Budget, MergePlan, Schedule
from merge_engine.storage import ByteRange, File, OpenFiles, Way

BLOCK = 4096


@dataclass(frozen=True)
class Cast(Operand):
    """A bfloat16 operand as float32, made while it is read: the inner bytes go into the second half of its room."""

    inner: Operand

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        return F32

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.shape

    @property
    def owner(self) -> str:  # type: ignore[override]
        return self.inner.owner

    @property
    def label(self) -> str:
        return f"{self.inner.label} as float32"

    @property
    def files(self) -> tuple[File, ...]:
        return self.inner.files

    @property
    def stored_bytes(self) -> int:
        return self.inner.stored_bytes

    def range(self, start: int, count: int, access: Access) -> ByteRange:
        return _CastRange(self.inner.range(start, count, access._replace(in_place=False)), count)


class _CastRange(ByteRange):
    def __init__(self, inner: ByteRange, count: int):
        self._inner = inner
        self._count = count
        self.room = 4 * count
        self.length = min(self.room, 1)  # read as one: the pieces of a range are not its elements

    def view(self, memory: memoryview) -> memoryview:
        return memory[: self.room]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        half = memoryview(bytearray(2 * self._count))
        self._inner.read(half, 0, self._inner.length)
        values = torch.frombuffer(half, dtype=torch.bfloat16).float()
        torch.frombuffer(memory, dtype=torch.float32, count=self._count).copy_(values)

    def verify(self) -> None:
        self._inner.verify()


@pytest.fixture
def recipe(save_checkpoint: SaveCheckpoint) -> dict[str, Any]:
    shapes = {"embed.weight": (90, 512), "layers.0.weight": (64, 64), "layers.0.norm": (64,)}
    states: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number, (name, shape) in enumerate(shapes.items()):
        base, tuned = quantised_models(torch.Size(shape).numel(), 2, torch.bfloat16, seed=number)
        for state, tensor in zip(states, (base, *tuned), strict=True):
            state[name] = tensor.view(shape)
    base_folder, *models = (
        str(save_checkpoint(name, state)) for name, state in zip("oab", states, strict=True)
    )
    return {"base_model": base_folder, "models": [{"model": model} for model in models], "dtype": "float32"}


def merged(plan: MergePlan, way: Way, in_place: bool, memory: int) -> dict[str, torch.Tensor]:
    sink = MemorySink(plan)
    with OpenFiles() as files:
        schedule = Schedule(plan, Budget(memory))
        carry_out(schedule, create_backend("cpu", 2), Access(files, way, in_place), [Target(sink)])
    return sink.tensors


@pytest.mark.parametrize("method", ("ties", "dare_ties", "della", "task_arithmetic"))
@pytest.mark.parametrize("memory", (400_000, 384_000_000))
@pytest.mark.parametrize("way", ("cached", "direct"))
def test_a_cast_merges_as_the_values_that_it_makes(
    method: str, memory: int, way: Way, recipe: dict[str, Any]
) -> None:
    """For bfloat16, rounding to float32 before the merge or in it gives the same, with any types of other inputs."""
    parameters = {"weight": 0.5} if method == "task_arithmetic" else {"weight": 0.5, "density": 0.5}
    plan = me.plan(recipe | {"merge_method": method, "parameters": parameters})
    expected = merged(plan, way, True, memory)
    tasks = tuple(
        replace(
            task, inputs=tuple(Cast(operand) if i % 2 else operand for i, operand in enumerate(task.inputs))
        )
        for task in plan.tasks
    )
    found = merged(replace(plan, tasks=tasks), way, True, memory)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_operands_are_values(recipe: dict[str, Any]) -> None:
    plan = me.plan(recipe | {"merge_method": "ties", "parameters": {"weight": 1.0}})
    operand = plan.tasks[0].inputs[0]
    assert pickle.loads(pickle.dumps(operand)) == operand
    assert len({operand, pickle.loads(pickle.dumps(operand)), plan.tasks[0].inputs[1]}) == 2
    assert Cast(operand) == Cast(operand) != Cast(plan.tasks[0].inputs[1])


@given(st.integers(0, 300), st.data())
def test_what_is_in_memory_is_read_as_what_is_in_a_file(count: int, data: st.DataObject) -> None:
    values = torch.arange(2 * count, dtype=torch.bfloat16).view(-1, 2).T  # not contiguous
    operand = InMemory.of("x", values, "model 0")
    assert (operand.dtype, operand.shape, operand.count) == (BF16, (2, count), 2 * count)
    start = data.draw(st.integers(0, operand.count))
    some = data.draw(st.integers(0, operand.count - start))
    with OpenFiles() as files:
        here = operand.range(start, some, Access(files, "cached", True)).view(memoryview(b""))
        copied = bytearray(2 * some)
        operand.read_into(memoryview(copied), start, files)
    expected = values.contiguous().view(-1)[start : start + some].view(torch.uint8).numpy().tobytes()
    assert bytes(here) == bytes(copied) == expected
