"""Python's garbage collector works seldom during a merge, and as before after it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint

import merge_engine as me

BEFORE = (321, 7, 5)


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*BEFORE)
    yield
    gc.set_threshold(*before)


@pytest.fixture
def recipe(save_checkpoint: SaveCheckpoint) -> dict[str, Any]:
    base, tuned = ({"w": torch.full((8,), value)} for value in (0.0, 1.0))
    return {
        "merge_method": "linear",
        "models": [
            {"model": str(save_checkpoint(name, state)), "parameters": {"weight": 1}}
            for name, state in (("base", base), ("tuned", tuned))
        ],
    }


def test_seldom_during_a_run_and_as_before_after_it(recipe: dict[str, Any]) -> None:
    seen = []
    me.run(recipe, progress=lambda nbytes: seen.append(gc.get_threshold()))
    assert seen
    assert all(each[0] > 10_000 and each[1:] == BEFORE[1:] for each in seen)
    assert gc.get_threshold() == BEFORE


def test_as_before_after_an_error(recipe: dict[str, Any]) -> None:
    recipe["models"][1]["model"] += "-missing"
    with pytest.raises(me.MergeError):
        me.run(recipe)
    assert gc.get_threshold() == BEFORE


def test_who_switched_it_off_keeps_it_off(recipe: dict[str, Any]) -> None:
    gc.set_threshold(0, 7, 5)
    seen = []
    me.run(recipe, progress=lambda nbytes: seen.append(gc.get_threshold()[0]))
    assert set(seen) == {0}
    assert gc.get_threshold()[0] == 0


def test_as_before_after_the_last_of_several_runs(recipe: dict[str, Any]) -> None:
    first_began, second_ended = threading.Event(), threading.Event()

    def hold(nbytes: int) -> None:
        first_began.set()
        assert second_ended.wait(60)

    first = threading.Thread(target=me.run, args=(recipe,), kwargs={"progress": hold})
    first.start()
    assert first_began.wait(60)
    me.run(recipe)
    assert gc.get_threshold() != BEFORE  # the first one still runs
    second_ended.set()
    first.join()
    assert gc.get_threshold() == BEFORE
