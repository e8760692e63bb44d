"""The methods that see tensors as vectors, against the papers' formulas in float64, which never see a Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from adversarial import generator
from conftest import SaveCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

import merge_engine as me
from merge_engine import _native

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (70,), (33, 31), (3, 5000), (5, 7, 3), (40, 1), (1, 40))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
angles = st.floats(-(2.0**20), 2.0**20) | st.integers(-600_000, 600_000).map(lambda k: k * math.pi / 2)


def within(value: float, exact: mpf) -> bool:
    """Whether a number is as near to the exact one as docs/arithmetic.md says."""
    return abs(mpf(value) - exact) <= abs(exact) * mpf(2) ** -50


@settings(max_examples=300, deadline=None)
@given(angle=angles, x=st.floats(-1, 1) | st.floats(0, 1e-8).map(lambda rest: 1 - rest))
def test_angles_are_as_exact_as_stated(angle: float, x: float) -> None:
    with mp.workprec(340):
        assert within(_native.sine(angle=angle), mp.sin(mpf(angle)))
        assert within(_native.cosine(angle=angle), mp.cos(mpf(angle)))
        assert within(_native.arc_cosine(x=x), mp.acos(mpf(x)))
        assert within(_native.arc_cosine(x=-x), mp.acos(-mpf(x)))


def test_angles_without_a_value() -> None:
    for function in (_native.sine, _native.cosine):
        for angle in (math.inf, -math.inf, math.nan, 2.0**50):
            assert math.isnan(function(angle=angle))
        assert not math.isnan(function(angle=2.0**49))
    assert math.isnan(_native.arc_cosine(x=1.5)) and math.isnan(_native.arc_cosine(x=math.nan))
    assert _native.sine(angle=0.0) == 0 == _native.arc_cosine(x=1.0) and _native.cosine(angle=0.0) == 1


# The formulas. Vectors are float64, of any shape; `dim` is the dimension that lines are along, None for a flat tensor.


def lines_of(x: torch.Tensor, dim: int | None) -> torch.Tensor:
    """[lines, elements]"""
    if dim is None or x.dim() < 2:
        return x.reshape(1, -1)
    return x.movedim(dim, -1).reshape(-1, x.shape[dim])


def back(lines: torch.Tensor, like: torch.Tensor, dim: int | None) -> torch.Tensor:
    if dim is None or like.dim() < 2:
        return lines.reshape(like.shape)
    shape = like.movedim(dim, -1).shape
    return lines.reshape(shape).movedim(-1, dim)


def arc(
    a: torch.Tensor, b: torch.Tensor, t: float, straight: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """From a to b along an arc, line by line."""
    units = [v / torch.where(v.norm(dim=1) > 0, v.norm(dim=1), 1.0)[:, None] for v in (a, b)]
    cosine = (units[0] * units[1]).sum(1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    curved = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return torch.where(straight(cosine), (1 - t) * a + t * b, curved)


def slerp(base: torch.Tensor, models: Sequence[torch.Tensor], t: float) -> torch.Tensor:
    flat = [lines_of(v, None) for v in (base, models[0])]
    return back(arc(*flat, t, lambda cosine: cosine.abs() > 0.9995), base, None)


def nuslerp(
    base: torch.Tensor | None, models: Sequence[torch.Tensor], weight: Sequence[float], **options: bool
) -> torch.Tensor:
    dim = None if options.get("nuslerp_flatten", True) else 0 if options.get("nuslerp_row_wise") else -1
    origin = torch.zeros_like(models[0]) if base is None else base
    vectors = [lines_of(model - origin, dim) for model in models]
    t = weight[1] / (weight[0] + weight[1])
    return origin + back(arc(*vectors, t, lambda cosine: 1 - cosine**2 <= 1e-13), origin, dim)


def multislerp(
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    weight: Sequence[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> torch.Tensor:
    """The whole exponential map, with the tangents that cancel out."""
    origin = torch.zeros_like(models[0]) if base is None else base
    vectors = torch.stack([(model - origin).reshape(-1) for model in models])
    weights = torch.tensor(weight, dtype=torch.float64)
    if normalize_weights:
        weights = weights / weights.sum()
    norms = vectors.norm(dim=1)
    units = vectors / (norms + eps)[:, None]
    mean = (weights[:, None] * units).sum(0)
    if len(models) == 2 and float(mean.norm()) < eps:
        return origin + (weights[:, None] * vectors).sum(0).reshape(origin.shape)
    pole = mean / mean.norm()
    tangents = units - (units @ pole)[:, None] * pole
    tangent = (weights[:, None] * tangents).sum(0)
    length = tangent.norm() + eps
    point = pole * torch.cos(length) + tangent * (torch.sin(length) / length)
    return origin + (point * (weights * norms).sum()).reshape(origin.shape)


def karcher(
    base: None, models: Sequence[torch.Tensor], max_iter: int = 10, tol: float = 1e-5
) -> torch.Tensor:
    vectors = [model.reshape(-1) for model in models]
    norms = [float(v.norm()) for v in vectors]
    units = [v / norm for v, norm in zip(vectors, norms, strict=True) if norm > tol]
    if not units:
        return torch.zeros_like(models[0])
    mean = torch.stack(units).mean(0)
    mean = mean / mean.norm() if float(mean.norm()) >= tol else units[0].clone()
    for _ in range(max_iter):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = min(max(float(mean @ unit), -1), 1)
            angle = math.acos(cosine)
            if tol <= angle < math.pi - 1e-6:
                tangent += angle / math.sin(angle) * (unit - cosine * mean) / len(units)
        length = float(tangent.norm())
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
        mean = mean / mean.norm()
    return (sum(norms) / len(norms) * mean).reshape(models[0].shape)


def model_stock(
    base: torch.Tensor, models: Sequence[torch.Tensor], filter_wise: bool = False
) -> torch.Tensor:
    dim = -1 if filter_wise else None
    deltas = torch.stack([lines_of(model - base, dim) for model in models])
    count, rows = len(models), []
    for line in deltas.unbind(1):
        norms = line.norm(dim=1)
        pairs = [(i, k) for i in range(count) for k in range(i)]
        cosines = [float(line[i] @ line[k] / ((norms[i] * norms[k]) or 1)) for i, k in pairs]
        cosine = sum(cosines) / len(cosines)
        divisor = 1 + (count - 1) * cosine
        t = 0.0 if abs(divisor) < 1e-6 else count * cosine / divisor
        rows.append(t * line.mean(0))
    return base + back(torch.stack(rows), base, dim)


CASES: dict[str, tuple[Callable[..., torch.Tensor], bool, int, dict[str, Any]]] = {
    "slerp": (slerp, True, 1, {"t": 0.3}),
    "slerp beyond": (slerp, True, 1, {"t": -1.7}),
    "nuslerp": (nuslerp, False, 2, {"weight": [0.3, 0.9]}),
    "nuslerp on a base": (nuslerp, True, 2, {"weight": [1.0, -0.2]}),
    "nuslerp by rows": (nuslerp, False, 2, {"weight": [1.0, 3.0], "nuslerp_flatten": False}),
    "nuslerp by rows on a base": (nuslerp, True, 2, {"weight": [1.0, 3.0], "nuslerp_flatten": False}),
    "nuslerp by columns": (
        nuslerp,
        False,
        2,
        {"weight": [1.0, 1.5], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "nuslerp by columns on a base": (
        nuslerp,
        True,
        2,
        {"weight": [2.0, 1.5], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "multislerp": (multislerp, False, 3, {"weight": [0.3, 0.9, 0.4]}),
    "multislerp on a base": (multislerp, True, 4, {"weight": [0.3, 0.9, -0.2, 1.0]}),
    "multislerp with a wide eps": (
        multislerp,
        True,
        2,
        {"weight": [0.5, 0.7], "normalize_weights": False, "eps": 0.4},
    ),
    "karcher": (karcher, False, 3, {}),
    "karcher of five": (karcher, False, 5, {"max_iter": 30, "tol": 1e-9}),
    "karcher, one step": (karcher, False, 4, {"max_iter": 1}),
    "model_stock": (model_stock, True, 3, {}),
    "model_stock of two": (model_stock, True, 2, {}),
    "model_stock by rows": (model_stock, True, 4, {"filter_wise": True}),
}


def inputs(
    shape: tuple[int, ...], models: int, dtype: torch.dtype, seed: int, near: bool
) -> list[torch.Tensor]:
    """A base and models: fine-tunes that share a direction, or models that have nothing in common."""
    g = generator(seed, 11)
    base, shared = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    tuned = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(models)]
    if near:
        tuned = [base + 0.05 * (shared + 0.7 * own) for own in tuned]
    return [tensor.to(dtype) for tensor in (base, *tuned)]


def merged(case: str, tensors: list[torch.Tensor], **keys: Any) -> torch.Tensor:
    _, has_base, _, options = CASES[case]
    base = tensors[0] if has_base else None
    return me.merge_tensors(base, tensors[1:], case.replace(",", "").split()[0], **options, **keys)


@pytest.mark.parametrize("case", CASES)
def test_the_formula_of_the_paper(case: str) -> None:
    formula, has_base, models, options = CASES[case]
    for seed, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            for near in (True, False):
                tensors = inputs(shape, models, dtype, seed, near)
                found = merged(case, tensors)
                exact = [tensor.double() for tensor in tensors]
                expected = formula(exact[0] if has_base else None, exact[1:], **options)
                # In R, or rounded to W once. Few elements may cancel out, and then coefficients are large.
                size = max(float(tensor.abs().max()) for tensor in (*exact, expected))
                step = max(torch.finfo(dtype).eps, 2.0**-52 if dtype == torch.float64 else 2.0**-23)
                bound = (1 if dtype.itemsize == 2 else 40) * step * size + 1e-12 * size
                assert found.shape == torch.Size(shape) and found.dtype == dtype
                error = float((found.double() - expected).abs().max())
                assert error <= bound * (4 if len(shape) == 0 or 1 in shape else 1), (shape, dtype, near)


@pytest.mark.parametrize("case", CASES)
def test_backends_give_the_same_bytes(case: str) -> None:
    """The rest is in test_conformance.py; this is that they are asked for the same."""
    models = CASES[case][2]
    for shape in ((70, 130), (3, 40, 9), (5000,)):
        tensors = inputs(shape, models, torch.bfloat16, 3, True)
        for keys in ({}, {"arithmetic": "mergekit", "out_dtype": "float32"}):
            assert torch.equal(
                merged(case, tensors, backend="cpu", **keys),
                merged(case, tensors, backend="reference", **keys),
            )


def test_ends_of_the_arc() -> None:
    base, model = inputs((40, 50), 1, torch.float32, 1, False)
    for t, expected in ((0.0, base), (1.0, model)):
        assert torch.equal(me.merge_tensors(base, [model], "slerp", t=t), expected)
    second = model.flip(0)
    for weight, expected in (([1.0, 0.0], model), ([0.0, 1.0], second)):
        for options in ({}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}):
            found = me.merge_tensors(None, [model, second], "nuslerp", weight=weight, **options)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ("nuslerp", "multislerp", "karcher", "model_stock", "slerp"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_inputs_come_back(method: str, dtype: torch.dtype) -> None:
    """Up to the rounding of coefficients: parallel vectors have no arc between them."""
    [x] = inputs((30, 70), 0, dtype, 2, False)
    if method == "slerp":
        found = me.merge_tensors(x, [x], method, t=0.4)
    elif method == "model_stock":
        found = me.merge_tensors(x, [x, x], method)
    else:
        found = me.merge_tensors(None, [x, x.clone()], method)
    assert torch.allclose(found.double(), x.double(), rtol=2 * max(torch.finfo(dtype).eps, 2.0**-52), atol=0)


def test_opposite_vectors() -> None:
    [x] = inputs((64, 64), 0, torch.float32, 5, False)
    near = {"rtol": 1e-6, "atol": 0}
    assert torch.allclose(me.merge_tensors(x, [-x], "slerp", t=0.25), 0.5 * x, **near)
    for options in ({}, {"nuslerp_flatten": False}):
        found = me.merge_tensors(None, [x, -x], "nuslerp", weight=[3.0, 1.0], **options)
        assert torch.allclose(found, 0.5 * x, **near)
    assert torch.equal(me.merge_tensors(None, [x, -x], "multislerp"), torch.zeros_like(x))
    assert torch.allclose(me.merge_tensors(None, [x, -x], "karcher"), x, **near)
    stock = me.merge_tensors(torch.zeros_like(x), [x, -x], "model_stock")
    assert torch.equal(stock, torch.zeros_like(x))
    with pytest.raises(me.PlanError, match="the weighted directions of the models cancel out"):
        me.merge_tensors(None, [x, -x, torch.zeros_like(x)], "multislerp")


@pytest.mark.parametrize("method", ("slerp", "nuslerp", "multislerp", "karcher", "model_stock"))
def test_zero_vectors(method: str) -> None:
    [x] = inputs((8, 70), 0, torch.float32, 7, False)
    zero = torch.zeros_like(x)
    options = {"t": 0.3} if method == "slerp" else {}
    base = zero if method in ("slerp", "model_stock") else None
    count = 1 if method == "slerp" else 2
    assert torch.equal(me.merge_tensors(base, [zero] * count, method, **options), zero)
    if method != "slerp":
        assert torch.equal(me.merge_tensors(x, [x] * count, method, **options) if base is not None else x, x)
    one = [x] if method == "slerp" else [x, zero]
    assert me.merge_tensors(base, one, method, **options).isfinite().all()
    if method == "multislerp":
        assert torch.equal(me.merge_tensors(x, [x, x, x], method), x)


def test_one_model() -> None:
    base, model = inputs((9, 9), 1, torch.bfloat16, 9, True)
    assert torch.equal(me.merge_tensors(None, [model], "karcher"), model)
    assert torch.equal(me.merge_tensors(None, [model], "multislerp", weight=0.3), model)
    assert torch.equal(me.merge_tensors(base, [model], "multislerp", weight=0.3), model)


@pytest.mark.parametrize("case", CASES)
def test_empty_tensors(case: str) -> None:
    for shape in ((0,), (0, 5), (5, 0)):
        assert merged(case, inputs(shape, CASES[case][2], torch.float32, 1, False)).shape == shape


@pytest.mark.parametrize("case", CASES)
def test_infinity_is_refused_or_spreads(case: str) -> None:
    tensors = inputs((6, 70), CASES[case][2], torch.float32, 4, True)
    tensors[-1][2, 3] = math.inf
    with pytest.raises(me.NonFiniteError):
        merged(case, tensors)
    assert merged(case, tensors, allow_nonfinite=True)[2].isnan().any()


def test_short_task_vectors_agree_as_long_ones_do() -> None:
    """mergekit's guard against small norms takes short vectors for unrelated ones; the paper knows no such guard."""
    zero = torch.zeros(4000)
    models = inputs((4000,), 3, torch.float32, 8, True)[1:]
    long = me.merge_tensors(zero, models, "model_stock")
    short = me.merge_tensors(zero, [model * 2.0**-24 for model in models], "model_stock")
    assert torch.equal(short * 2.0**24, long)
    guarded = me.merge_tensors(
        zero, [model * 2.0**-24 for model in models], "model_stock", arithmetic="mergekit"
    )
    assert float(guarded.norm()) < 0.5 * float(short.norm())


@pytest.mark.parametrize(
    ("method", "base", "models", "message"),
    (
        ("slerp", False, 1, "slerp needs a base model"),
        ("slerp", True, 2, "takes exactly 1 model.* besides the base model, not 2"),
        ("nuslerp", False, 1, "takes exactly 2 model.*, not 1"),
        ("nuslerp", True, 3, "takes exactly 2 model.* besides the base model, not 3"),
        ("model_stock", True, 1, "takes at least 2 model.* besides the base model, not 1"),
        ("model_stock", False, 2, "model_stock needs a base model"),
    ),
)
def test_numbers_of_models(method: str, base: bool, models: int, message: str) -> None:
    x = torch.ones(3)
    options = {"t": 0.5} if method == "slerp" else {}
    with pytest.raises(me.MergeError, match=message):
        me.merge_tensors(x if base else None, [x] * models, method, **options)


def test_weights_that_sum_to_zero() -> None:
    x = torch.randn(20, generator=generator(1))
    with pytest.raises(me.PlanError, match="the weights sum to 0"):
        me.merge_tensors(None, [x, x.flip(0)], "multislerp", weight=[1.0, -1.0])
    half = me.merge_tensors(None, [x, x.flip(0)], "nuslerp", weight=[1.0, -1.0])
    assert torch.equal(half, me.merge_tensors(None, [x, x.flip(0)], "nuslerp"))


def test_tensors_that_some_inputs_lack() -> None:
    a, b = {"x": torch.ones(3), "only.a": torch.full((2,), 2.0)}, {"x": torch.full((3,), 3.0)}
    for first, second in ((a, b), (b, a)):
        found = me.merge_state_dicts(first, [second], "slerp", t=0.5)
        assert torch.equal(found["only.a"], a["only.a"])
    assert torch.equal(me.merge_state_dicts(None, [a, b], "nuslerp")["only.a"], a["only.a"])
    assert torch.equal(me.merge_state_dicts(None, [a, b], "karcher")["only.a"], a["only.a"])
    with pytest.raises(me.PlanError, match="of the models only model 0 has it, and nuslerp takes exactly 2"):
        me.merge_state_dicts(a, [a, b], "nuslerp")
    stock = me.merge_state_dicts(a, [a, b], "model_stock")
    assert torch.equal(stock["only.a"], a["only.a"])


def test_recipes_name_the_base_in_either_way(save_checkpoint: SaveCheckpoint) -> None:
    """A base listed as a model is the base; without one in the recipe, nuslerp and multislerp have none."""
    held = [{"x": tensor} for tensor in inputs((40, 50), 2, torch.bfloat16, 6, True)]
    a, b, c = (str(save_checkpoint(name, state)) for name, state in zip("abc", held, strict=True))

    def run(
        method: str, models: Sequence[str], base: str | None, weight: float | None = None, **options: Any
    ):
        entry = {} if weight is None else {"parameters": {"weight": weight}}
        recipe = {
            "merge_method": method,
            "models": [{"model": model, **entry} for model in models],
            "parameters": options,
        }
        tensors = me.run(recipe | ({"base_model": base} if base else {})).tensors
        assert tensors is not None
        return tensors["x"]

    expected = me.merge_tensors(held[0]["x"], [held[1]["x"]], "slerp", t=0.4)
    for models in ([a, b], [b, a], [b]):
        assert torch.equal(run("slerp", models, a, t=0.4), expected)
    with pytest.raises(me.PlanError, match=r"slerp: takes exactly 1 model.* besides the base model, not 2"):
        run("slerp", [b, c], a, t=0.4)
    with pytest.raises(me.PlanError, match="slerp needs a base_model"):
        run("slerp", [a, b], None, t=0.4)
    x, y, z = (state["x"] for state in held)
    assert torch.equal(run("nuslerp", [b, c], None, 0.5), me.merge_tensors(None, [y, z], "nuslerp"))
    assert torch.equal(run("nuslerp", [b, c], a, 0.5), me.merge_tensors(x, [y, z], "nuslerp"))
    with pytest.raises(me.PlanError, match=r"nuslerp: takes exactly 2 model.* besides the base model, not 1"):
        run("nuslerp", [a, b], a, 0.5)
    assert torch.equal(run("karcher", [b, c], a), me.merge_tensors(None, [y, z], "karcher"))
    assert torch.equal(run("model_stock", [b, c], a), me.merge_tensors(x, [y, z], "model_stock"))
