"""The memory of a schedule: tensors that are held whole, and the sizes of the rings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.errors import MergeError
from merge_engine.planning import Budget, MergePlan, Schedule
from merge_engine.storage import PAGE

ELEMENTS = 10 * 4096
SPAN = 4 * 2 * ELEMENTS  # base, two models and the output in bfloat16
NOTES = 2 * ELEMENTS // 8  # a bit for every element of both models
RANKS = (4 * 2 + 8) * ELEMENTS  # DELLA: a threshold for each model, and keys


def recipe(save_checkpoint: SaveCheckpoint, method: str) -> dict[str, Any]:
    folders = [
        save_checkpoint(name, {"w": torch.zeros(10, 4096, dtype=torch.bfloat16)}) for name in ("o", "a", "b")
    ]
    options: dict[str, float] = {"weight": 0.5}
    if method != "task_arithmetic":
        options |= {"density": 0.5}
    return {
        "merge_method": method,
        "base_model": str(folders[0]),
        "models": [{"model": str(folder), "parameters": options} for folder in folders[1:]],
    }


@pytest.mark.parametrize(("method", "needed"), [("ties", 2 * SPAN), ("della", 2 * SPAN + RANKS)])
def test_what_must_be_measured_is_held_whole_beside_the_next(
    method: str, needed: int, save_checkpoint: SaveCheckpoint
) -> None:
    plan = me.plan(recipe(save_checkpoint, method))
    schedule = Schedule(plan, Budget(needed))
    assert schedule.chunk_elements(schedule.tasks[0]) == ELEMENTS
    assert schedule.bytes_read == 3 * 2 * ELEMENTS
    schedule = Schedule(plan, Budget(needed - 1))
    assert schedule.chunk_elements(schedule.tasks[0]) < ELEMENTS
    assert schedule.bytes_read == 2 * 3 * 2 * ELEMENTS  # once to be measured, once to be merged


@pytest.mark.parametrize("lines", [(200_000, 1), (100_000, 3), (50_000, 1, 2, 3), (1200, 768)])
@pytest.mark.parametrize("method", ["model_stock", "nuslerp"])
def test_short_lines_are_measured_and_merged_at_once(
    method: str, lines: tuple[int, ...], save_checkpoint: SaveCheckpoint
) -> None:
    given = recipe(save_checkpoint, "task_arithmetic")
    for name in ("o", "a", "b"):
        save_checkpoint(name + "1", {"w": torch.zeros(lines, dtype=torch.bfloat16)})
    switch = {"filter_wise": True} if method == "model_stock" else {"nuslerp_flatten": False}
    given |= {"merge_method": method, "parameters": switch, "base_model": given["base_model"] + "1"}
    settings = {"weight": 1.0} if method == "nuslerp" else {}
    given["models"] = [{"model": m["model"] + "1", "parameters": settings} for m in given["models"]]
    plan = me.plan(given)
    for in_place in (False, True):
        schedule = Schedule(plan, Budget(12_000_000, in_place=in_place))
        visits = list(schedule.visits())
        assert len(visits) > 1
        assert schedule.bytes_read == 3 * 2 * plan.tasks[0].count
        assert all(visit.alone and visit.parts and visit.start % lines[-1] == 0 for visit in visits)
        assert 8 * 3 * visits[0].count // lines[-1] < schedule.scratch_bytes
        assert sum(schedule.largest_chunk) + schedule.scratch_bytes <= 12_000_000


def test_lines_that_no_memory_holds_are_refused(save_checkpoint: SaveCheckpoint) -> None:
    given = recipe(save_checkpoint, "task_arithmetic")
    for name in ("o", "a", "b"):
        save_checkpoint(name + "1", {"w": torch.zeros(1, 100_000, dtype=torch.bfloat16)})
    given |= {"base_model": given["base_model"] + "1"}
    models = [{"model": m["model"] + "1", "parameters": {"weight": 1.0}} for m in given["models"]]
    columns = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    plan = me.plan({**given, "merge_method": "nuslerp", "models": models, "parameters": columns})
    with pytest.raises(MergeError, match=r"w: at least 6,000,\d{3} bytes of it must be in memory at a time"):
        Schedule(plan, Budget(4_000_000))


def test_what_need_not_be_measured_is_cut(save_checkpoint: SaveCheckpoint) -> None:
    plan = me.plan(recipe(save_checkpoint, "task_arithmetic"))
    schedule = Schedule(plan, Budget(2 * SPAN))
    assert (
        schedule.chunk_elements(schedule.tasks[0]) == ELEMENTS // 5
    )  # at most an eighth of the memory, in blocks
    assert schedule.bytes_read == 3 * 2 * ELEMENTS
    assert sum(schedule.ring_bytes) < 2 * SPAN


@pytest.mark.parametrize("method", ["ties", "della", "task_arithmetic"])
def test_rings_stay_within_the_memory(method: str, save_checkpoint: SaveCheckpoint) -> None:
    plan = me.plan(recipe(save_checkpoint, method))
    for memory in (SPAN + RANKS, 2 * SPAN + RANKS, 3 * SPAN + RANKS, 100 * SPAN):
        schedule = Schedule(plan, Budget(memory))
        least, rings = schedule.largest_chunk, schedule.ring_bytes
        # arrays start on pages, and rings end on them
        assert sum(rings) + schedule.scratch_bytes <= memory + 7 * PAGE
        assert rings.inputs >= least.inputs and rings.outputs >= least.outputs


@pytest.mark.parametrize(
    ("method", "memory", "readings"),
    (("ties", 7 * NOTES, 1), ("dare_ties", 8 * NOTES, 1), ("dare_ties", 8 * NOTES - 1, 2)),
)
def test_what_is_in_place_is_measured_whole_if_notes_of_it_are_small(
    method: str, memory: int, readings: int, save_checkpoint: SaveCheckpoint
) -> None:
    plan = me.plan(recipe(save_checkpoint, method))
    schedule = Schedule(plan, Budget(memory, in_place=True, cached_piece=1))
    assert schedule.chunk_elements(schedule.tasks[0]) == 4096
    assert schedule.bytes_read == readings * 3 * 2 * ELEMENTS
    assert sum(schedule.ring_bytes) <= memory + 7 * PAGE


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    memory=st.integers(SPAN // 9, 4 * SPAN), method=st.sampled_from(["ties", "dare_ties", "task_arithmetic"])
)
def test_what_is_visited_and_how_often(
    memory: int, method: str, save_checkpoint: SaveCheckpoint, recipes: dict[str, MergePlan]
) -> None:
    """Each element is merged once and measured once a step, in order; it crosses a link as often as it is read."""
    if method not in recipes:
        recipes[method] = me.plan(
            recipe(lambda name, state: save_checkpoint(f"{method}-{name}", state), method)
        )
    plan = recipes[method]
    schedule = Schedule(plan, Budget(memory))
    read = 0
    merged: list[tuple[int, int]] = []
    measured: dict[Any, Any] = {}
    for visit in schedule.visits():
        read += 3 * 2 * visit.count
        if visit.parts:
            merged.append((visit.start, visit.count))
        for step in visit.steps[0]:
            measured.setdefault(step, []).append((visit.start, visit.count))
        assert 4 * 2 * visit.count <= sum(schedule.ring_bytes)
    for visits in (merged, *measured.values()):
        ends = [0, *(start + count for start, count in visits)]
        assert [start for start, _ in visits] == ends[:-1] and ends[-1] == ELEMENTS
    assert read == schedule.bytes_read == schedule.bytes_up
    assert schedule.bytes_down == 2 * ELEMENTS
    if memory >= 2 * SPAN:
        assert read == 3 * 2 * ELEMENTS


@pytest.fixture
def recipes() -> dict[str, MergePlan]:
    return {}


def test_copies_take_no_memory(save_checkpoint: SaveCheckpoint) -> None:
    folders = [save_checkpoint(name, {"ids": torch.arange(100_000), "w": torch.zeros(8)}) for name in "ab"]
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
    schedule = Schedule(me.plan({"merge_method": "linear", "models": models}), Budget(10_000))
    assert sum(schedule.ring_bytes) < 100_000
    assert [(visit.task.name, visit.count) for visit in schedule.visits()] == [("ids", 100_000), ("w", 8)]
    assert (schedule.bytes_up, schedule.bytes_down) == (2 * 4 * 8, 4 * 8)
