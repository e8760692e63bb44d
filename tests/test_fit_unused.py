"""Settings of a recipe that change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_model
from test_attacks import within

import merge_engine as me


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base and two models in the current folder."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        save_model(Path(name), i)


def warned(parameters: Any, *own: Any, listed: tuple[str, ...] = ("a", "b")) -> tuple[str, ...]:
    """The warnings for a TIES recipe with these parameters, and those of its models."""
    entries = [
        {"model": name} | ({"parameters": own[i]} if i < len(own) else {}) for i, name in enumerate(listed)
    ]
    return me.plan(
        {"merge_method": "ties", "base_model": "base", "models": entries, "parameters": parameters}
    ).warnings


def test_settings_that_are_used_are_silent() -> None:
    assert not warned({"weight": 1.0, "density": [{"filter": "mlp", "value": [0.2, 0.5]}, {"value": 0.3}]})
    assert not warned({"weight": 1.0}, {"density": 0.5}, {"density": [0.1, 0.9]})
    assert not warned({"weight": 1.0, "density": [{"filter": "*", "value": 0.3}]}, {"density": 0.5})


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("mpl", '; did you mean "mlp"?'),
        ("self_atn", '; did you mean "self_attn"?'),
        ("mlp.up_prj", '; did you mean "mlp.up_proj"?'),
        ("experts", ""),
    ],
)
def test_a_filter_that_matches_no_tensor(name: str, near: str) -> None:
    line = f'density[0].value: the filter "{name}" matches no tensor{near}'
    given = [{"filter": name, "value": 0.2}, {"value": 0.5}]
    assert warned({"weight": 1.0, "density": given}) == (f"parameters.{line}",)
    assert warned({"weight": 1.0}, {}, {"density": given}) == (f"models[1].parameters.{line}",)


def test_an_entry_behind_one_for_all_tensors() -> None:
    given = [{"value": 0.5}, {"filter": "mlp", "value": 0.2}]
    assert warned({"weight": 1.0, "density": given}) == (
        "parameters.density[1].value: never used, because an entry before it is for all tensors; move it up",
    )


def test_many_unused_entries_are_few_lines_and_take_little_time() -> None:
    given = [*({"filter": f"x{i}", "value": 0.1} for i in range(20_000)), {"value": 0.5}]
    names = {"exclude": [f"x{i}" for i in range(2000)], "rename": {f"y{i}": "" for i in range(2000)}}
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "tensors": names}
    with within(30):
        lines = me.plan({**recipe, "parameters": {"weight": given}}).warnings
    assert len(lines) == 12
    assert "parameters.weight: 19,995 more entries change nothing" in lines
    assert "tensors: 3,995 more entries fit no tensor's name" in lines


def test_a_gradient_without_layers() -> None:
    for i, name in enumerate(("base", "a", "b")):
        save_model(Path("flat") / name, i, tensors={"embed.weight": torch.randn(4, 4) + i})
    recipe = {
        "merge_method": "ties",
        "base_model": "flat/base",
        "models": [{"model": "flat/a"}, {"model": "flat/b"}],
        "parameters": {"weight": 1.0, "density": [0.2, 0.8]},
    }
    assert me.plan(recipe).warnings == (
        "parameters.density: a gradient, but no tensor is in a layer; all take its first value",
    )


def test_parameters_of_the_base() -> None:
    assert warned({"weight": 1.0}, {"weight": 0.3}, listed=("base", "a", "b")) == (
        "models[0].parameters: not used, because base is the base",
    )
    assert not warned({"weight": 1.0}, {}, listed=("base", "a", "b"))


def test_parameters_that_every_model_has_itself() -> None:
    assert warned({"weight": 1.0, "density": 0.1}, {"density": 0.2}, {"density": 0.3}) == (
        "parameters.density: not used, because every model has its own",
    )
    own = {"density": [{"filter": "mlp", "value": 0.2}]}
    assert not warned({"weight": 1.0, "density": 0.1}, own, own)
