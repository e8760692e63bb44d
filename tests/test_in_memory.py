"""One merge on several devices: tensors in memory, each merged by one of two backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adversarial import quantised_models
from emulated_cuda.backend import EmulatedCudaBackend

import merge_engine as me
from merge_engine.backends.cpu import CpuBackend
from merge_engine.engine.in_memory import WHOLE, Lane, Values, merge_in_memory
from merge_engine.engine.kept import Kept, KeyCounts
from merge_engine.engine.work import Runs
from merge_engine.planning import Schedule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "changes",
    [
        {"density": 0.3},
        {"density": 0.3, "trim_scope": "model"},
        {"density": 0.3, "trim_scope": "model", "ties": "index", "trim_slack": 0.0},
    ],
    ids=str,
)
def test_two_devices_merge_as_one(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    states: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for i, count in enumerate((5000, 100, 9000, 4096)):
        base, tuned = quantised_models(count, 2, dtype, seed=i)
        for state, values in zip(states, (base, *tuned), strict=True):
            state[f"layers.{i}.weight"] = values
    with me.load(states[0], states[1:]) as session:
        plan = session.merge("ties", **changes).plan
    schedule = Schedule(plan, WHOLE)
    runs = Runs(schedule, CpuBackend(threads=1), kept=Kept(1 << 20))
    lanes = [Lane(runs, Values("cpu")), Lane(runs.beside(EmulatedCudaBackend()), Values("cpu"))]
    merged: dict[str, torch.Tensor] = {}
    merge_in_memory(
        schedule,
        lambda task: lanes[int(task.name.split(".")[1]) % 2],
        lambda task: torch.empty(task.shape, dtype=dtype),
        lambda task, tensor: merged.update({task.name: tensor}),
    )
    expected = me.merge_state_dicts(states[0], states[1:], "ties", **changes)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_what_is_kept_is_bounded() -> None:
    kept = Kept(3000)
    for i in range(20):
        kept.put(i, "answer", 500)
        assert kept.nbytes <= 3000
    assert kept.get(19) == "answer" and kept.get(1) is None
    kept.clear()
    assert kept.nbytes == 0 and kept.get(19) is None


def test_what_was_used_last_stays() -> None:
    kept = Kept(2200)
    kept.put("a", 1, 500)
    kept.put("b", 2, 500)
    assert kept.get("a") == 1
    kept.put("c", 3, 500)
    assert (kept.get("a"), kept.get("b"), kept.get("c")) == (1, None, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_counts_of_keys_answer_every_rank(dtype: torch.dtype) -> None:
    """Against a sort of all keys."""
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    shift = 0 if dtype.itemsize == 2 else 16
    bits = values.view({2: torch.int16, 4: torch.int32}[dtype.itemsize]).long()
    keys = (bits & ((1 << (8 * dtype.itemsize - 1)) - 1)) >> shift
    table = torch.bincount(keys, minlength=1 << 15)
    parts = [KeyCounts._of(torch.bincount(part, minlength=1 << 15)) for part in keys.split(1000)]
    for counts in (KeyCounts._of(table), KeyCounts.sum_of(parts)):
        for rank, key in enumerate(keys.sort(descending=True).values.tolist(), 1):
            found = counts.find(rank)
            assert (
                found == (key, int((keys > key).sum()), int((keys == key).sum())) if rank % 50 == 0 else True
            )
            assert found.key == key and found.above < rank <= found.above + found.equal
        for rank in (3001, 9999):
            with pytest.raises(IndexError):
                counts.find(rank)
