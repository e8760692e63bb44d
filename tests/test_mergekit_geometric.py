"""`arithmetic: mergekit` comes within a few units in the last place of mergekit 0.1.5, and slerp mostly at its bytes.

The geometric methods of mergekit depend on the order in which torch sums whole tensors, and on its libm. mergekit runs
in an environment of its own (tests/oracle/README.md), once for everything here.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial import generator
from safetensors.torch import load_file, save_file

import merge_engine as me

pytestmark = pytest.mark.oracle

SCRIPT = Path(__file__).parent / "oracle" / "mergekit_oracle.py"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((65,), (33, 70), (4, 25, 7))
LINED = {"nuslerp_flatten": False}
CASES: dict[str, tuple[bool, int, dict[str, Any], float]] = {
    # With a base, number of models, options, units in the last place of the largest input
    "slerp 0.3": (True, 1, {"t": 0.3}, 3),
    "slerp 1.5": (True, 1, {"t": 1.5}, 3),
    "nuslerp flat": (False, 2, {"weight": [0.3, 0.9]}, 3),
    "nuslerp flat on a base": (True, 2, {"weight": [0.3, 0.9]}, 4),
    # Lines of a few elements may be nearly opposite, which makes coefficients large
    "nuslerp lines": (False, 2, {"weight": [0.5, 0.6], **LINED}, 16),
    "nuslerp columns": (False, 2, {"weight": [0.5, 0.6], **LINED, "nuslerp_row_wise": True}, 16),
    "nuslerp columns on a base": (
        True,
        2,
        {"weight": [0.5, 0.6], **LINED, "nuslerp_row_wise": True},
        24,
    ),
    "multislerp": (False, 3, {"weight": [0.3, 0.9, 0.4]}, 4),
    "multislerp on a base": (True, 3, {"weight": [0.3, 0.9, 0.4], "normalize_weights": False}, 8),
    # Angles between fine-tunes follow from cosines that mergekit rounds to 16 bits
    "karcher": (False, 3, {}, 24),
    "karcher of two": (False, 2, {"max_iter": 3}, 4),
    "model_stock": (True, 3, {}, 4),
    "model_stock by filter": (True, 2, {"filter_wise": True}, 4),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, near: bool) -> list[torch.Tensor]:
    """A base and three models: fine-tunes, or models that have nothing in common."""
    g = generator(len(shape), 13)
    base, shared = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    tuned = [torch.randn(shape, generator=g) for _ in range(3)]
    if near:
        tuned = [base + 0.2 * shared + 0.1 * own for own in tuned]
    return [tensor.to(dtype) for tensor in (base, *tuned)]


MERGES = list(itertools.product(CASES, SHAPES, DTYPES, (False, True)))


def title(case: str, shape: tuple[int, ...], dtype: torch.dtype, near: bool) -> str:
    return f"{case} {shape} {dtype} {near}"


def names(shape: tuple[int, ...], dtype: torch.dtype, near: bool) -> list[str]:
    return [f"{shape} {dtype} {near} {i}" for i in range(4)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What mergekit makes of every case."""
    python = os.environ.get("MERGE_ENGINE_ORACLE")
    if not python:
        pytest.skip("MERGE_ENGINE_ORACLE is not set: see tests/oracle/README.md")
    folder = tmp_path_factory.mktemp("oracle")
    tensors, cases = {}, []
    for case, *data in MERGES:
        has_base, models, options, _ = CASES[case]
        named = names(*data)
        tensors |= dict(zip(named, inputs(*data), strict=True))
        cases.append(
            {
                "id": title(case, *data),
                "method": case.split()[0],
                "base": has_base,
                "tensors": named[not has_base : 1 + models],
                "parameters": options,
            }
        )
    save_file(tensors, folder / "inputs.safetensors")
    job = {
        "inputs": str(folder / "inputs.safetensors"),
        "output": str(folder / "output.safetensors"),
        "cases": cases,
        "recipes": [],
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [python, str(SCRIPT), str(folder / "job.json")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(folder / "output.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_within_a_few_units(theirs: dict[str, torch.Tensor], case: str) -> None:
    has_base, models, options, units = CASES[case]
    for _, *data in (merge for merge in MERGES if merge[0] == case):
        given, dtype = inputs(*data), data[1]
        base = given[0] if has_base else None
        ours = me.merge_tensors(
            base, given[1 : 1 + models], case.split()[0], arithmetic="mergekit", **options
        )
        found = theirs[title(case, *data)]
        assert ours.dtype == found.dtype == dtype and ours.shape == found.shape
        size = torch.stack([tensor.float().abs() for tensor in (*given[: 1 + models], found)]).amax(0)
        error = (ours.float() - found.float()).abs() / (torch.finfo(dtype).eps * size)
        assert float(error.max()) <= units, (data, float(error.max()))
        near = data[2]
        if dtype != torch.float32 and (case.startswith("slerp") or ("flat" in case and not near)):
            assert (ours != found).float().mean() < 0.01
        if dtype == torch.float32 and not case.startswith("nuslerp"):
            assert float(error.max()) <= min(units, 8)
