"""The type of the output where the recipe does not set it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from merge_engine.dtypes import DType, promote
from merge_engine.fit.candidate import Candidate, by_value
from merge_engine.fit.findings import Findings
from merge_engine.recipe import Recipe


def check_dtypes(recipe: Recipe, merged: Sequence[Candidate], findings: Findings, stacked: bool) -> None:
    """Warn if no input has the type of the output: bfloat16 and float16 are promoted to float32.

    Layers that are ``stacked`` and copied keep their types. Warn if these differ: a loader converts all to one.
    """
    if recipe.output_dtype is not None:
        return
    main = [(each, dtype) for each in merged if (dtype := _main_dtype(each)) is not None]
    types = {dtype for _, dtype in main}
    if stacked and recipe.merge_method == "passthrough":
        if len(types) > 1:
            found = by_value(main, str)
            findings.warnings.append(
                f"the tensors are {found}, so the output has several types, and loaders round all to the one that "
                "config.json names; set dtype to one of them"
            )
        return
    if types and (promoted := promote(*types)) not in types:
        found = by_value(main, str)
        findings.warnings.append(
            f"the tensors are {found}, so the output is {promoted}, which is larger; set dtype to one of them"
        )


def _main_dtype(candidate: Candidate) -> DType | None:
    """The type of most elements that are merged."""
    elements: Counter[DType] = Counter()
    for operand in candidate.checkpoint.tensors.values():
        if operand.dtype.mergeable:
            elements[operand.dtype] += operand.count
    return max(elements, key=elements.__getitem__, default=None)
