"""One tokenizer with the tokens of several, which cuts the texts of each as that one does.

The tokens of the first keep their ids. Those that it lacks follow, model by model. Where a model's tokenizer works as
the first one's, its new pieces become pieces: with the merges of BPE behind those of the first, with the scores of
Unigram. Otherwise they become added tokens, which are found in a text as they are, before anything cuts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple

from merge_engine.fit.vocabulary import CUTTING, CUTTING_IN_MODEL, alike
from merge_engine.vocabulary.tokenizer import Tokenizer, added_token, merged, some_tokens


class Named(NamedTuple):
    """A model's tokenizer, without the tokens that the model has no row for, and its name for messages."""

    label: str
    tokenizer: Tokenizer


@dataclass
class Union:
    """The tokenizer of a union, with what is said about it."""

    tokenizer: Tokenizer
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def unite(first: Named, others: Sequence[Named]) -> Union:
    """The tokenizer of ``first`` with the tokens that only the others have."""
    union = Union(first.tokenizer)
    contents = {token["content"] for _, tokenizer in (first, *others) for token in tokenizer.added}
    alike_ones = [other for other in others if _works_alike(first, other, union.warnings)]
    has_room = first.tokenizer.size == len(first.tokenizer.tokens)  # the ids of a Unigram model have no gap
    number = first.tokenizer.size
    known = set(first.tokenizer.ids)
    pieces: dict[str, int] = {}
    loose: dict[str, int] = {}
    for other in others:
        fits = any(other is each for each in alike_ones) and (has_room or first.tokenizer.kind != "Unigram")
        new = [t for t in other.tokenizer.pieces if t not in known and t not in contents]
        (pieces if fits else loose).update(zip(new, range(number, number + len(new)), strict=True))
        known.update(new)
        number += len(new)
        if new:
            union.notes.append(f"tokenizer: the output gets {_tokens(new)} of {other.label}")
    added = _added(first, others, known, number, union)
    if len(added) == len(first.tokenizer.added) and not pieces and not loose:
        return union
    united = replace(first.tokenizer, added=[*added, *(added_token(t, i) for t, i in loose.items())])
    if pieces:
        united = _with_pieces(united, pieces, [other.tokenizer for other in alike_ones])
    union.tokenizer = replace(united, added=sorted(united.added, key=lambda token: int(token["id"])))
    return union


def with_tokens(tokenizer: Tokenizer, tokens: Iterable[str]) -> Tokenizer:
    """The tokenizer with these tokens, those that it lacks as added ones."""
    new = [token for token in tokens if token not in tokenizer.ids]
    if not new:
        return tokenizer
    numbers = range(tokenizer.size, tokenizer.size + len(new))
    return replace(
        tokenizer, added=[*tokenizer.added, *(added_token(t, i) for t, i in zip(new, numbers, strict=True))]
    )


def _works_alike(first: Named, other: Named, warnings: list[str]) -> bool:
    """Whether two tokenizers cut texts in the same way but for their pieces; if not, a warning says so."""
    one, two = first.tokenizer, other.tokenizer
    model, others = one.rest.get("model", {}), two.rest.get("model", {})
    differing = [] if one.kind == two.kind else [f"{one.kind} and {two.kind}"]
    differing += [part for part in CUTTING if not alike(one.rest.get(part), two.rest.get(part))]
    differing += [key for key in CUTTING_IN_MODEL if (model.get(key) or None) != (others.get(key) or None)]
    new = any(token not in one.ids for token in two.pieces)
    if differing and new:
        warnings.append(
            f"tokenizer: that of {other.label} cuts texts in another way than that of {first.label} "
            f"({', '.join(differing)}), so its own pieces become added tokens, which are found in a text only as they "
            "are; its texts may be cut otherwise than before"
        )
    return not differing


def _added(
    first: Named, others: Sequence[Named], known: set[str], number: int, union: Union
) -> list[Mapping[str, Any]]:
    """The added tokens of all, each with the settings of the first that has it; ids from ``number`` on are free."""
    held = {token["content"]: (first.label, token) for token in first.tokenizer.added}
    differing: dict[str, str] = {}
    own = first.tokenizer.ids
    for label, tokenizer in others:
        new = []
        for token in tokenizer.added:
            content = token["content"]
            if content in held:
                having, its = held[content]
                if {**its, "id": 0} != {**token, "id": 0}:
                    differing.setdefault(content, f"{having} and {label}")
                continue
            if content in own:
                token = {**token, "id": own[content]}
            else:
                token = {**token, "id": number}
                number += 1
                new.append(content)
            held[content] = label, token
        if new:
            union.notes.append(f"tokenizer: the output gets {_tokens(new)} of {label}, as added tokens")
    if differing:
        union.warnings.append(
            f"tokenizer: added tokens with other settings in {next(iter(differing.values()))}: "
            f"{some_tokens(list(differing))}; those of the first are used"
        )
    return [token for _, token in held.values()]


def _with_pieces(tokenizer: Tokenizer, new: Mapping[str, int], others: Sequence[Tokenizer]) -> Tokenizer:
    """The tokenizer with new pieces of others that work alike.

    The tokenizers library counts on from the pieces of a model when it gives ids to added tokens, so these become
    pieces too, of which no text is ever made: they are found before the model sees it.
    """
    own = {**tokenizer.pieces, **{token["content"]: token["id"] for token in tokenizer.added}}
    pieces = dict(sorted({**own, **new}.items(), key=lambda item: item[1]))
    scores: dict[str, float] = {}
    if tokenizer.kind == "Unigram":
        found = dict(tokenizer.scores)
        for other in others:
            shift = _shift(tokenizer, other)
            scaled = {token: score + shift for token, score in other.scores.items()}
            found = {**scaled, **found}
        scores = {token: found.get(token, min(found.values())) for token in pieces}
    merges = dict.fromkeys(tokenizer.merges)
    for other in others:
        merges |= {
            pair: None
            for pair in other.merges
            if pair[0] in pieces and pair[1] in pieces and merged(pair, tokenizer.prefix) in pieces
        }
    return replace(tokenizer, pieces=pieces, scores=scores, merges=list(merges))


def _shift(one: Tokenizer, other: Tokenizer) -> float:
    """What the scores of another Unigram model lack to be those of this one, by the pieces of both."""
    shared = [one.scores[token] - score for token, score in other.scores.items() if token in one.scores]
    return median(shared) if shared else 0.0


def _tokens(tokens: Sequence[str]) -> str:
    counted = f"{len(tokens):,} tokens" if len(tokens) > 1 else "the token"
    return f"{counted} {some_tokens(tokens)}"
