"""Whether models belong together, from their configs, tokenizers and names: found before anything is merged.

A misfit that makes the result meaningless is a problem, unless the recipe allows its kind. One that may be meant is a
warning. Each cause gives one line, which names the models.
"""

from __future__ import annotations

from collections.abc import Mapping

from merge_engine.checkpoint import Checkpoint
from merge_engine.fit.adapters import check_adapters
from merge_engine.fit.candidate import Candidate, short_labels
from merge_engine.fit.configs import check_configs
from merge_engine.fit.dtypes import check_dtypes
from merge_engine.fit.findings import Findings
from merge_engine.fit.generation import check_generation
from merge_engine.fit.identical import check_identical, idle_models
from merge_engine.fit.quantization import check_quantization
from merge_engine.fit.tokenizers import check_tokenizers
from merge_engine.fit.unused import unused_settings
from merge_engine.recipe import Recipe
from merge_engine.text import printable

__all__ = ["Findings", "examine", "idle_models", "unused_settings"]


def examine(
    recipe: Recipe, base: Checkpoint | None, models: Mapping[int, Checkpoint], donor: Checkpoint
) -> Findings:
    """Compare the inputs of a merge; ``models`` are by recipe position.

    Of the tensors, it reads at most a few hundred short pieces. Raises ``CheckpointError`` if it cannot.
    """
    findings = Findings(recipe.allow)
    named = {id(model): str(recipe.models[i].model) for i, model in models.items()}
    if recipe.base_model is not None:
        named[id(donor)] = str(recipe.base_model)
    given = {id(each): each for each in (donor, *models.values())}
    names = short_labels([named[key] for key in given])
    by_id = {key: Candidate(label, given[key], findings) for key, label in zip(given, names, strict=True)}
    _check(recipe, base, models, by_id, findings)
    for lines in (findings.problems, findings.warnings, findings.notes):
        lines[:] = map(printable, lines)
    return findings


def _check(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Mapping[int, Checkpoint],
    by_id: Mapping[int, Candidate],
    findings: Findings,
) -> None:
    inputs = list(by_id.values())  # the donor is the first
    check_adapters(inputs, findings)
    check_quantization(recipe, inputs, findings)
    if findings.problems:  # configs and tokenizers of such models add nothing to that
        return
    merged = list(
        dict.fromkeys(id(each) for each in (*([base] if base is not None else []), *models.values()))
    )
    check_configs(inputs, findings)
    check_dtypes(recipe, [by_id[key] for key in merged], findings)
    check_tokenizers(inputs, findings)
    check_generation(inputs, findings)
    check_identical(None if base is None else by_id[id(base)], [by_id[key] for key in merged], findings)
    if base is None and recipe.base_model is not None:
        findings.notes.append(f"{recipe.merge_method} takes only config and tokenizer from base_model")
