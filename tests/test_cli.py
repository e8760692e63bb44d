"""The command line: its output, its exit codes, and one clear line for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_engine.cli.app import call as command_line


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe for TIES over three small checkpoints."""
    for seed, name in enumerate(("base", "a", "b")):
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(seed)
        tensors = {"model.layers.0.w": torch.randn(8, 16, dtype=torch.bfloat16), "norm": torch.ones(8)}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"merge_method: ties\nbase_model: {tmp_path}/base\nparameters: {{density: 0.5, weight: 1}}\n"
        f"models:\n- model: {tmp_path}/a\n- model: {tmp_path}/b\n"
    )
    return file


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the command line in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["merge-engine", *map(str, arguments)])
    return command_line()


def test_run_writes_a_model_and_says_what_it_did(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = recipe.parent / "out"
    assert call(monkeypatch, "run", recipe, out, "--threads", 1) == 0
    shown = capsys.readouterr()
    assert "lost to the" in shown.out and "merged" in shown.out and not shown.err
    assert set(load_file(out / "model.safetensors")) == {"model.layers.0.w", "norm"}
    assert {file.name for file in out.iterdir()} == {
        "README.md",
        "config.json",
        "merge_manifest.json",
        "mergekit_config.yml",
        "model.safetensors",
    }
    card = (out / "README.md").read_text()
    assert "merge_method: ties" in card and "XXH3" in card


def test_plan_reads_headers_and_writes_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = recipe.parent / "out"
    assert call(monkeypatch, "plan", recipe, out) == 0
    assert "2 with 136 elements" in capsys.readouterr().out
    assert not out.exists()


def test_doctor_names_the_backend_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "doctor") == 0
    shown = capsys.readouterr().out
    assert all(f"backend {name}" in shown for name in ("cpu", "cuda", "triton", "reference"))


@pytest.mark.parametrize(
    ("change", "arguments", "expected"),
    [
        (("ties", "tise"), (), 'there is no method "tise"; did you mean "ties"?'),
        (("density: 0.5", "densty: 0.5"), (), 'did you mean "density"?'),
        (("density: 0.5", "density: 1.5"), (), "must be a number with 0 <= density <= 1, not 1.5"),
        (("/a\n", "/nowhere\n"), (), "nowhere: there is no such folder or file"),
        ((", weight: 1", ""), (), "weight: required"),
        (("base_model", "dtype: float8_e5m2\nbase_model"), (), "must be one of"),
        (("", ""), ("--memory", "lots"), "memory: 'lots' is not a size"),
        (("", ""), ("--backend", "gpu"), 'there is no backend "gpu"'),
        (("", ""), ("--device", "gpu"), 'there is no device "gpu"'),
    ],
)
def test_bad_input_is_one_line_and_no_output(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    recipe.write_text(recipe.read_text().replace(*change) if change[0] else recipe.read_text())
    out = recipe.parent / "out"
    assert call(monkeypatch, "run", recipe, out, *arguments) == (2 if arguments else 1)
    shown = capsys.readouterr()
    assert expected in shown.err
    assert shown.err.count("\n") == 1 and shown.err.startswith("error: ")
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_recipe_without_permission_is_no_wrong_option(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.chmod(0)
    assert call(monkeypatch, "plan", recipe) == 1
    assert "cannot read the recipe: Permission denied" in capsys.readouterr().err


def test_a_wrong_number_is_named_without_words_of_a_library(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, "plan", recipe, "--threads", "x") == 2
    assert "'--threads': must be a valid integer; " in capsys.readouterr().err


def test_importing_needs_no_torch() -> None:
    code = "import sys, merge_engine; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_merge_of_safetensors_needs_no_torch(recipe: Path) -> None:
    code = (
        "import sys, merge_engine\n"
        f"merge_engine.run({str(recipe)!r}, {str(recipe.parent / 'out')!r})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_everything_public_is_there() -> None:
    code = (
        "import merge_engine as me\n"
        "assert all(getattr(me, name) is not None for name in me.__all__)\n"
        "assert set(me._HOME_OF) < set(me.__all__)\n"
        "assert not hasattr(me, 'misspelt')"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_plan_for_a_device_says_what_would_be(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also on a machine without it: then with a note that a run would fail there."""
    assert call(monkeypatch, "plan", recipe, "--device", "cpu") == 0
    on_cpu = capsys.readouterr().out
    assert call(monkeypatch, "plan", recipe, "--device", "cuda") == 0
    on_cuda = capsys.readouterr().out
    assert "backend               cpu" in on_cpu and "backend               cuda" in on_cuda
    assert "in place" in on_cpu and "in place" not in on_cuda
    assert ("a run would fail on this machine" in on_cuda) is not torch.cuda.is_available()
