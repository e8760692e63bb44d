"""Many small tensors on a CUDA device: the bytes and counts of the CPU, from a handful of launches.

The device is emulated, and does all work as late as it may (tests/emulated_cuda).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial import DTYPES, extreme_models, generator, quantised_models
from emulated_cuda.backend import EmulatedCudaBackend, handed_in
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.backends.base import Backend
from merge_engine.backends.operations import Chunk, Dense, Draw
from merge_engine.backends.reference import ReferenceBackend
from merge_engine.backends.statistics import SUM_BLOCK
from merge_engine.dtypes import BF16

SHAPES = ((), (0,), (1,), (7,), (64,), (63, 3), (513,), (2048,), (5, 17, 2, 2), (4096,), (4, 1500), (1, 9001))
RECIPES: dict[str, dict[str, Any]] = {
    "ties": {"merge_method": "ties", "parameters": {"density": 0.3, "weight": 0.5}},
    "slack": {
        "merge_method": "ties",
        "parameters": {"density": 0.3, "trim_slack": 0.1, "sign_slack": 0.5, "weight": 0.5},
    },
    "by index": {"merge_method": "ties", "parameters": {"density": 0.3, "ties": "index", "weight": 0.5}},
    "one threshold": {
        "merge_method": "ties",
        "dtype": "float32",
        "parameters": {"density": 0.3, "trim_slack": 0.1, "trim_scope": "model", "weight": 0.5},
    },
    "one threshold by index": {
        "merge_method": "breadcrumbs",
        "dtype": "bfloat16",
        "parameters": {"density": 0.4, "ties": "index", "trim_scope": "model", "weight": 0.5},
    },
    "mergekit": {
        "merge_method": "ties",
        "dtype": "float16",
        "arithmetic": "mergekit",
        "parameters": {"density": 0.3, "weight": 0.5},
    },
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"density": 0.4, "weight": 0.7}},
    "della": {"merge_method": "della", "parameters": {"density": 0.5, "epsilon": 0.2, "weight": 0.5}},
    "della by density": {
        "merge_method": "della",
        "parameters": {"density": 0.5, "epsilon": 0.2, "rescale": "density", "weight": 0.5},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "parameters": {"density": 0.4, "gamma": 0.1, "rescale": "true", "weight": 0.8},
    },
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"weight": 0.4}},
    "linear": {"merge_method": "linear", "parameters": {"weight": 0.5}},
}


@pytest.fixture(scope="module")
def backend() -> EmulatedCudaBackend:
    return EmulatedCudaBackend()


def checkpoint_states(kinds: list[tuple[tuple[int, ...], torch.dtype, str]]) -> list[dict[str, torch.Tensor]]:
    """A base and two models with a tensor of each kind."""
    states: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for i, (shape, dtype, kind) in enumerate(kinds):
        count = torch.Size(shape).numel()
        if kind == "steps":  # that cannot be merged, and are the same everywhere
            tensors = [torch.randint(0, 99, (count,), generator=generator(i))] * 3
        else:
            make = extreme_models if kind == "extreme" else quantised_models
            base, models = make(count, 2, dtype)
            tensors = [base, base, base] if kind == "unchanged" else [base, *models]
        for state, values in zip(states, tensors, strict=True):
            state[f"layers.{i:03}.w"] = values.view(shape).clone()
    return states


def saved(states: list[dict[str, torch.Tensor]], save_checkpoint, name: str = "") -> dict[str, Any]:
    base, a, b = (str(save_checkpoint(name + k, state)) for k, state in zip("bxy", states, strict=True))
    return {"base_model": base, "models": [{"model": a}, {"model": b}], "seed": 3}


def without_base(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe as its method takes it."""
    return {k: v for k, v in recipe.items() if k != "base_model" or recipe["merge_method"] != "linear"}


def same(backend: EmulatedCudaBackend, recipe: dict[str, Any], memory: str) -> None:
    recipe = without_base(recipe) | {"allow_nonfinite": True}
    expected = me.run(recipe, device="cpu", memory=memory)
    merged = me.run(recipe, backend=backend, memory=memory)
    assert merged.counts == expected.counts
    assert merged.trimmed_to == expected.trimmed_to
    assert merged.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        result = merged.tensors[name]
        assert result.dtype == tensor.dtype and result.shape == tensor.shape
        assert torch.equal(result.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("name", RECIPES)
def test_every_size_and_kind(backend, save_checkpoint, name: str) -> None:
    """In one batch, and in several of which three are under way."""
    kinds = [(shape, dtype, "quantised") for shape in SHAPES for dtype in DTYPES[:3]]
    kinds += [((64,), torch.bfloat16, kind) for kind in ("steps", "unchanged", "quantised") * 4]
    recipe = saved(checkpoint_states(kinds), save_checkpoint) | RECIPES[name]
    for memory in ("400MB", "500KB"):
        same(backend, recipe, memory)


kinds_of_tensors = st.lists(
    st.tuples(
        st.sampled_from(SHAPES[:8]),
        st.sampled_from(DTYPES),
        st.sampled_from(("quantised", "quantised", "extreme", "unchanged", "steps")),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25)
@given(kinds=kinds_of_tensors, name=st.sampled_from(sorted(RECIPES)))
def test_any_mixture(tmp_path_factory, backend, kinds, name: str) -> None:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("mixture")

    def save(key: str, state: dict[str, torch.Tensor]) -> Path:
        (folder / key).mkdir()
        (folder / key / "config.json").write_text("{}")
        save_file(state, folder / key / "model.safetensors")
        return folder / key

    same(backend, saved(checkpoint_states(kinds), save) | RECIPES[name], "400MB")


def launches(backend: EmulatedCudaBackend, recipe: dict[str, Any]) -> int:
    """How much a merge hands to the device: kernels, copies, fillings."""
    before = handed_in()
    me.run(without_base(recipe), backend=backend)
    return handed_in() - before


@pytest.mark.parametrize("name", [name for name in RECIPES if "by index" not in name])
def test_launches_of_small_tensors(backend, save_checkpoint, name: str) -> None:
    """Not several for each: 200 tensors, a tenth of them unchanged, not all of a multiple of 16 bytes."""
    norms = [((64 + i % 3,), torch.bfloat16, "unchanged" if i % 10 == 9 else "quantised") for i in range(200)]
    recipe = saved(checkpoint_states(norms), save_checkpoint) | RECIPES[name]
    assert 0 < launches(backend, recipe) < 40


def test_what_a_failed_batch_asked_for_is_dropped(backend, save_checkpoint) -> None:
    states = checkpoint_states([((64,), torch.bfloat16, kind) for kind in ("quantised", "steps")])
    whole = saved(states, save_checkpoint, "whole") | RECIPES["ties"]
    states[1]["layers.001.w"] += 1
    broken = saved(states, save_checkpoint, "broken") | RECIPES["ties"]
    with pytest.raises(me.PlanError, match="must be the same in all inputs"):
        me.run(broken, backend=backend)
    before = handed_in()
    backend.fetch(backend.mark())
    assert handed_in() == before
    same(backend, whole, "400MB")


def test_chunks_of_a_tensor_in_one_batch(backend) -> None:
    """Their sums are looked at when all is asked for."""
    size, cut = 2 * SUM_BLOCK + 77, SUM_BLOCK
    base, models = quantised_models(size, 2, torch.bfloat16)

    def chunk(on: Backend, first: int, last: int) -> Chunk:
        arrays = [on.tensor(tensor[first:last]) for tensor in (base, *models)]
        return Chunk(arrays, True, BF16, first, last - first)

    reference = ReferenceBackend()
    masks = [Dense(), Draw(2**31, 5)]
    whole = chunk(reference, 0, size)
    with backend.together():
        front, back = chunk(backend, 0, cut), chunk(backend, cut, size)
        norms = [backend.l1_norms(part, masks, False) for part in (front, back)]
        products = [backend.gram(part) for part in (front, back)]
        before = handed_in()
        first, last = map(backend.fetch, norms)
        assert first.merge(last) == reference.l1_norms(whole, masks, False)
        first, last = map(backend.fetch, products)
        assert first.merge(last) == reference.gram(whole)
        assert handed_in() - before < 10


def test_inner_products_of_many_tensors_are_one_launch(backend) -> None:
    reference = ReferenceBackend()
    tensors = [[*quantised_models(64 + i, 2, torch.bfloat16, seed=i)] for i in range(100)]

    def gram(on: Backend, base: torch.Tensor, models: list[torch.Tensor]) -> Any:
        return on.gram(Chunk([on.tensor(x) for x in (base, *models)], True, BF16, 0, len(base)))

    before = handed_in()
    with backend.together():
        asked = [gram(backend, *tensor) for tensor in tensors]
    assert [backend.fetch(sums) for sums in asked] == [gram(reference, *tensor) for tensor in tensors]
    assert handed_in() - before < 10


def test_counts_are_bounded(backend, save_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is launched in turns."""
    kinds = [((64,), dtype, "quantised") for dtype in DTYPES * 5]
    recipe = saved(checkpoint_states(kinds), save_checkpoint) | RECIPES["ties"]
    at_once = launches(backend, recipe)
    monkeypatch.setattr("merge_engine.backends.cuda.batch.COUNTS_BYTES", 2 << 20)
    same(backend, recipe, "400MB")
    assert launches(backend, recipe) > at_once
