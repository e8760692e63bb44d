"""PEFT as an oracle: an adapter put into a model is what ``merge_and_unload`` makes, but for the order of sums.

PEFT runs in an environment of its own (tests/oracle/README.md), once for everything here.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import merge_engine as me

pytestmark = pytest.mark.oracle

SCRIPT = Path(__file__).parent / "oracle" / "peft_oracle.py"
CASES = ("plain", "patterns", "embeddings", "head", "biases", "tied", "transposed")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = os.environ.get("MERGE_ENGINE_ORACLE")
    if not python:
        pytest.skip("MERGE_ENGINE_ORACLE is not set, see tests/oracle/README.md")
    folder = tmp_path_factory.mktemp("peft")
    done = subprocess.run([python, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {case.name for case in folder.iterdir()} == set(CASES)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_in_its_model(cases: Path, case: str) -> None:
    folder = cases / case
    model = f"{folder / 'base'}+{folder / 'adapter'}"
    found = me.run({"merge_method": "passthrough", "models": [{"model": model}]}, device="cpu").tensors
    base, expected = (load_file(folder / name / "model.safetensors") for name in ("base", "merged"))
    assert found is not None and found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[name], base[name]) is torch.equal(tensor, base[name]), name
    assert any(not torch.equal(tensor, base[name]) for name, tensor in expected.items())
