"""Every shape of recipe that people publish is merged, with mergekit and without. See tests/oracle/recipe_matrix.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

import merge_engine as me

sys.path.append(str(Path(__file__).parent / "oracle"))
from matrix.in_ours import merge
from matrix.models import build
from matrix.shapes import load_shapes

SHAPES = load_shapes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the paths of the recipes begin."""
    folder = tmp_path_factory.mktemp("shapes")
    build(folder / "models", torch.bfloat16)
    return folder


def test_each_shape_is_there_once() -> None:
    assert len(SHAPES) == 115
    assert len({shape.recipe for shape in SHAPES.values()}) == len(SHAPES)
    documents = [document for shape in SHAPES.values() for document in yaml.safe_load_all(shape.recipe)]
    ours = {
        name for name, method in me.METHODS.items() if type(method).__module__.startswith("merge_engine.")
    }
    assert {document["merge_method"] for document in documents} == ours


def test_each_shape_is_merged_by_the_command_line(folder: Path) -> None:
    """Config, files and weights are complete; the values are compared with mergekit's where it is installed."""
    jobs = []
    for number, shape in enumerate(SHAPES.values()):
        config = folder / f"{number}.yaml"
        config.write_text(shape.text("bf16"))
        output = str(folder / f"out{number}")
        paths = {"folder": str(folder), "config": str(config), "output": output}
        jobs.append({**paths, "several": shape.several, "lenient": shape.lenient})
    errors = merge(jobs)
    titles = {job["output"]: title for job, title in zip(jobs, SHAPES, strict=True)}
    assert {titles[output]: error for output, error in errors.items()} == {}
    for job in jobs:
        found = me.verify(job["output"])
        assert found.complete and found.tensors > 0, titles[job["output"]]


@pytest.mark.parametrize("title", SHAPES)
def test_what_is_compared_with_mergekit_is_the_same_recipe(title: str) -> None:
    shape = SHAPES[title]
    for precision in ("bf16", "fp32"):
        plain = list(yaml.safe_load_all(shape.text(precision)))
        rounding = list(yaml.safe_load_all(shape.text(precision, as_mergekit=True)))
        for one, other in zip(plain, rounding, strict=True):
            assert other.pop("arithmetic") == "mergekit"
            if (other.get("parameters") or {}).pop("ties", None) and not one.get("parameters"):
                del other["parameters"]
            assert one == other
            assert precision == "bf16" or not {"bfloat16", "float16"} & set(map(str, one.values()))
