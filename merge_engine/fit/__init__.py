"""Whether models belong together, from their configs, tokenizers and names: found before anything is merged.

A misfit that makes the result meaningless is a problem, unless the recipe allows its kind. One that may be meant is a
warning. Each cause gives one line, which names the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_engine.checkpoint import Checkpoint
from merge_engine.fit.adapters import check_adapters
from merge_engine.fit.candidate import Candidate, short_labels
from merge_engine.fit.configs import check_configs
from merge_engine.fit.dtypes import check_dtypes
from merge_engine.fit.findings import Findings, Remarks
from merge_engine.fit.generation import check_generation
from merge_engine.fit.identical import check_identical, idle_models
from merge_engine.fit.quantization import check_quantization
from merge_engine.fit.tokenizers import check_adapter_tokenizers, check_tokenizers
from merge_engine.fit.unused import SliceNames, unused_settings
from merge_engine.recipe import Recipe
from merge_engine.text import printable

__all__ = ["Findings", "Remarks", "SliceNames", "examine", "idle_models", "unused_settings"]


def examine(
    recipe: Recipe,
    bases: Mapping[str, Checkpoint],
    models: Mapping[int, Checkpoint],
    donor: Checkpoint,
    stacked: bool = False,
) -> Findings:
    """Compare the inputs of a merge: ``bases`` by role, ``models`` by recipe position. Most often the donor is a base.

    ``stacked`` says that the output has other layers than the donor. Of the tensors, it reads at most 16 MiB, or a few
    hundred short pieces. A checkpoint that stands there several times is one object. Raises ``CheckpointError`` if it
    cannot.
    """
    findings = Findings(allowed=recipe.allow)
    named = recipe.stacks.models
    references = recipe.stacks.bases
    names = {id(base): str(references[role]) for role, base in bases.items()}
    names |= {id(model): str(named[i]) for i, model in models.items()}
    if recipe.base_model is not None:
        names[id(donor)] = str(recipe.base_model)
    given = {id(each): each for each in (donor, *bases.values(), *models.values())}
    labels = short_labels([names[key] for key in given])
    inputs = [Candidate(label, each, findings) for label, each in zip(labels, given.values(), strict=True)]
    is_merged = any(each is donor for each in (*bases.values(), *models.values()))
    has_base = any(base is donor for base in bases.values())
    copies = _check(recipe, has_base, inputs, inputs if is_merged else inputs[1:], findings, stacked)
    findings.copies = frozenset(i for i, model in models.items() if any(model is copy for copy in copies))
    for lines in (findings.problems, findings.warnings, findings.notes):
        lines[:] = map(printable, lines)
    return findings


def _check(
    recipe: Recipe,
    has_base: bool,
    inputs: Sequence[Candidate],
    merged: Sequence[Candidate],
    findings: Findings,
    stacked: bool,
) -> list[Checkpoint]:
    """Fill ``findings``, and return the copies of the base.

    The first of the ``inputs`` is the donor; only ``merged`` give tensors to the output.
    """
    donor = inputs[0]
    check_adapters(inputs, findings)
    check_quantization(recipe, inputs, findings)
    if findings.problems:  # configs and tokenizers of such models add nothing to that
        return []
    aligned = recipe.vocabulary is not None or recipe.unsafe_truncate_embeddings
    check_configs(inputs, findings, stacked, ignored=("vocab_size",) if aligned else ())
    check_dtypes(recipe, merged, findings, stacked)
    if recipe.vocabulary is None:
        check_tokenizers(inputs, findings)
    check_adapter_tokenizers(inputs, findings)
    check_generation(recipe, inputs, findings)
    copies = [] if stacked else check_identical(donor if has_base else None, merged, findings)
    if not has_base and recipe.base_model is not None:
        findings.notes.append(f"{recipe.merge_method} takes only config and tokenizer from base_model")
    return [each.checkpoint for each in copies]
