"""The first screen of the README: its recipe merges, and its transcript is what the command prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from test_cli_snapshots import MAIN, SUBSTITUTIONS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The first block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def comparable(text: str) -> list[str]:
    """Without what differs from run to run (see test_cli_snapshots.py)."""
    for pattern, replacement in SUBSTITUTIONS:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text.strip().splitlines()


def test_the_recipe_merges_as_the_transcript_says(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(block("yaml"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    command, _, expected = block("console").partition("\n")
    arguments = command.removeprefix("$ merge-engine ").split()
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "110"},
    )
    assert done.returncode == 0, done.stderr
    assert comparable(done.stdout) == comparable(expected)


def test_the_recipe_fits_in_seven_lines() -> None:
    assert len(block("yaml").strip().splitlines()) <= 7
