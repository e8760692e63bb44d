"""Inputs with the same tensors, and models whose task vector is zero."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from families import save_model, state_dict
from test_fit_configs import plan

import merge_engine as me
from merge_engine.cli.app import call as command_line

LARGE = 1 << 20


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative, so that messages show them as they are."""
    monkeypatch.chdir(tmp_path)


def large(changed: int | None = None, place: int = LARGE // 2) -> dict[str, torch.Tensor]:
    """Tensors of 20 MiB. One element of one of them may be another."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(LARGE).half() for i in range(10)}
    if changed is not None:
        tensors[f"model.layers.{changed}.mlp.up_proj.weight"][place] = 1
    return tensors


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_linear", "breadcrumbs", "della"])
def test_a_model_that_is_the_base_adds_nothing(method: str) -> None:
    base, same = save_model(Path("base"), 0), save_model(Path("same"), 0)
    planned = plan(base, same, save_model(Path("tuned"), 1), method=method)
    line = "same: its tensors are those of base, byte for byte; it adds nothing"
    assert planned.warnings == (line,)
    assert me.run(planned).warnings == [line]


def test_the_command_line_prints_each_warning_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state_dict(0).items()}
    for name, tensors in (("base", zeros), ("same", zeros), ("signs", {n: -t for n, t in zeros.items()})):
        save_model(Path(name), 0, tensors=tensors)
    Path("recipe.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 1}\n"
        "models: [{model: same}, {model: signs}]\n"
    )
    monkeypatch.setattr(sys, "argv", ["merge-engine", "run", "recipe.yaml", "out"])
    assert command_line() == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")] == [
        "warning: same: its tensors are those of base, byte for byte; it adds nothing",
        "warning: signs: no entry of its task vector was kept, so it adds nothing; its weights are those of the base, "
        "or its density is too low",
    ]


def test_two_models_that_are_the_same_count_twice() -> None:
    models = [save_model(Path(name), seed) for name, seed in (("a", 1), ("b", 2), ("c", 1))]
    assert plan(save_model(Path("base"), 0), *models).warnings == (
        "c: its tensors are those of a, byte for byte; it counts twice",
    )


def test_values_that_are_equal_but_not_their_bytes() -> None:
    """A zero with another sign is no copy, but the task vector is zero all the same."""
    tensors = state_dict(0)
    tensors["model.norm.weight"][0] = 0.0
    base = save_model(Path("base"), 0, tensors=tensors)
    tensors["model.norm.weight"][0] = -0.0
    planned = plan(base, save_model(Path("tuned"), 0, tensors=tensors))
    assert planned.warnings == ()
    [line] = me.run(planned).warnings
    assert line.startswith("tuned: no entry of its task vector was kept")


def test_large_models_are_compared_in_places() -> None:
    base, same = (save_model(Path(name), 0, tensors=large()) for name in ("base", "same"))
    assert plan(base, same).warnings == (
        "same: its tensors are those of base in all 10 places that were compared; it adds nothing",
    )


@pytest.mark.parametrize("changed", range(10))
def test_a_change_in_any_tensor_is_found(changed: int) -> None:
    base = save_model(Path("base"), 0, tensors=large())
    assert plan(base, save_model(Path("tuned"), 0, tensors=large(changed))).warnings == ()


def test_a_link_to_the_base_is_the_base(tmp_path: Path) -> None:
    base = save_model(Path("base"), 0, tensors=large(3, 5))
    Path("linked").mkdir()
    for file in base.iterdir():
        (Path("linked") / file.name).symlink_to(file.resolve())
    planned = plan(base, save_model(Path("tuned"), 1, tensors=large(1)), Path("linked"))
    assert planned.warnings == () and planned.models.keys() == {0}
