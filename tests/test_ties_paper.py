"""`trim_scope: model` with `ties: all` is TIES-Merging as in the paper and its code.

Trim each model's whole task vector at its k-th largest magnitude, elect the sign of the sum, and average
what agrees with it. The paper does not define the elected sign of a sum of exactly zero; here it is +.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from adversarial import generator, quantised_models

import merge_engine as me

StateDict = dict[str, torch.Tensor]

SHAPES = {
    "embed.weight": (50, 16),
    "layers.0.norm.weight": (16,),
    "layers.0.mlp.weight": (64, 16),
    "layers.1.conv.weight": (8, 4, 3),
    "layers.1.mlp.weight": (333, 7),
    "scale": (),
}
COUNT = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def models_of(kind: str, dtype: torch.dtype, count: int) -> tuple[StateDict, list[StateDict]]:
    """A base and fine-tunes; the layers of each model change by different amounts."""
    if kind == "tied":
        base, tuned = quantised_models(COUNT, count, dtype, seed=2)
    else:
        g = generator(count, 6)
        base = (torch.randn(COUNT, generator=g) * 0.02).to(dtype)
        change = torch.linspace(0.5, 2, COUNT) * 0.003
        tuned = [(base.float() + change * torch.randn(COUNT, generator=g)).to(dtype) for _ in range(count)]
    return split(base), [split(model) for model in tuned]


def split(flat: torch.Tensor) -> StateDict:
    pieces = flat.split([torch.Size(shape).numel() for shape in SHAPES.values()])
    return {name: piece.view(SHAPES[name]).clone() for name, piece in zip(SHAPES, pieces, strict=True)}


def flatten(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in SHAPES]).double()


def magnitudes(base: StateDict, model: StateDict) -> torch.Tensor:
    """What the trim compares: task vectors in the type of the checkpoints, as the paper's code has them."""
    dtype = base["scale"].dtype
    return (flatten(model) - flatten(base)).abs().to(dtype).double()


def paper(base: StateDict, models: list[StateDict], densities: list[float]) -> torch.Tensor:
    """TIES-Merging of whole models, in float64."""
    vectors = torch.stack([flatten(model) - flatten(base) for model in models])
    for vector, model, density in zip(vectors, models, densities, strict=True):
        size = magnitudes(base, model)
        vector[size < size.sort(descending=True).values[int(density * COUNT) - 1]] = 0
    sign = torch.where(vectors.sum(0) >= 0, 1.0, -1.0)
    agreeing = vectors.sign() == sign
    mean = (vectors * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    return flatten(base) + mean


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("kind", ("tied", "random"))
@pytest.mark.parametrize("densities", ([0.2], [0.2, 0.2], [0.1, 0.5, 0.31], [0.2, 0.9, 0.4, 0.05, 0.6]))
def test_all_ties_over_the_model_is_the_paper(dtype: torch.dtype, kind: str, densities: list[float]) -> None:
    base, models = models_of(kind, dtype, len(densities))
    merged = me.merge_state_dicts(base, models, "ties", density=densities, ties="all", trim_scope="model")
    exact, ours = paper(base, models, densities), flatten(merged)
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}[dtype]
    # Half a step of the output type, and for the mean's own rounding a few of float32's.
    allowed = exact.abs() * step + 2.0**-25 + 8 * 2.0**-24 * exact.abs()
    assert ((ours - exact).abs() <= allowed).all()
    assert (exact != flatten(base)).double().mean() > min(densities) / 2
    if dtype != torch.float32:
        assert (ours != exact.to(dtype).double()).double().mean() < 0.01


@pytest.mark.parametrize("kind", ("tied", "random"))
def test_one_threshold_for_the_model_is_not_one_for_each_tensor(kind: str) -> None:
    base, models = models_of(kind, torch.float32, 2)
    whole = me.merge_state_dicts(base, models, "ties", density=0.2, ties="all", trim_scope="model")
    each = me.merge_state_dicts(base, models, "ties", density=0.2, ties="all")
    assert any(not torch.equal(whole[name], each[name]) for name in SHAPES)


def test_votes_that_cancel_elect_plus() -> None:
    """The paper's code gives such an entry the sign that most others have; here it is always +."""
    base = {"x": torch.zeros(4)}
    up, down = {"x": torch.tensor([1.0, 2.0, -1.0, 0.0])}, {"x": torch.tensor([-1.0, -2.0, 1.0, 0.0])}
    for scope in ("tensor", "model"):
        merged = me.merge_state_dicts(base, [up, down], "ties", ties="all", trim_scope=scope)
        assert torch.equal(merged["x"], torch.tensor([1.0, 2.0, 1.0, 0.0]))


def changed(base: StateDict, merged: StateDict) -> torch.Tensor:
    return flatten(base) != flatten(merged)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("density", (0.0003, 0.1, 0.25, 0.6))
def test_index_over_the_model_keeps_exactly_k(dtype: torch.dtype, density: float) -> None:
    base, models = models_of("tied", dtype, 1)
    merged = me.merge_state_dicts(base, models, "ties", density=density, ties="index", trim_scope="model")
    k = max(1, int(density * COUNT))
    kept = changed(base, merged)
    assert kept.sum() == k
    size = magnitudes(base, models[0])
    cut = size.sort(descending=True).values[k - 1]
    assert kept[size > cut].all() and not kept[size < cut].any()
    # Among equals, tensors come in the order of their names and elements in theirs.
    decisions = by_name(kept)[by_name(size == cut)].int()
    assert (decisions.diff() <= 0).all()


def by_name(flags: torch.Tensor) -> torch.Tensor:
    pieces = split(flags)
    return torch.cat([pieces[name].reshape(-1) for name in sorted(SHAPES)])


@pytest.mark.parametrize("density", (0.1, 0.25, 0.6))
def test_spread_over_the_model_keeps_k_and_favours_no_part(density: float) -> None:
    base, models = models_of("tied", torch.bfloat16, 1)
    merged = me.merge_state_dicts(base, models, "ties", density=density, trim_scope="model")
    kept = changed(base, merged)
    size = magnitudes(base, models[0])
    k = int(density * COUNT)
    cut = size.sort(descending=True).values[k - 1]
    at_cut, above = size == cut, int((size > cut).sum())
    assert kept[size > cut].all() and not kept[size < cut].any()
    share = (k - above) / int(at_cut.sum())
    for part in (at_cut, at_cut & (torch.arange(COUNT) > COUNT // 2)):
        equal = int(part.sum())
        deviation = (equal * share * (1 - share)) ** 0.5
        assert abs(int((kept & part).sum()) - equal * share) <= 5 * deviation + 1
