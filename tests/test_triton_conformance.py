"""Triton's kernels give the reference's bytes, and a run with them those of the cpu backend: interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merge_engine.backends import create_backend
from merge_engine.errors import BackendError

pytest.importorskip("triton")


TESTS = Path(__file__).parent
FILES = ("test_conformance.py", "triton_kernels.py", "triton_streaming.py")


def test_interpreted() -> None:
    """In a process of its own: the first import of the kernels decides whether they are interpreted."""
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "no:xdist", *(TESTS / file for file in FILES)],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "MERGE_ENGINE_TEST_BACKENDS": "triton"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"needs a GPU .* choose cpu"):
        create_backend("triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"triton is not installed: pip install 'merge_engine\[triton\]'"):
        create_backend("triton")
