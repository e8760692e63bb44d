"""The default arithmetic gives the published formulas, in real numbers rounded once.

The formulas are written here in plain float64, directly from their definitions. They share only the random draws with
the engine.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from adversarial import generator, quantised_models
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.backends.reference import draws

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SIGNIFICAND = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
SHAPE = (61, 33)
SEED, NAME = 5, "model.layers.3.mlp.weight"
ELECTING = ("ties", "dare_ties", "breadcrumbs_ties", "della")
NOT_ELECTING = ("task_arithmetic", "dare_linear", "breadcrumbs", "della_linear")
NORMALIZES = ("ties", "della", "linear")
RESCALES = ("dare_linear", "dare_ties", "della", "della_linear")

Array = np.ndarray[Any, Any]


def random_models(count: int, models: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = generator(count, models, 7)
    base = torch.randn(count, generator=g) * 0.02
    return base.to(dtype), [(base + 0.004 * torch.randn(count, generator=g)).to(dtype) for _ in range(models)]


@functools.cache
def uniform(model: int, count: int) -> Array:
    """The draw of every element, as a fraction of 2**32."""
    key = hashlib.blake2b(f"{SEED}\0{NAME}\0{model}".encode(), digest_size=8).digest()
    drawn = draws(int.from_bytes(key, "little"), torch.arange(count))
    return drawn.numpy() / 2.0**32


def magnitudes(base: torch.Tensor, model: torch.Tensor) -> Array:
    """|d| rounded to the working type, which is what trims compare."""
    return (model.float() - base.float()).abs().to(base.dtype).double().numpy().ravel()


def top(size: Array, k: int, ties: str, drawn: Array) -> Array:
    """The k largest magnitudes; zeros do not count."""
    cut = np.sort(size)[::-1][k - 1]
    above, equal = size > cut, size == cut
    if cut == 0 or ties == "all":
        chosen = equal
    elif ties == "index":
        chosen = equal & (np.cumsum(equal) <= k - above.sum())
    else:
        chosen = equal & (drawn < math.floor(2**32 * int(k - above.sum()) / int(equal.sum())) / 2**32)
    return (above | chosen) & (size > 0)


def band(size: Array, k: int, dropped: int, ties: str, drawn: Array) -> Array:
    """k magnitudes below the ``dropped`` largest."""
    count = len(size)
    first = max(0, count - k - dropped)  # in ascending order
    if ties == "index":
        kept = np.zeros(count, dtype=bool)
        kept[np.argsort(size, kind="stable")[first : first + k]] = True
        return kept & (size > 0)
    ordered = np.sort(size)
    low, high = ordered[first], ordered[first + k - 1]
    kept = (size >= low) & (size <= high) & (size > 0)
    if ties == "all":
        return kept
    for bound in {low, high}:
        share = (ordered[first : first + k] == bound).sum() / (ordered == bound).sum()
        if bound > 0:
            kept &= (size != bound) | (drawn < math.floor(2**32 * share) / 2**32)
    return kept


def ranked_probability(size: Array, shape: tuple[int, ...], density: float, epsilon: float) -> Array:
    """From density - epsilon for the smallest of a row to density + epsilon for the largest."""
    rows = size.reshape(shape)
    smaller = (rows[:, None, :] < rows[:, :, None]).sum(2)
    equal = (rows[:, None, :] == rows[:, :, None]).sum(2)
    rank = smaller + (equal - 1) / 2
    return np.floor(2**32 * (density - epsilon + 2 * epsilon * rank / (shape[1] - 1))).ravel() / 2**32


def sparsified(method: str, d: Array, size: Array, model: int, options: dict[str, Any]) -> Array:
    """The task vector after its trim or draw, rescaled."""
    density, drawn, count = options["density"], uniform(model, len(d)), len(d)
    probability: Array | float = density
    if method == "task_arithmetic":
        return d
    if density == 1:
        kept = np.ones(count, dtype=bool)
    elif method == "ties":
        kept = top(size, max(1, int(density * count)), options["ties"], drawn)
    elif method.startswith("breadcrumbs"):
        kept = band(size, int(density * count), int(options["gamma"] * count), options["ties"], drawn)
    elif method.startswith("dare"):
        kept = drawn < math.floor(2**32 * density) / 2**32
    else:
        probability = ranked_probability(size, SHAPE, density, options["epsilon"])
        kept = drawn < probability
    masked = np.where(kept, d, 0.0)
    if options["rescale"] == "true":
        return masked * (np.abs(d).sum() / np.abs(masked).sum())
    return masked / probability if options["rescale"] == "density" else masked


def expected(
    method: str, base: torch.Tensor, models: list[torch.Tensor], options: dict[str, Any]
) -> tuple[Array, Array, Array]:
    """The merged values, how far float32 may be off them, and which elections are too narrow to tell."""
    weights = np.array(options["weight"])[:, None]
    b = base.double().numpy().ravel()
    x = np.stack([model.double().numpy().ravel() for model in models])
    if method == "linear":
        values, retained, origin, narrow = weights * x, np.ones_like(x, dtype=bool), 0 * b, b != b
    else:
        v = np.stack(
            [
                sparsified(method, row - b, magnitudes(base, model), i, options)
                for i, (row, model) in enumerate(zip(x, models, strict=True))
            ]
        )
        values, origin = weights * v, b
        vote = values.sum(0)
        retained = np.ones_like(values, dtype=bool)
        narrow = b != b
        if method in ELECTING:
            retained = (values != 0) & ((values > 0) == (vote >= 0))
            # Without rescaling a vote that cancels does so exactly, in float32 as in float64.
            exact = (vote == 0) & (options["rescale"] == "false")
            narrow = (np.abs(vote) < 1e-6 * np.abs(values).sum(0)) & ~exact
    divisor = np.ones_like(b)
    if options["normalize"]:
        divisor = (weights * retained).sum(0)
        divisor[divisor == 0] = 1
    factor = options.get("lambda", 1.0) / divisor
    merged = origin + factor * (values * retained).sum(0)
    # Every term is the result of a handful of float32 operations, and so is their sum.
    slop = (len(models) + 8) * 2.0**-24 * (np.abs(origin) + np.abs(factor) * np.abs(values).sum(0))
    return merged, slop, narrow


def agree(method: str, base: torch.Tensor, models: list[torch.Tensor], options: dict[str, Any]) -> None:
    exact, slop, narrow = expected(method, base, models, options)
    ignored = {"linear": ("density", "lambda"), "task_arithmetic": ()}.get(method, ())
    given = {key: value for key, value in options.items() if key not in ignored}
    if method == "linear":
        given.pop("rescale", None)
    merged = me.merge_tensors(
        None if method == "linear" else base, models, method, name=NAME, seed=SEED, **given
    )
    ours = merged.double().numpy().ravel()
    half_step = np.maximum(np.abs(exact) * 2.0 ** -SIGNIFICAND[base.dtype], 2.0**-25)
    wrong = (np.abs(ours - exact) > half_step + slop) & ~narrow
    assert narrow.mean() < 0.2
    assert not wrong.any(), f"{method} {options}: {wrong.sum()} of {wrong.size}, first at {wrong.argmax()}"
    if base.dtype != torch.float32:
        # Float32 has 13 or 16 bits more, so only values next to the middle of two can round the other way.
        rounded = torch.from_numpy(exact).to(base.dtype).double().numpy()
        assert (ours != rounded)[~narrow].mean() < 0.01


def make(kind: str, models: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    build = quantised_models if kind == "tied" else random_models
    base, tuned = build(math.prod(SHAPE), models, dtype)
    return base.view(SHAPE), [model.view(SHAPE) for model in tuned]


def methods_options(method: str) -> list[dict[str, Any]]:
    """The options of a method in combination: all, or where those are many, a draw from them."""
    choices: dict[str, tuple[Any, ...]] = {"normalize": (False, True)}
    if method != "linear":
        choices |= {"lambda": (1.0, -0.7), "rescale": ("false",)}
    if method not in ("linear", "task_arithmetic"):
        choices["density"] = (0.3, 0.71, 1.0)
        choices["rescale"] = ("false", "true", "density")
    if method == "ties" or method.startswith("breadcrumbs"):
        choices["ties"] = ("spread", "index", "all")
    if method.startswith("breadcrumbs"):
        choices["gamma"] = (0.0, 0.1)
    if method.startswith("della"):
        choices["epsilon"] = (0.0, 0.2)
    combinations = list(itertools.product(*choices.values()))
    drawn = random.Random(0).sample(combinations, min(len(combinations), 72))
    return [dict(zip(choices, values, strict=True)) for values in drawn]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("method", ("linear", *ELECTING, *NOT_ELECTING))
def test_float64_formula(method: str, dtype: torch.dtype) -> None:
    inputs = {(kind, n): make(kind, n, dtype) for kind in ("tied", "random") for n in (1, 2, 3, 5)}
    for number, options in enumerate(methods_options(method)):
        kind, models = ("tied", "random")[number % 2], (2, 3, 5, 1, 3)[number % 5]
        # These weights add up without rounding, so that votes which cancel do so exactly.
        weight = [(0.5, -0.25, 1.0, 0.75)[i % 4] for i in range(models)]
        base, tuned = inputs[kind, models]
        agree(method, base, tuned, {"density": 1.0, "rescale": "false", **options, "weight": weight})


@pytest.mark.parametrize("method", ("linear", *ELECTING, *NOT_ELECTING))
def test_defaults_are_those_of_the_method(method: str) -> None:
    base, models = make("random", 3, torch.float32)
    options: dict[str, Any] = {"weight": [0.6, 0.3, 0.9]}
    if method not in ("linear", "task_arithmetic"):
        options["density"] = 0.5
    default = me.merge_tensors(base, models, method, **options)
    spelt: dict[str, Any] = {"normalize": method in NORMALIZES}
    if method != "linear":
        spelt |= {"lambda": 1.0, "rescale": "true" if method in RESCALES else "false"}
    if method == "ties" or method.startswith("breadcrumbs"):
        spelt |= {"ties": "spread", "trim_scope": "tensor"}
    if method.startswith("breadcrumbs"):
        spelt["gamma"] = 0.01
    if method.startswith("della"):
        spelt["epsilon"] = 0.15
    assert torch.equal(default, me.merge_tensors(base, models, method, **options, **spelt))


@given(
    weights=st.lists(st.integers(-8, 8).filter(bool).map(lambda w: w / 4), min_size=1, max_size=6),
    density=st.floats(0.01, 1),
    scale=st.floats(-2, 2),
    normalize=st.booleans(),
    ties=st.sampled_from(("spread", "index", "all")),
    dtype=st.sampled_from(FLOATS),
)
@settings(max_examples=40, deadline=None)
def test_ties_with_any_numbers(
    weights: list[float], density: float, scale: float, normalize: bool, ties: str, dtype: torch.dtype
) -> None:
    base, models = random_models(500, len(weights), dtype)
    options = {
        "weight": weights,
        "density": density,
        "lambda": scale,
        "normalize": normalize,
        "ties": ties,
        "rescale": "false",
    }
    exact, _, narrow = expected("ties", base, models, options)
    # A sum of weights of both signs may nearly vanish, and then nothing bounds the mean.
    if not normalize or min(weights) > 0 or max(weights) < 0:
        agree("ties", base, models, options)
    else:
        merged = me.merge_tensors(base, models, "ties", name=NAME, seed=SEED, **options)
        unchanged = np.abs(exact - base.double().numpy()) == 0
        assert torch.equal(merged[unchanged & ~narrow], base[unchanged & ~narrow])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", (None, 1.0, 0.7, -3.0))
def test_passthrough(dtype: torch.dtype, scale: float | None) -> None:
    _, (model,) = make("random", 1, dtype)
    merged = me.merge_tensors(None, [model], "passthrough", **({} if scale is None else {"scale": scale}))
    exact = torch.tensor(scale or 1.0, dtype=torch.float32) * model.float()
    assert torch.equal(merged, exact.to(dtype))


def kept_by(method: str, base: torch.Tensor, model: torch.Tensor, **options: Any) -> torch.Tensor:
    """Which entries survive: those where the only model moves the base."""
    far = me.merge_tensors(base, [model], method, rescale="false", **options)
    return far != base


@pytest.mark.parametrize("density", (0.0, 0.001, 0.2, 0.5, 0.99))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_trims_keep_as_many_as_they_say(dtype: torch.dtype, density: float) -> None:
    count = 20_000
    base, (model,) = quantised_models(count, 1, dtype)
    size = torch.from_numpy(magnitudes(base, model))
    nonzero = int((size > 0).sum())
    k = max(1, int(density * count)) if density else 0
    counts = {
        ties: int(kept_by("ties", base, model, density=density, ties=ties).sum())
        for ties in ("spread", "index", "all")
    }
    assert counts["index"] == min(k, nonzero)
    if not k:
        assert counts == {"spread": 0, "index": 0, "all": 0}
        return
    cut = size.sort(descending=True).values[k - 1]
    if cut == 0:
        assert counts["spread"] == counts["all"] == nonzero
        return
    above, equal = int((size > cut).sum()), int((size == cut).sum())
    assert counts["all"] == above + equal
    share = (k - above) / equal
    assert abs(counts["spread"] - k) <= 5 * math.sqrt(equal * share * (1 - share))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_threshold_whose_ties_all_fit_keeps_exactly_k(dtype: torch.dtype) -> None:
    base, (model,) = quantised_models(10_000, 1, dtype)
    size = torch.from_numpy(magnitudes(base, model))
    for cut in size.unique()[1:]:
        k = int((size >= cut).sum())
        density = (k + 0.5) / 10_000
        for ties in ("spread", "index", "all"):
            kept = kept_by("ties", base, model, density=density, ties=ties)
            assert torch.equal(kept, size >= cut)


@pytest.mark.parametrize("ties", ("spread", "index", "all"))
def test_breadcrumbs_keep_as_many_as_they_say(ties: str) -> None:
    count = 20_000
    base, (model,) = random_models(count, 1, torch.float32)
    for density, gamma in itertools.product((0.1, 0.5, 0.9), (0.0, 0.05, 0.3)):
        kept = kept_by("breadcrumbs", base, model, density=density, gamma=gamma, ties=ties)
        size = torch.from_numpy(magnitudes(base, model))
        dropped = min(int(gamma * count), count - int(density * count))
        assert abs(int(kept.sum()) - int(density * count)) <= 2
        assert size[kept].max() <= size.sort(descending=True).values[dropped]


@pytest.mark.parametrize("density", (0.05, 0.3, 0.9))
def test_dare_keeps_a_binomial_share_and_the_expected_value(density: float) -> None:
    count = 200_000
    base = torch.zeros(count)
    model = torch.ones(count)
    merged = me.merge_tensors(base, [model], "dare_linear", density=density, rescale="density")
    kept = merged != 0
    deviation = math.sqrt(density * (1 - density) / count)
    assert abs(kept.double().mean() - density) < 5 * deviation
    assert abs(merged.double().mean() - 1) < 5 * deviation / density
    assert torch.equal(merged[kept], torch.full_like(merged[kept], 1 / density))


def test_della_keeps_larger_entries_more_often_in_a_straight_line() -> None:
    rows, length, density, epsilon = 6000, 21, 0.5, 0.3
    base = torch.zeros(rows, length)
    order = torch.rand(rows, length, generator=generator(4)).argsort(1)
    model = (order + 1).float()
    options = {"density": density, "epsilon": epsilon}
    kept = kept_by("della_linear", base, model, **options)
    for rank in range(length):
        probability = density - epsilon + 2 * epsilon * rank / (length - 1)
        share = kept[order == rank].double().mean()
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / rows)
    rescaled = me.merge_tensors(base, [model], "della_linear", rescale="density", **options)
    for rank in range(length):
        probability = density - epsilon + 2 * epsilon * rank / (length - 1)
        spread = (rank + 1) * math.sqrt((1 - probability) / probability / rows)
        assert abs(rescaled[order == rank].double().mean() - (rank + 1)) < 5 * spread


@pytest.mark.parametrize("method", ("ties", "breadcrumbs", "dare_linear", "della_linear"))
def test_rescale_true_keeps_the_l1_norm(method: str) -> None:
    base = torch.zeros(SHAPE)
    model = torch.randn(SHAPE, generator=generator(8))
    merged = me.merge_tensors(base, [model], method, density=0.4, normalize=False, rescale="true")
    assert 0 < (merged == 0).double().mean() < 1
    assert merged.double().abs().sum().item() == pytest.approx(model.double().abs().sum().item(), rel=1e-6)


def test_draws_differ_between_models_names_and_seeds() -> None:
    base, model = torch.zeros(5000), torch.ones(5000)

    def drawn(**options: Any) -> torch.Tensor:
        return me.merge_tensors(
            base, [model, 2 * model], "dare_linear", density=0.5, rescale="false", **options
        )

    first = drawn()
    assert torch.equal(first, drawn(name="tensor", seed=0))
    assert set(first.tolist()) == {0.0, 1.0, 2.0, 3.0}  # the models' draws are independent
    assert 0.2 < (first != drawn(seed=1)).double().mean() < 0.9
    assert 0.2 < (first != drawn(name="other")).double().mean() < 0.9
