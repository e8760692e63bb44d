"""The shapes of recipes: what each looks like, and what is expected of the two tools."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

FILES = sorted((Path(__file__).parent / "shapes").glob("*.yaml"))
PUBLISHED = [Path(__file__).parent / "published.yaml"]
_TRIMMED = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")
_METHOD = re.compile(r"^merge_method: *(\w+)$", re.MULTILINE)
_PARAMETERS = re.compile(r"^parameters:$", re.MULTILINE)


@dataclass(frozen=True)
class Shape:
    """One shape. ``source`` says where it is common: model cards, documentation, scripts, issues, tests.

    ``expect`` is one of ``bits``: the same weights as mergekit's; ``near``: its sums or functions are torch's, and ours
    are within a few units of the last place, or no farther from mergekit's result in float64 than its own are;
    ``draws``: its random numbers are others; ``alone``: mergekit fails and ours loads. ``why`` gives the reason for a
    difference. ``lenient``: ours is told to ignore a key that nobody knows.
    """

    title: str
    source: str
    recipe: str
    expect: str = "bits"
    why: str = ""
    lenient: bool = False

    @property
    def several(self) -> bool:
        """Whether the recipe has several documents."""
        return "\n---\n" in self.recipe

    @property
    def own_template(self) -> bool:
        """Whether the chat template is ours by its name, and not mergekit's."""
        return any(f"chat_template: {name}\n" in self.recipe for name in ("alpaca", "llama3"))

    def text(self, precision: str, *, as_mergekit: bool = False) -> str:
        """The recipe for models of this type, ``bf16`` or ``fp32``, or computed in float64.

        ``as_mergekit`` asks ours for mergekit's roundings.
        """
        dtype = {"bf16": r"\1", "fp32": "float32", "fp64": "float64"}[precision]
        text = re.sub(r"\b(bfloat16|float16|float32)\b", dtype, self.recipe)
        return "---\n".join(map(_rounding_as_mergekit, text.split("---\n"))) if as_mergekit else text


def _rounding_as_mergekit(document: str) -> str:
    found = _METHOD.search(document)
    if (
        found is not None and found[1] in _TRIMMED
    ):  # of equal magnitudes those that come first, as in a stable sort
        document = (
            _PARAMETERS.sub("parameters:\n  ties: index", document, count=1)
            if _PARAMETERS.search(document)
            else document + "parameters:\n  ties: index\n"
        )
    return document + "arithmetic: mergekit\n"


def load_shapes(files: Iterable[Path] = FILES) -> Mapping[str, Shape]:
    """All shapes by title."""
    shapes = {}
    for file in files:
        for title, given in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            shapes[title] = Shape(title, given.pop("from"), **given)
    return shapes
