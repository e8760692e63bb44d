"""A plan is a value: other processes can merge it shard by shard, and the files are those of an ordinary run."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial import quantised_models
from conftest import SaveCheckpoint

import merge_engine as me
from merge_engine.engine.shards import merge_in_shards, merge_shard

SHAPES = {"embed.weight": (70, 64), "layers.0.w": (64, 64), "layers.0.norm": (64,), "layers.1.w": (65, 33)}
PARAMETERS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3, "trim_slack": 0.05, "sign_slack": 0.5},
    "ties over the model": {"density": 0.3, "trim_scope": "model", "trim_slack": 0.1},
    "breadcrumbs by index over the model": {
        "density": 0.4,
        "gamma": 0.1,
        "ties": "index",
        "trim_scope": "model",
    },
    "della": {"density": 0.5, "epsilon": 0.2},
}


@pytest.fixture
def recipe(save_checkpoint: SaveCheckpoint) -> dict[str, Any]:
    states: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number, (name, shape) in enumerate(SHAPES.items()):
        base, tuned = quantised_models(torch.Size(shape).numel(), 2, torch.bfloat16, seed=number)
        for state, tensor in zip(states, (base, *tuned), strict=True):
            state[name] = tensor.view(shape)
        for state in states:
            state["steps"] = torch.arange(9)
    base_folder, *models = (
        str(save_checkpoint(name, state)) for name, state in zip("oab", states, strict=True)
    )
    return {"base_model": base_folder, "models": [{"model": model} for model in models], "seed": 5}


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("model*")}


@pytest.mark.parametrize("title", PARAMETERS)
def test_shards_done_in_other_processes_are_those_of_a_run(
    title: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe |= {"merge_method": title.partition(" ")[0], "parameters": {**PARAMETERS[title], "weight": 0.5}}
    whole = me.run(recipe, tmp_path / "whole", shard_size="6KB")
    plan = me.plan(recipe, tmp_path / "pieces", shard_size="6KB")
    assert len(plan.shards) > 2
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        pieces = merge_in_shards(plan, tmp_path / "pieces", pool.map, device="cpu", threads=1)
    assert weights(tmp_path / "pieces") == weights(tmp_path / "whole")
    assert pieces.counts == whole.counts
    assert pieces.per_tensor == whole.per_tensor
    digests = [
        (tmp_path / name / "README.md").read_text().partition("## Digest")[2] for name in ("whole", "pieces")
    ]
    assert digests[0] == digests[1]


def test_a_shard_may_be_done_twice_and_in_any_order(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"merge_method": "ties", "parameters": {"density": 0.3, "weight": 0.5}}
    me.run(recipe, tmp_path / "whole", shard_size="6KB", device="cpu")

    def backwards_and_twice(do: Any, jobs: Any) -> Any:
        jobs = list(jobs)
        for job in (*reversed(jobs), jobs[0]):
            yield do(replace(job, threads=1))

    plan = me.plan(recipe, tmp_path / "pieces", shard_size="6KB")
    merge_in_shards(plan, tmp_path / "pieces", backwards_and_twice)
    assert weights(tmp_path / "pieces") == weights(tmp_path / "whole")


def test_a_shard_that_is_missing_publishes_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"merge_method": "ties", "parameters": {"density": 0.3, "weight": 0.5}}
    plan = me.plan(recipe, tmp_path / "out", shard_size="6KB")
    with pytest.raises(
        me.OutputError, match=f"1 of {len(plan.shards)} shards are complete: the same command goes"
    ):
        merge_in_shards(plan, tmp_path / "out", lambda do, jobs: [do(next(iter(jobs)))])
    assert all(file.name.endswith(".part") for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("method", sorted(me.METHODS))
def test_a_plan_survives_pickling(method: str, recipe: dict[str, Any]) -> None:
    found = me.METHODS[method]
    if not found.uses_base:
        del recipe["base_model"]
    required = {parameter.name: 0.5 for parameter in found.parameters if parameter.required}
    recipe |= {"merge_method": method, "parameters": required, "models": recipe["models"][: found.max_models]}
    plan = me.plan(recipe)
    again = pickle.loads(pickle.dumps(plan))
    assert again.tasks == plan.tasks and again.shards == plan.shards and again.recipe == plan.recipe
    first, second = me.run(plan).tensors, me.run(again).tensors
    assert first is not None and second is not None
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_merge_shard_is_what_a_worker_needs() -> None:
    assert pickle.loads(pickle.dumps(merge_shard)) is merge_shard


def test_a_result_survives_pickling(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"merge_method": "ties", "parameters": {"density": 0.3, "weight": 0.5}}
    result = me.run(recipe, tmp_path / "out")
    again = pickle.loads(pickle.dumps(result))
    assert again.counts == result.counts and again.ledger.as_dict() == result.ledger.as_dict()
    with again.ledger.timed(again.ledger.read, 1):
        pass
