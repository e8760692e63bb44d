"""Tokenizers that differ: the rows of the embeddings are merged by token id, and the output gets one tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from merge_engine.fit.candidate import Candidate, labels, shown
from merge_engine.fit.findings import Findings
from merge_engine.fit.vocabulary import (
    MALFORMED,
    Change,
    Difference,
    Vocabulary,
    difference,
    from_lines,
    from_separate_files,
    from_tokenizer_json,
)
from merge_engine.text import some

_FORMATS: Mapping[tuple[str, ...], Callable[..., Vocabulary] | None] = {
    ("tokenizer.json",): from_tokenizer_json,
    ("vocab.json", "merges.txt", "added_tokens.json"): from_separate_files,
    ("vocab.txt",): from_lines,
    ("tokenizer.model",): None,
    ("spiece.model",): None,
    ("sentencepiece.bpe.model",): None,
    ("vocab.spm",): None,
}
"""The files of each format, which is known by the first, and what parses them; None compares bytes alone."""


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


def check_adapter_tokenizers(inputs: Sequence[Candidate], findings: Findings) -> None:
    """Warn of tokens that come with an adapter, and that the model it is put into has not or has otherwise."""
    for each in inputs:
        adapter = each.checkpoint.adapter
        if adapter is None:
            continue
        beside = replace(
            each, label=str(adapter.path), checkpoint=replace(each.checkpoint, folder=adapter.folder)
        )
        for _, found in _differences(each, [beside]):
            changed = (*found.moved, *found.renamed)
            tokens = [*found.more, *(one.of if isinstance(one.of, str) else one.other for one in changed)]
            if tokens:
                findings.warnings.append(
                    f"tokenizer: {adapter.path} comes with tokens that {each.checkpoint.path} has not, or has "
                    f"otherwise: {some([shown(token) for token in tokens])}; its own tokenizer is not used"
                )


def _warn_of_none(donor: Candidate, models: Sequence[Candidate], findings: Findings) -> None:
    names = [first for first, *_ in _FORMATS]
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
    """The models whose tokenizers are not the donor's, by the first format that both have.

    A file is parsed only if its bytes differ.
    """
    left = list(models)
    for names, parse in _FORMATS.items():
        own = _read(donor, names)
        if own is None:
            continue
        parsed: Vocabulary | None = None
        for model in left[:]:
            theirs = _read(model, names)
            if theirs is None:
                continue
            left.remove(model)
            if theirs == own:
                continue
            if parse is None:
                yield model, Difference(splits=names)
                continue
            try:
                parsed = parsed or parse(*own)
                yield model, difference(parsed, parse(*theirs))
            except MALFORMED:
                broken = [each for each, raw in ((donor, own), (model, theirs)) if not _is_whole(parse, raw)]
                for each in broken or [model]:
                    each.not_compared(f"{each.path(names[0])}: a malformed tokenizer")
                if any(each is donor for each in broken):
                    return


def _is_whole(parse: Callable[..., Vocabulary], files: Sequence[bytes]) -> bool:
    """Whether all of a tokenizer can be parsed, of which a comparison looks at no more than it needs."""
    try:
        found = parse(*files)
        {*found.ids.values(), *found.added.values(), *found.merges}
    except MALFORMED:
        return False
    return True


def _read(candidate: Candidate, names: Sequence[str]) -> list[bytes] | None:
    """The files of a format, empty where there is none; None without the first."""
    first = candidate.read(names[0])
    return None if first is None else [first, *(candidate.read(name) or b"" for name in names[1:])]
