"""Every attack file gets a clear line, in bounded time, and leaves nothing behind (tests/attacks/README.md)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from conftest import SaveCheckpoint, Snapshot
from lora import factors, save_adapter

from merge_engine.cli.app import call as command_line

ATTACKS = Path(__file__).with_name("attacks")
SECONDS = 20
LONGEST, MOST = 1200, 110  # letters of a line, lines

RECIPE = "merge_method: linear\nmodels:\n- model: good\n- model: other\nparameters: {weight: 0.5}\n"
ADAPTED = "merge_method: passthrough\nmodels:\n- model: matrix+lora\n"
TOKENIZER = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}'
COMMANDS = {
    "manifests": (
        ("verify", "earlier"),
        ("report", "earlier"),
        ("run", "recipe.yaml", "earlier", "--overwrite"),
    ),
    "adapters": (("run", "adapted.yaml", "out"),),
    "factors": (("run", "adapted.yaml", "out"),),
}
PLACES = {
    "adapters": "lora/adapter_config.json",
    "factors": "lora/adapter_model.safetensors",
    "headers": "other/model.safetensors",
    "indexes": "other/model.safetensors.index.json",
    "configs": "other/config.json",
    "tokenizers": "other/tokenizer.json",
    "pickles": "other/pytorch_model.bin",
    "recipes": "recipe.yaml",
    "manifests": "earlier/merge_manifest.json",
}


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails if the block takes longer."""

    def fail(_: int, __: FrameType | None) -> None:
        raise AssertionError(f"still not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def scene(save_checkpoint: SaveCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, two models and an earlier output; all that an attack may not touch is in it, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    for number, name in enumerate(("good", "other")):
        save_checkpoint(name, {"w": torch.arange(4.0).bfloat16() + number})
        (tmp_path / name / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "adapted.yaml").write_text(ADAPTED)
    save_checkpoint("matrix", {"m.weight": torch.arange(12.0).view(4, 3)})
    save_adapter(tmp_path / "lora", factors({"m": (4, 3)}, rank=2), r=2)
    (tmp_path / "victim.txt").write_text("precious")
    (tmp_path / "secret.safetensors").write_bytes((tmp_path / "good" / "model.safetensors").read_bytes())
    monkeypatch.setattr(sys, "argv", ["merge-engine", "run", "recipe.yaml", "earlier"])
    assert command_line() == 0
    return tmp_path


def prepare(scene: Path, attack: Path, into: Path) -> None:
    """Copies the scene, with the attack in its place."""
    kind = attack.parent.name
    shutil.copytree(scene, into)
    os.chdir(into)
    weights = Path("other/model.safetensors")
    if kind == "indexes":
        weights.rename("other/part.safetensors")
    elif kind == "pickles":
        weights.unlink()
    shutil.copy(attack, PLACES[kind])


def transcript(attack: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The exit codes and the lines on stderr of all commands that meet the attack."""
    found = []
    for command in COMMANDS.get(attack.parent.name, (("run", "recipe.yaml", "out"),)):
        monkeypatch.setattr(sys, "argv", ["merge-engine", *command])
        capsys.readouterr()
        with within(SECONDS):
            code = command_line()
        shown = capsys.readouterr()
        check(code, shown.out, shown.err, command)
        lines = [f"    {line}" for line in shown.err.splitlines()]
        found += [f"  {command[0]}: exit code {code}", *lines]
    return "\n".join([f"{attack.name}", *found]) + "\n"


def check(code: int, out: str, err: str, command: tuple[str, ...]) -> None:
    """What holds whatever the input is."""
    assert code in (0, 1)
    assert (code == 0) is not any(line.startswith("error: ") for line in err.split("\n"))
    lines = err.split("\n")[:-1]
    assert all(line.startswith(("error: ", "warning: ")) for line in lines), lines
    assert len(lines) <= MOST
    for line in (*lines, *out.split("\n")):
        assert line.isprintable(), ascii(line)
        assert len(line) <= LONGEST
    if code and command[0] == "run" and command[2:] == ("out",):
        assert not Path("out").exists()
    if not code and command[0] == "run":
        assert Path(command[2], "model.safetensors").exists()
    assert not list(Path().rglob("pwned"))
    assert Path("victim.txt").read_text() == "precious"


@pytest.mark.parametrize("kind", PLACES)
def test_lines(
    kind: str,
    scene: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    assert_snapshot: Snapshot,
) -> None:
    found = []
    for attack in sorted((ATTACKS / kind).iterdir()):
        place = tmp_path_factory.mktemp("attack") / "here"
        prepare(scene, attack, place)
        found.append(transcript(attack, capsys, monkeypatch).replace(str(place), "HERE"))
    assert_snapshot(f"attacks/{kind}.txt", "\n".join(found))


def test_every_file_has_a_place() -> None:
    assert {folder.name for folder in ATTACKS.iterdir() if folder.is_dir()} == set(PLACES)
