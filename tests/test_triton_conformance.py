"""Triton's kernels give the reference's bytes, and a run with them those of the cpu backend: interpreted."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED

from merge_engine.backends import create_backend
from merge_engine.errors import BackendError

pytest.importorskip("triton")


def test_interpreted(pytestconfig: pytest.Config) -> None:
    """What was started when the tests were collected (interpreted.py)."""
    status, printed = pytestconfig.stash[INTERPRETED].wait()
    assert status == 0, printed
    assert " passed" in printed and "skipped" not in printed


def test_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"needs a GPU .* choose cpu"):
        create_backend("triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"triton is not installed: pip install 'merge_engine\[triton\]'"):
        create_backend("triton")
