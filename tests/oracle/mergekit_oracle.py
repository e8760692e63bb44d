"""Runs mergekit on the cases and recipes of a job file. See README.md; needs an environment with mergekit.

usage: python mergekit_oracle.py JOB.json
"""

from __future__ import annotations

import functools
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from mergekit.merge_methods.api import merge_tensors
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file


@contextmanager
def stable_sorting():
    """Of equal magnitudes every sort keeps the order of their indices."""

    def stable(sort):
        @functools.wraps(sort)
        def wrapper(*args, **kwargs):
            return sort(*args, **{**kwargs, "stable": True})

        return wrapper

    def topk(values, k, largest=True):
        ordered, places = torch.sort(values, descending=largest)
        return ordered[:k], places[:k]

    with (
        mock.patch.object(torch, "argsort", stable(torch.argsort)),
        mock.patch.object(torch.Tensor, "argsort", stable(torch.Tensor.argsort)),
        mock.patch.object(torch, "sort", stable(torch.sort)),
        mock.patch.object(torch.Tensor, "sort", stable(torch.Tensor.sort)),
        mock.patch.object(torch, "topk", topk),
    ):
        yield


def merge(case: dict, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The merged tensor of one case."""
    ids = case["tensors"]
    models = ids[1:] if case["base"] else ids
    parameters = {
        key: dict(zip(models, value, strict=True)) if isinstance(value, list) else value
        for key, value in case["parameters"].items()
    }
    return merge_tensors(
        [tensors[name].clone() for name in ids],
        case["method"],
        parameters=parameters,
        ids=ids,
        base_index=0 if case["base"] else None,
    )


def main(job_file: str) -> None:
    """Does everything that a job asks for."""
    torch.set_num_threads(1)
    job = json.loads(Path(job_file).read_text())
    tensors = load_file(job["inputs"])
    merged = {}
    with torch.no_grad():
        for case in job["cases"]:
            if case.get("stable", True):
                with stable_sorting():
                    merged[case["id"]] = merge(case, tensors)
            else:
                merged[case["id"]] = merge(case, tensors)
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, job["output"])
    with stable_sorting():
        for recipe in job["recipes"]:
            arguments = [recipe["config"], recipe["output"], "--no-copy-tokenizer", "--no-write-model-card"]
            mergekit_yaml.main(args=arguments, standalone_mode=False)


if __name__ == "__main__":
    main(sys.argv[1])
