"""The element-wise and score-based methods against the papers' formulas in float64, and mergekit's where it has them.

The formulas are written anew here, with torch's own functions.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from adversarial import generator, quantised_models
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.backends.scores import exponential, logarithm

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SHAPES = ((), (1,), (7,), (0, 3), (33, 31), (3, 5, 7), (5, 1))


def inputs(
    shape: tuple[int, ...], models: int, dtype: torch.dtype, sparse: float = 0.6, seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base, and models that changed some of its elements."""
    g = generator(models, seed, math.prod(shape))
    base = torch.randn(shape, generator=g) * 0.02
    tuned = [
        base + torch.randn(shape, generator=g) * 0.004 * (torch.rand(shape, generator=g) < sparse)
        for _ in range(models)
    ]
    return base.to(dtype), [x.to(dtype) for x in tuned]


def close(ours: torch.Tensor, exact: torch.Tensor, base: torch.Tensor) -> None:
    """Within two units in the last place of the result, the base, or an ordinary number among the inputs."""
    assert ours.shape == exact.shape
    scale = torch.maximum(exact.abs(), base.double().abs()).clamp(min=0.02)
    error = (ours.double() - exact).abs()
    assert (error <= 2 * torch.finfo(ours.dtype).eps * scale).all(), error.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearswap(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base, [model] = inputs(shape, 1, dtype)
    for t in (0.0, 1e-7, 3e-3):
        b, x = base.double(), model.double()
        weight = (t / (x - b).abs().clamp(min=1e-6)).clamp(max=1)
        close(me.merge_tensors(base, [model], "nearswap", t=t), weight * x + (1 - weight) * b, base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("models", (1, 2, 4))
def test_ram(dtype: torch.dtype, shape: tuple[int, ...], models: int) -> None:
    base, tuned = inputs(shape, models, dtype)
    for epsilon, r, alpha in ((1e-5, 0.1, 0.2), (2e-3, 0.5, 3.0), (0.0, 2.0, 0.0)):
        b = base.double()
        deltas = torch.stack([x.double() - b for x in tuned])
        active = deltas.to(dtype).double().abs() > epsilon
        count = active.sum(0)
        alone = torch.where(active & (count == 1), deltas, 0.0)
        shared = (torch.where(active & (count > 1), deltas, 0.0) / count.clamp(min=1)).sum(0)
        close(me.merge_tensors(base, tuned, "ram", epsilon=epsilon), b + alone.sum(0) + shared, base)
        factors = []
        for own in active:
            together, unique = int((own & (count > 1)).sum()), int((own & (count == 1)).sum())
            ratio = together / unique if unique else math.inf if together else 0.0
            factors.append(1 + r * min(ratio, alpha))
        weighted = sum(factor * one for factor, one in zip(factors, alone, strict=True))
        merged = me.merge_tensors(base, tuned, "ramplus_tl", epsilon=epsilon, r=r, alpha=alpha)
        close(merged, b + weighted + shared, base)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("models", (1, 2, 4))
@pytest.mark.parametrize("share", (0.0, 0.25, 0.7, 1.0))
def test_sce(dtype: torch.dtype, shape: tuple[int, ...], models: int, share: float) -> None:
    """Of numbers without ties: FuseChat's algorithm (Wan et al., 2024)."""
    base, tuned = inputs(shape, models, dtype)
    b = base.double()
    deltas = torch.stack([x.double() - b for x in tuned])
    if share < 1:
        variance = (deltas - deltas.mean(0)).square().mean(0).flatten()
        k = int(int((variance > 1e-20).sum()) * share)
        selected = torch.zeros_like(variance)
        selected[variance.topk(k).indices] = 1
        deltas = deltas * selected.view(b.shape)
    energy = deltas.reshape(models, -1).square().sum(1)
    weights = energy / energy.sum() if energy.sum() else torch.full_like(energy, 1 / models)
    weights = weights.view(-1, *[1] * len(shape))
    agrees = (deltas != 0) & ((deltas > 0) == (deltas.sum(0) >= 0))
    divisor = (weights * agrees).sum(0)
    mean = (weights * agrees * deltas).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    close(me.merge_tensors(base, tuned, "sce", select_topk=share), b + mean, base)


def test_sce_selects_the_same_positions_of_all_models() -> None:
    """And counts them. Ties are split by draws, by index, or not at all."""
    base, tuned = quantised_models(6_000, 3, torch.bfloat16)
    deltas = torch.stack([x.float() - base.float() for x in tuned])
    variance = deltas.var(0, unbiased=False)
    wanted = int(int((variance > 1e-14).sum()) * 0.3)
    kept = {}
    for ties in ("spread", "index", "all"):
        models = [{"w": x} for x in tuned]
        merged = me.merge_state_dicts({"w": base}, models, "sce", select_topk=0.3, ties=ties)["w"]
        changed = merged != base
        kept[ties] = int(changed.sum())
        assert variance[changed].min() >= variance.sort(descending=True).values[wanted - 1] * (1 - 1e-5)
    assert kept["index"] <= wanted and kept["index"] <= kept["all"]
    assert abs(kept["spread"] - kept["index"]) < 0.1 * wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arcee_fusion(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base, [model] = inputs(shape, 1, dtype, sparse=1.0)
    b, x = base.double(), model.double()
    p, q = (values.softmax(-1) + 1e-8 for values in (x, b))
    importance = (x - b).abs() * (p * (p / q).log()).sum(-1, keepdim=True).clamp(min=0)
    ours = me.merge_tensors(base, [model], "arcee_fusion")
    if not importance.numel():
        assert ours.shape == base.shape
        return
    ordered = importance.flatten().sort().values
    last = len(ordered) - 1
    first, median, third = (ordered[i] for i in (last // 4, last // 2, 3 * last // 4))
    threshold = median + 1.5 * (third - first)
    far = (importance - threshold).abs() > 1e-5 * threshold  # what float32 decides alike
    exact = torch.where(importance >= threshold, x, b)
    close(torch.where(far, ours, base), torch.where(far, exact, b), base)
    assert far.float().mean() > 0.9 or len(ordered) < 9


def test_arcee_fusion_takes_all_of_lines_of_one_element() -> None:
    """Their softmax is 1 in both, so that nothing stands out."""
    base, [model] = inputs((9, 1), 1, torch.float32, sparse=1.0)
    assert torch.equal(me.merge_tensors(base, [model], "arcee_fusion"), base + (model - base))


@pytest.mark.parametrize("method", ("nearswap", "ram", "ramplus_tl", "sce", "arcee_fusion"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_unchanged_tensor_stays(method: str, dtype: torch.dtype) -> None:
    base, _ = inputs((40, 50), 1, dtype)
    options = {"t": 1e-7} if method == "nearswap" else {}
    for backend in ("cpu", "reference"):
        assert torch.equal(me.merge_tensors(base, [base.clone()], method, backend=backend, **options), base)


@pytest.mark.parametrize("method", ("nearswap", "ram", "ramplus_tl", "sce", "arcee_fusion"))
def test_nan_is_refused_or_stays_in_its_place(method: str) -> None:
    base, tuned = inputs((40, 50), 1 if method in ("nearswap", "arcee_fusion") else 3, torch.bfloat16)
    tuned[0][3, 4] = float("nan")
    options = {"t": 1e-3} if method == "nearswap" else {}
    with pytest.raises(me.NonFiniteError, match="1 NaN or infinite"):
        me.merge_tensors(base, tuned, method, **options)
    merged = me.merge_tensors(base, tuned, method, allow_nonfinite=True, **options)
    if method == "sce":  # its weights are those of the whole tensor
        return
    others = torch.ones_like(base, dtype=torch.bool)
    others[3] = method == "arcee_fusion"  # a line without a divergence has no importance
    others[3, 4] = False
    assert merged[others].isfinite().all()


@settings(max_examples=200, deadline=None)
@given(st.floats(-700, 0))
def test_exponentials_are_off_by_two_units(x: float) -> None:
    with localcontext(prec=60):
        exact = Decimal(x).exp()
        found = Decimal(float(exponential(torch.tensor([x], dtype=torch.float64))))
        assert abs(found - exact) <= 2 * Decimal(math.ulp(float(exact)))


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.floats(1e-9, 1e9), st.floats(0.999, 1.001), st.floats(1e-300, 1e300)))
def test_logarithms_are_off_by_three_units(x: float) -> None:
    with localcontext(prec=60):
        exact = Decimal(x).ln()
        found = Decimal(float(logarithm(torch.tensor([x], dtype=torch.float64))))
        assert abs(found - exact) <= 3 * Decimal(math.ulp(float(exact)))


def test_exponentials_at_their_ends() -> None:
    x = torch.tensor([0.0, -0.0, -700.0, -700.1, -1e300, -math.inf, math.nan], dtype=torch.float64)
    found = exponential(x).tolist()
    assert found[:2] == [1.0, 1.0] and found[2] > 0 and found[3:6] == [0.0] * 3 and math.isnan(found[6])
    assert math.isnan(float(logarithm(torch.tensor([math.nan], dtype=torch.float64))))
    assert float(logarithm(torch.tensor([1.0], dtype=torch.float64))) == 0.0
