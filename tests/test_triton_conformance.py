"""Triton's kernels give the reference's bytes, and a run with them those of the cpu backend, in Triton's interpreter.

The first import of the kernels decides whether they are interpreted, so this is a process of its own.
"""

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


@pytest.mark.parametrize("file", ("test_conformance.py", "triton_kernels.py", "triton_streaming.py"))
def test_interpreted(file: str) -> None:
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "pytest", "-x", TESTS / file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MERGE_ENGINE_TEST_BACKENDS": "triton"}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"needs a GPU .* choose cpu"):
        create_backend("triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"triton is not installed: pip install 'merge_engine\[triton\]'"):
        create_backend("triton")
