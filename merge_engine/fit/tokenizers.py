"""Tokenizers that differ: the rows of the embeddings are merged by token id, and the output gets one tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from merge_engine.fit.candidate import Candidate, labels, shown
from merge_engine.fit.findings import Findings
from merge_engine.fit.vocabulary import Change, Difference, Vocabulary, difference, from_tokenizer_json
from merge_engine.text import some

_WHOLE = ("vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.spm")
"""Files that are compared byte for byte, for models without a tokenizer.json or vocab.json."""

_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
"""What comes of a tokenizer that is malformed. It gives a warning: nothing of it is needed to merge."""

_Files: TypeAlias = tuple[bytes, ...]


def check_tokenizers(inputs: Sequence[Candidate], findings: Findings) -> None:
    """Compare the tokenizers of the inputs with that of the donor, the first, which the output gets."""
    donor, models = inputs[0], inputs[1:]
    _warn_of_none(donor, models, findings)
    found = list(_differences(donor, models))
    if moved := [(model, each.moved) for model, each in found if each.moved]:
        findings.misfit(
            "tokenizer",
            f"tokenizer: {_those(moved)} and {donor.label} give other ids to the same tokens, or other tokens to the "
            f"same ids, so the rows of their embeddings do not belong together: {_example(donor, moved)}",
        )
    if renamed := [(model, each.renamed) for model, each in found if each.renamed]:
        findings.warnings.append(
            f"tokenizer: added tokens have other names in {_those(renamed)}: {_example(donor, renamed)}; the output "
            f"gets those of {donor.label}"
        )
    if more := [(model, each.more) for model, each in found if each.more]:
        tokens = dict.fromkeys(token for _, those in more for token in those)
        findings.warnings.append(
            f"tokenizer: tokens only in {_those(more)}: {some([shown(token) for token in tokens])}; the output's "
            f"tokenizer is that of {donor.label} and lacks them"
        )
    if splits := [(model, each.splits) for model, each in found if each.splits]:
        parts = dict.fromkeys(part for _, those in splits for part in those)
        findings.warnings.append(
            f"tokenizer: {_those(splits)} may cut texts into other tokens than {donor.label}, whose tokenizer the "
            f"output gets: {', '.join(parts)} differ"
        )


def _warn_of_none(donor: Candidate, models: Sequence[Candidate], findings: Findings) -> None:
    names = ("tokenizer.json", "vocab.json", *_WHOLE)
    if not any(donor.path(name).exists() for name in names):
        having = [each for each in models if any(each.path(name).exists() for name in names)]
        if having:
            findings.warnings.append(
                f"{donor.label}: it has no tokenizer, so the output has none; copy that of {having[0].label}"
            )


def _those(found: Sequence[tuple[Candidate, object]]) -> str:
    return labels(model for model, _ in found)


def _example(donor: Candidate, found: Sequence[tuple[Candidate, Sequence[Change]]]) -> str:
    """The first change and the number of all: ``"the" is 262 in base, 310 in code, and 99 more``."""
    model, changes = found[0]
    first = changes[0]
    of = shown(first.of) if isinstance(first.of, str) else f"id {first.of}"
    rest = f", and {len(changes) - 1:,} more" if len(changes) > 1 else ""
    return f"{of} is {shown(first.one)} in {donor.label}, {shown(first.other)} in {model.label}{rest}"


def _differences(donor: Candidate, models: Sequence[Candidate]) -> Iterator[tuple[Candidate, Difference]]:
    """The models whose tokenizers are not the donor's. A file is parsed only if its bytes differ."""
    parse: Callable[[_Files], Vocabulary]
    for read, parse in ((_tokenizer_json, _of_tokenizer_json), (_vocab_json, _of_vocab_json)):
        own = read(donor)
        if own is None:
            continue
        parsed: Vocabulary | None = None
        for model in models:
            theirs = read(model)
            if theirs is None or theirs == own:
                continue
            try:
                parsed = parsed or parse(own)
                yield model, difference(parsed, parse(theirs))
            except _MALFORMED:
                model.not_compared(f"tokenizer: that of {model.label} or {donor.label} is malformed")
        return
    for file in _WHOLE:
        if (single := donor.read(file)) is not None:
            for model in models:
                if (other := model.read(file)) is not None and other != single:
                    yield model, Difference(splits=[file])
            return


def _tokenizer_json(candidate: Candidate) -> _Files | None:
    raw = candidate.read("tokenizer.json")
    return None if raw is None else (raw,)


def _of_tokenizer_json(files: _Files) -> Vocabulary:
    return from_tokenizer_json(files[0])


def _vocab_json(candidate: Candidate) -> _Files | None:
    raw = candidate.read("vocab.json")
    if raw is None:
        return None
    return raw, candidate.read("merges.txt") or b"", candidate.read("added_tokens.json") or b"{}"


def _of_vocab_json(files: _Files) -> Vocabulary:
    ids, merges, added = files
    return Vocabulary(ids, merges, dict(json.loads(added)))
