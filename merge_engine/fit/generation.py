"""How the output will be used: its chat template, the tokens at which it stops, its settings of generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_engine.checkpoint.chat_templates import find_template
from merge_engine.fit.candidate import Candidate, by_value, labels, shown
from merge_engine.fit.findings import Findings
from merge_engine.recipe import Recipe
from merge_engine.recipe.chat_template import AUTO, template_text
from merge_engine.text import some

_GENERATION = "generation_config.json"
_NOT_COMPARED = (
    *("transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "use_cache"),
    *(
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
    ),
)
_DEFAULTS = {
    "do_sample": False,
    "early_stopping": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}
"""What transformers takes for a setting that is not given. Some versions write these values, others do not."""
_SPECIAL = (
    "bos_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
    "add_bos_token",
    "add_eos_token",
)


def check_generation(recipe: Recipe, inputs: Sequence[Candidate], findings: Findings) -> None:
    """Warn of what the output lacks or has otherwise than a model. The donor is the first."""
    donor, models = inputs[0], inputs[1:]
    if recipe.chat_template is None:
        _compare_templates(donor, models, findings)
    elif recipe.chat_template == AUTO:
        _choose_template(inputs, findings)
    else:
        findings.chat_template = template_text(recipe.chat_template)
    _compare_stops(donor, models, findings)
    _compare_special_tokens(inputs, findings)
    _compare_settings(donor, models, findings)


def _compare_templates(donor: Candidate, models: Sequence[Candidate], findings: Findings) -> None:
    own = find_template(donor)
    found = [(each, template) for each in models if (template := find_template(each)) is not None]
    others = [(each, template) for each, template in found if own is None or template[:2] != own[:2]]
    if not others:
        return
    those = labels(each for each, _ in others)
    one, template = others[0]
    remedy = f"to change that, set chat_template, or copy {template.file} from {one.label} into the output"
    if own is None:
        what = f"chat template: in {those}, but not in {donor.label}, so the output has none"
    else:
        what = f"chat template: that of {donor.label}, which the output gets, is not that of {those}"
    findings.warnings.append(f"{what}; {remedy}")


def _choose_template(inputs: Sequence[Candidate], findings: Findings) -> None:
    """Take the template that most inputs have; of several, the one of the first input."""
    owners: dict[str, list[Candidate]] = {}
    for each in inputs:
        template = find_template(each)
        if template is not None and template.text:
            owners.setdefault(template.text, []).append(each)
    if not owners:
        findings.warnings.append("chat_template: no input has a chat template, so the output has none")
        return
    text = max(owners, key=lambda one: len(owners[one]))  # the first of several
    findings.chat_template = text
    if len(owners) > 1:
        as_many = [
            those for other, those in owners.items() if other != text and len(those) == len(owners[text])
        ]
        tie = f"; that of {labels(each for those in as_many for each in those)} is as common, but comes later"
        findings.notes.append(f"chat_template: that of {labels(owners[text])}{tie if as_many else ''}")


def _compare_stops(donor: Candidate, models: Sequence[Candidate], findings: Findings) -> None:
    own = _stops_of(donor)
    others = [each for each in models if not _stops_of(each) <= own]
    if not others:
        return
    if others[0].settings(_GENERATION):
        remedy = f"copy {_GENERATION} from {others[0].label} into the output"
    else:
        remedy = "set eos_token_id in the output's config.json"
    found = by_value((each, sorted(_stops_of(each)) or None) for each in [donor, *others])
    findings.warnings.append(
        f"eos_token_id: {found}; the output stops where {donor.label} does, and may run on after an answer; to "
        f"change that, {remedy}"
    )


def _stops_of(candidate: Candidate) -> frozenset[int]:
    """The ids of the tokens that end a text."""
    text = candidate.config.get("text_config")
    sections = (candidate.settings(_GENERATION), candidate.config, text if isinstance(text, dict) else None)
    for section in sections:
        given = (section or {}).get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        if found := frozenset(one for one in ids if type(one) is int):
            return found
    return frozenset()


def _compare_special_tokens(inputs: Sequence[Candidate], findings: Findings) -> None:
    """Those that both files of tokenizers name. Padding is left out: trainers set it as they need it."""
    donor = inputs[0]
    given = [(each, _special_tokens(each)) for each in inputs]
    differing = {}
    for key in _SPECIAL:
        values = [(each, tokens[key]) for each, tokens in given if key in tokens]
        if values and values[0][0] is donor and any(value != values[0][1] for _, value in values):
            differing[key] = values
    if differing:
        found = "; ".join(f"{key} is {by_value(values)}" for key, values in differing.items())
        findings.warnings.append(f"tokenizer_config.json: {found}; the output gets what {donor.label} has")


def _special_tokens(candidate: Candidate) -> Mapping[str, Any]:
    """Text and switches by key, without those that are not set."""
    tokens: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in (candidate.settings(file) or {}).items():
            token = value.get("content") if isinstance(value, dict) else value
            if key in _SPECIAL and token is not None:
                tokens[key] = token
    return tokens


def _compare_settings(donor: Candidate, models: Sequence[Candidate], findings: Findings) -> None:
    own = _settings_of(donor)
    differing: dict[tuple[str, ...], list[Candidate]] = {}
    for each in models:
        theirs = _settings_of(each) or {}
        keys = tuple(key for key in theirs if theirs[key] != (own or {}).get(key, _DEFAULTS.get(key)))
        if keys:
            differing.setdefault(keys, []).append(each)
    for keys, those in differing.items():
        theirs = _settings_of(those[0]) or {}
        values = some([f"{key} {shown(theirs[key])}" for key in keys])
        gets = f"the output gets those of {donor.label}" if own is not None else "the output has no such file"
        findings.warnings.append(f"{_GENERATION}: other settings in {labels(those)}: {values}; {gets}")


def _settings_of(candidate: Candidate) -> Mapping[str, Any] | None:
    given = candidate.settings(_GENERATION)
    if given is None:
        return None
    return {
        key: value for key, value in given.items() if key not in _NOT_COMPARED and not key.startswith("_")
    }
