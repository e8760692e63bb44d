"""Methods of others: registered from Python, or announced by an installed package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import merge_engine as me
from merge_engine.methods import find_method

PACKAGE = """
from dataclasses import dataclass
from typing import Literal

import merge_engine as me


@dataclass(frozen=True)
class Settings:
    weight: float = me.parameter(minimum=0)


@dataclass(frozen=True)
class Common:
    sign: Literal["plus", "minus"] = me.parameter("plus")


class Shift(me.Method):
    name = "shift"
    Settings = Settings
    Common = Common

    def solve(self, task, answers):
        sign = 1.0 if task.common.sign == "plus" else -1.0
        return me.Consensus(tuple(me.Entry(me.Dense(), weight=s.weight) for s in task.settings), scale=sign)
"""


@pytest.fixture
def unchanged() -> Iterator[None]:
    """The registry as it was."""
    before = dict(me.METHODS)
    yield
    me.METHODS.clear()
    me.METHODS.update(before)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchanged: None) -> None:
    """A package that announces a method."""
    (tmp_path / "shifts.py").write_text(PACKAGE)
    about = tmp_path / "shifts-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: shifts\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[merge_engine.methods]\nshift = shifts:Shift\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shifts", raising=False)


def test_a_package_announces_a_method(installed: None) -> None:
    base, tuned = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    assert "shift" not in me.METHODS  # nothing is loaded before it is asked for
    merged = me.merge_tensors(base, [tuned], "shift", weight=0.5, sign="minus")
    assert merged.tolist() == [-0.5, 1.0, -0.25]
    assert [(p.name, p.scope, p.required, p.choices) for p in find_method("shift").parameters] == [
        ("weight", "model", True, ()),
        ("sign", "tensor", False, ("plus", "minus")),
    ]


def test_what_a_recipe_says_is_checked_against_the_declaration(installed: None) -> None:
    base = torch.zeros(3)
    for options, said in (
        ({"weight": -1}, "must be a number with 0 <= weight, not -1"),
        ({"sign": "up"}, "must be one of plus, minus"),
        ({"wieght": 1}, 'did you mean "weight"'),
    ):
        with pytest.raises(me.RecipeError, match=said):
            me.merge_tensors(base, [base], "shift", **options)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(me.RecipeError, match='did you mean "ties"'):
        find_method("tis")


def test_a_name_belongs_to_one_method(unchanged: None) -> None:
    class Other(me.Method):
        name = "ties"

        def solve(self, task, answers):
            raise NotImplementedError

    with pytest.raises(ValueError, match='there is a method "ties" already'):
        me.register(Other)


def test_a_parameter_of_another_type_is_refused_when_it_is_registered(unchanged: None) -> None:
    @dataclass(frozen=True)
    class Odd:
        shape: list = me.parameter()  # noqa: RUF009

    class Method(me.Method):
        name = "odd"
        Settings = Odd

        def solve(self, task, answers):
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"Odd\.shape: a parameter is a bool, int, float, str or a Literal"):
        me.register(Method)
    assert "odd" not in me.METHODS
