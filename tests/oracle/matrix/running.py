"""The runs of the matrix: what became of each shape, and whether that is as expected."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from matrix.comparing import Weights, compare_files, compare_loaded, compare_weights, distance
from matrix.in_ours import merge
from matrix.models import build
from matrix.shapes import Shape

HERE = Path(__file__).parent
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
NEAR = 8.0
"""Units of the last place: a result that is nearer differs by the order of torch's sums."""


@dataclass
class Row:
    """One shape in one precision. ``wrong`` says what is not as expected.

    ``errors``: of ours and of mergekit's, the share of elements that are not mergekit's in float64, rounded.
    """

    shape: Shape
    precision: str
    outcome: str = ""
    as_mergekit: Weights = field(default_factory=Weights)
    default: Weights = field(default_factory=Weights)
    beside: list[str] = field(default_factory=list)
    loads: str = ""
    errors: tuple[float, float] | None = None
    wrong: list[str] = field(default_factory=list)


class Matrix:
    """All runs of one precision, each output in a folder of its own."""

    def __init__(
        self, work: Path, python: str, precision: str, shapes: Sequence[Shape], *, deep: bool = False
    ):
        self.folder = work / precision
        self.python, self.precision, self.shapes = python, precision, shapes
        build(self.folder / "models", PRECISIONS[precision], deep=deep)
        started = time.perf_counter()
        self.theirs = self._mergekit(self._jobs("mergekit", shapes))
        self.seconds_theirs = time.perf_counter() - started
        self.theirs |= self._mergekit(self._jobs("float64", [one for one in shapes if one.expect == "near"]))
        started = time.perf_counter()
        self.ours = merge(self._jobs("ours", shapes)) | merge(self._jobs("default", shapes))
        self.seconds_ours = time.perf_counter() - started
        outputs = [self.output(shape, who) for shape in shapes for who in ("mergekit", "ours", "default")]
        self.loaded = self._load([output for output in outputs if (output / "config.json").exists()])

    def output(self, shape: Shape, who: str) -> Path:
        """Where an output is."""
        return self.folder / who / f"{self.shapes.index(shape):03}"

    def rows(self) -> list[Row]:
        """What became of each shape."""
        return [self._row(shape) for shape in self.shapes]

    def _jobs(self, who: str, shapes: Sequence[Shape]) -> list[dict[str, Any]]:
        jobs = []
        (self.folder / who).mkdir()
        for shape in shapes:
            output = self.output(shape, who)
            config = output.with_suffix(".yaml")
            precision = "fp64" if who == "float64" else self.precision
            config.write_text(shape.text(precision, as_mergekit=who == "ours"))
            paths = {"folder": str(self.folder), "config": str(config), "output": str(output)}
            jobs.append({**paths, "several": shape.several, "lenient": shape.lenient})
        return jobs

    def _mergekit(self, jobs: list[dict[str, Any]]) -> dict[str, str]:
        return self._in_oracle("in_mergekit.py", jobs)

    def _load(self, folders: list[Path]) -> dict[str, dict[str, Any]]:
        return self._in_oracle("in_transformers.py", [str(folder) for folder in folders])

    def _in_oracle(self, script: str, given: list[Any]) -> dict[str, Any]:
        files = [self.folder / f"{script}.{end}.json" for end in ("given", "found")]
        files[0].write_text(json.dumps(given))
        # Without base_model mergekit's donor depends on the hash of texts. It looks for cards of models on the hub.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        log = self.folder / f"{script}.log"
        with log.open("w") as said:
            done = subprocess.run(
                [self.python, str(HERE / script), *map(str, files)],
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{log.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(files[1].read_text())
        return found

    def _row(self, shape: Shape) -> Row:
        row = Row(shape, self.precision)
        theirs, ours, default = (self.output(shape, who) for who in ("mergekit", "ours", "default"))
        failed = [error for output in (ours, default) if (error := self.ours.get(str(output)))]
        if failed:
            row.outcome = failed[0].replace("\n", " ")
            row.wrong.append("not merged")
            return row
        problems = {output: self.loaded[str(output)]["problem"] for output in (ours, default)}
        row.loads = problems[ours] or problems[default] or "yes"
        if row.loads != "yes":
            row.wrong.append("does not load")
        error = self.theirs.get(str(theirs), "")
        if error or shape.expect == "alone":
            row.outcome = f"mergekit fails: {error.splitlines()[0] if error else 'no'}"
            row.wrong += [] if error and shape.expect == "alone" else ["mergekit's part is not as expected"]
            return row
        row.outcome = "yes"
        row.as_mergekit = self._compare(shape, ours, theirs)
        row.default = self._compare(shape, default, theirs)
        if shape.expect == "near":
            truth = self.output(shape, "float64")
            row.errors = (distance(default, truth), distance(theirs, truth))
        row.wrong += _judge(row)
        of_ours, of_theirs = self.loaded[str(ours)], self.loaded[str(theirs)]
        row.beside = compare_loaded(of_ours, of_theirs, shape.own_template) + compare_files(ours, theirs)
        row.wrong += row.beside
        if of_theirs["problem"]:
            row.loads += f"; mergekit's: {of_theirs['problem']}"
        return row

    def _compare(self, shape: Shape, ours: Path, theirs: Path) -> Weights:
        """Tensors by the names in the files, or if these are others, by those of transformers."""
        base = (
            yaml.safe_load(shape.recipe.split("---\n")[-1]).get("base_model")
            if shape.expect == "draws"
            else None
        )
        found = compare_weights(ours, theirs, self.folder / base if base else None)
        if found.names.startswith("names:"):
            one, other = (self.loaded[str(folder)].get("weights", {}) for folder in (ours, theirs))
            alike = sum(one.get(name) == digest for name, digest in other.items())
            said = f"as loaded: {alike} of the {len(other)} tensors that mergekit writes are equal"
            found = Weights(len(other), len(other) - alike, names=said)
        return found


def _judge(row: Row) -> list[str]:
    """What is wrong with weights under ``arithmetic: mergekit``."""
    found = row.as_mergekit
    as_expected = not found.names or found.names.startswith("as loaded")
    if row.shape.expect == "bits":
        as_expected = as_expected and not found.differ
    elif row.errors is not None:
        as_expected = as_expected and (found.ulps <= NEAR or row.errors[0] <= row.errors[1])
    else:
        as_expected = as_expected and found.alike_as_draws
    return [] if as_expected else [f"weights, expected {row.shape.expect}"]
