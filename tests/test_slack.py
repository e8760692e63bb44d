"""The slacks relax TIES as documented, count the entries that they save, and change nothing at 0."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adversarial import generator, quantised_models
from conftest import SaveCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_engine as me

ELECTING = ("ties", "breadcrumbs_ties", "dare_ties", "della")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
COUNT = 6000


def random_models(count: int, models: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base of zeros, so that models are their own task vectors."""
    g = generator(count, models, 21)
    return torch.zeros(count), [torch.randn(count, generator=g) for _ in range(models)]


Runner = Callable[..., tuple[torch.Tensor, list[me.ModelCounts]]]


@pytest.fixture
def run(save_checkpoint: SaveCheckpoint) -> Runner:
    """Merges a tensor; gives the result and the counts of each model. Lists are options of each model."""
    unused = map(str, itertools.count())

    def merge(
        base: torch.Tensor, models: list[torch.Tensor], method: str = "ties", **options: Any
    ) -> tuple[torch.Tensor, list[me.ModelCounts]]:
        common = {key: value for key, value in options.items() if not isinstance(value, list)}
        entries = [
            {
                "model": str(save_checkpoint(next(unused), {"x": model})),
                "parameters": {key: value[i] for key, value in options.items() if isinstance(value, list)},
            }
            for i, model in enumerate(models)
        ]
        result = me.run(
            {
                "merge_method": method,
                "base_model": str(save_checkpoint(next(unused), {"x": base})),
                "models": entries,
                "parameters": {"weight": 1.0, **common},
            }
        )
        assert result.tensors is not None
        (counted,) = result.per_tensor
        assert result.counts == counted.counts and list(counted.counts) == list(range(len(models)))
        return result.tensors["x"], list(counted.counts.values())

    return merge


def key_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("method", ELECTING)
def test_no_slack_is_the_plain_method(method: str, dtype: torch.dtype) -> None:
    base, models = quantised_models(40 * 50, 3, dtype)
    base, models = base.view(40, 50), [model.view(40, 50) for model in models]
    options: dict[str, Any] = {"density": 0.4, "weight": [0.6, 0.5, -0.3]}
    plain = me.merge_tensors(base, models, method, **options)
    for mode in ("elect", "retain"):
        options |= {"sign_slack": [0.0, 0.0, 0.0], "sign_slack_mode": mode}
        for trim in ({"trim_slack": 0.0},) if method in ELECTING[:2] else ({},):
            relaxed = me.merge_tensors(base, models, method, **options, **trim)
            assert torch.equal(key_bits(relaxed), key_bits(plain))


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_retaining_everything_is_the_mean_of_trimmed_task_vectors(
    dtype: torch.dtype, normalize: bool
) -> None:
    base, models = quantised_models(COUNT, 4, dtype)
    weights = [0.5, 1.0, 0.25, 2.0]
    merged = me.merge_tensors(
        base,
        models,
        "ties",
        density=[0.3, 0.5, 0.9, 1.0],
        weight=weights,
        ties="all",
        normalize=normalize,
        sign_slack=1.0,
        sign_slack_mode="retain",
    )
    total, divisor = torch.zeros(COUNT, dtype=torch.float64), torch.zeros(COUNT, dtype=torch.float64)
    for model, weight, density in zip(models, weights, (0.3, 0.5, 0.9, 1.0), strict=True):
        d = model.double() - base.double()
        size = d.abs().to(dtype)
        d[size < size.sort(descending=True).values[int(density * COUNT) - 1]] = 0
        total += weight * d
        divisor += weight * (d != 0)
    mean = total / divisor.where(divisor != 0, torch.ones(())) if normalize else total
    exact = base.double() + mean
    step = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}[dtype]
    assert ((merged.double() - exact).abs() <= exact.abs() * step + 2.0**-26).all()


@pytest.mark.parametrize("slack", (0.1, 0.5, 1.0, 3.0))
def test_for_two_models_both_modes_save_the_same_entries(run: Runner, slack: float) -> None:
    """|v_B| < (1 + s) * |v_A| and |v_B| - |v_A| < r * (|v_A| + |v_B|) are the same when r = s / (2 + s)."""
    base, models = random_models(COUNT, 2)
    plain, before = run(base, models)
    elected, by_vote = run(base, models, sign_slack=[slack, 0.0])
    retained, by_margin = run(base, models, sign_slack=[slack / (2 + slack), 0.0], sign_slack_mode="retain")
    saved = elected != plain
    assert torch.equal(saved, retained != plain)
    assert 0 < saved.sum() == by_vote[0].saved_by_sign == by_margin[0].saved_by_sign
    # Winning the vote takes the entry from the other model; being retained shares it.
    assert torch.equal(elected[saved], models[0][saved])
    assert torch.equal(retained[saved], ((models[0] + models[1]) / 2)[saved])
    assert by_vote[1].lost == before[1].lost + by_vote[0].saved_by_sign
    assert by_margin[1] == before[1]


def test_at_the_boundary_a_margin_must_be_narrower_than_the_slack(run: Runner) -> None:
    """v = (1, -3): the margin |S| is 2 of 4, so 0.5 does not save the loser and the next number does."""
    base = torch.zeros(4)
    models = [torch.tensor([1.0, -1.0, 3.0, 0.0]), torch.tensor([-3.0, 3.0, -1.0, 2.0])]
    for slack, saved in ((0.5, 0), (0.5 + 2.0**-20, 2)):
        merged, counts = run(base, models, sign_slack=[slack, 0.0], sign_slack_mode="retain")
        assert counts[0].saved_by_sign == saved
        assert merged.tolist() == ([-1.0, 1.0, 3.0, 2.0] if saved else [-3.0, 3.0, 3.0, 2.0])
    # A vote with slack 2 makes it 3 to 3, and a sum of 0 elects +.
    merged, counts = run(base, models, sign_slack=[2.0, 0.0])
    assert merged.tolist() == [1.0, 3.0, 3.0, 2.0] and counts[0].saved_by_sign == 1


def test_an_elect_slack_changes_the_vote_and_not_the_mean(run: Runner) -> None:
    base, models = random_models(COUNT, 3)
    weights, slacks = [0.5, 1.0, 0.75], [0.0, 1.5, 0.25]
    merged, counts = run(base, models, weight=weights, sign_slack=slacks)
    v = torch.stack([w * model.double() for w, model in zip(weights, models, strict=True)])
    vote = (v * (1 + torch.tensor(slacks).double())[:, None]).sum(0)
    retained = (v > 0) == (vote >= 0)
    divisor = (torch.tensor(weights).double()[:, None] * retained).sum(0)
    exact = (v * retained).sum(0) / divisor.where(divisor != 0, torch.ones(()))
    assert torch.allclose(merged.double(), exact, rtol=1e-6, atol=1e-7)
    plain = (v > 0) == (v.sum(0) >= 0)
    for i in range(3):
        assert counts[i].retained == int(retained[i].sum())
        assert counts[i].saved_by_sign == int((retained[i] & ~plain[i]).sum())


def test_a_model_with_overwhelming_slack_loses_nothing(run: Runner) -> None:
    base, models = random_models(COUNT, 3)
    _, before = run(base, models, density=0.5)
    _, after = run(base, models, density=0.5, sign_slack=[0.0, 1e6, 0.0])
    assert before[1].lost > 0 and before[1].saved_by_sign == 0
    assert after[1].lost == 0 and after[1].saved_by_sign == before[1].lost
    assert [c.kept for c in after] == [c.kept for c in before]


@pytest.mark.parametrize("kind", ("tied", "random"))
@pytest.mark.parametrize("ties", ("index", "all", "spread"))
def test_counts_add_up(run: Runner, ties: str, kind: str) -> None:
    base, models = quantised_models(COUNT, 3, torch.bfloat16) if kind == "tied" else random_models(COUNT, 3)
    merged, counts = run(base, models, density=[0.1, 0.3, 1.0], ties=ties)
    nonzero = [int((model != base).sum()) for model in models]
    for model, count, density in zip(range(3), counts, (0.1, 0.3, 1.0), strict=True):
        k = min(int(density * COUNT), nonzero[model])
        assert count.saved_by_trim == count.saved_by_sign == 0
        assert count.retained == count.kept - count.lost and 0 <= count.lost <= count.kept
        if ties == "index" or kind == "random" or density == 1:
            assert count.kept == k
        else:
            assert abs(count.kept - k) < COUNT / 10
    assert (merged != base).sum() <= sum(count.retained for count in counts)


@pytest.mark.parametrize("ties", ("index", "all", "spread"))
@pytest.mark.parametrize("kind", ("tied", "random"))
def test_trim_slack_keeps_what_is_near_the_threshold(run: Runner, ties: str, kind: str) -> None:
    base, models = quantised_models(COUNT, 1, torch.bfloat16) if kind == "tied" else random_models(COUNT, 1)
    size = (models[0].float() - base.float()).abs().to(base.dtype)
    k = int(0.2 * COUNT)
    cut = size.sort(descending=True).values[k - 1]
    _, (plain,) = run(base, models, density=0.2, ties=ties)
    before = 0
    for slack in (1e-9, 0.1, 0.3, 0.5, 0.75, 0.999):
        merged, (counts,) = run(base, models, density=0.2, ties=ties, trim_slack=slack)
        relaxed = (torch.tensor(1 - slack, dtype=torch.float32) * cut.float()).to(base.dtype)
        expected = (size >= relaxed) & (size > 0)
        assert torch.equal(merged != base, expected)
        assert counts.kept == int(expected.sum()) >= before
        assert counts.saved_by_trim == counts.kept - (plain.kept if ties == "all" else k)
        before = counts.kept
    assert before > k


def test_trim_slack_of_breadcrumbs_lowers_only_the_lower_cut(run: Runner) -> None:
    base, models = random_models(COUNT, 1)
    options = {"method": "breadcrumbs_ties", "density": 0.3, "gamma": 0.1}
    narrow, (plain,) = run(base, models, **options)
    wide, (relaxed,) = run(base, models, trim_slack=0.4, **options)
    size = models[0].abs()
    assert plain.kept == int(0.3 * COUNT) and relaxed.saved_by_trim == relaxed.kept - plain.kept > 0
    assert size[wide != 0].max() == size[narrow != 0].max() < size.max()
    assert size[wide != 0].min() < size[narrow != 0].min()
    assert size[wide != 0].min() >= 0.6 * size[narrow != 0].min()


@given(
    slacks=st.lists(st.floats(0, 1), min_size=2, max_size=4, unique=True).map(sorted),
    seed=st.integers(0, 1000),
    models=st.integers(2, 5),
)
@settings(max_examples=40, deadline=None)
def test_more_retain_slack_never_moves_an_entry_away_from_the_mean(
    slacks: list[float], seed: int, models: int
) -> None:
    """One dial from TIES to averaging: an entry is TIES's until its margin is narrow, and the mean from then on."""
    base, tuned = quantised_models(700, models, torch.float32, seed=seed)
    options: dict[str, Any] = {"density": 0.6, "ties": "index", "sign_slack_mode": "retain"}
    plain = me.merge_tensors(base, tuned, "ties", sign_slack=0.0, **options)
    mean = me.merge_tensors(base, tuned, "ties", sign_slack=1.0, **options)
    reached = torch.zeros(700, dtype=torch.bool)
    for slack in slacks:
        merged = me.merge_tensors(base, tuned, "ties", sign_slack=slack, **options)
        averaged = merged == mean
        assert (averaged | (merged == plain)).all()
        assert (averaged | ~reached).all()
        reached = averaged


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"sign_slack": -0.1}, "sign_slack"),
        ({"sign_slack": 1.5, "sign_slack_mode": "retain"}, "sign_slack must not exceed 1"),
        ({"trim_slack": 1.0}, "trim_slack"),
        ({"trim_slack": -0.5}, "trim_slack"),
        ({"sign_slack_mode": "keep"}, "sign_slack_mode"),
    ),
)
def test_slacks_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    base, models = random_models(10, 2)
    with pytest.raises(me.MergeError, match=message):
        me.merge_tensors(base, models, "ties", **options)
