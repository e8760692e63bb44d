"""The tokens of a model and their ids, and how those of two models differ, parsed no further than that needs.

A tokenizer.json takes up to 30 MB, and parsing it takes longer than planning a merge. In the layout that the tokenizers
library writes, its two large members, tokens and merges, can be cut out and compared as bytes, line by line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

from merge_engine.checkpoint.strict_json import check_amount

MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
"""What comes of a tokenizer that is malformed. Nothing of it is needed to merge."""

_MODEL = b'\n  "model": {'
_IDS = b'\n    "vocab": '
_MERGES = b'\n    "merges": '
_END = {b"[": b"\n    ]", b"{": b"\n    }"}
"""The end of a member of the model: all that is inside is indented further, and a text has no line ends."""

CUTTING = ("normalizer", "pre_tokenizer")
CUTTING_IN_MODEL = ("ignore_merges", "byte_fallback", "unk_token", "continuing_subword_prefix")
"""What cuts a text into tokens besides the merges, in a tokenizer.json and its member ``model``."""


class Change(NamedTuple):
    """A token with its ids in two models, or an id with its tokens."""

    of: str | int
    one: str | int
    other: str | int


@dataclass(frozen=True)
class Difference:
    """How the tokenizer of one model differs from that of another.

    ``moved``: a token has another id, or an id is another token of the model itself. ``renamed``: an id is another
    added token, which may be one of those that were kept free for this. ``more``: the tokens that only the other has.
    ``splits``: the parts of the tokenizer that cut a text into tokens and differ.
    """

    moved: Sequence[Change] = ()
    renamed: Sequence[Change] = ()
    more: Sequence[str] = ()
    splits: Sequence[str] = ()


@dataclass
class Vocabulary:
    """The tokens of a tokenizer: those of its model, and the ids of added ones.

    ``raw_ids`` and ``raw_merges`` are in JSON, or the merges are the lines of a merges.txt; they are empty if ``ids``
    and ``merges`` were set. ``rest`` is a tokenizer.json without them. Look-ups raise as ``json.loads`` and
    conversions do if something is malformed.
    """

    raw_ids: bytes = field(repr=False)
    raw_merges: bytes = field(repr=False)
    added: Mapping[str, int]
    rest: Mapping[str, Any] = field(default_factory=dict)
    _same_merges: list[bytes] = field(default_factory=list)

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each token of the model."""
        return _by_token(json.loads(self.raw_ids))

    @cached_property
    def merges(self) -> Sequence[str]:
        """The merges in order, each as ``left right``."""
        if self.raw_merges.startswith(b"["):
            return _as_text(json.loads(self._merges_as_text))
        return [line for line in self.raw_merges.decode().splitlines() if not line.startswith("#version")]

    def changed(self, other: Vocabulary) -> tuple[dict[str, int], dict[str, int]]:
        """The ids of the models' tokens that are not the same in both, for this vocabulary and the other."""
        if self.raw_ids and self.raw_ids == other.raw_ids:
            return {}, {}
        if self._lines and other._lines:
            ours, theirs = _entries(self._lines - other._lines), _entries(other._lines - self._lines)
        elif self.ids == other.ids:
            return {}, {}
        else:
            ours, theirs = dict(self.ids), dict(other.ids)
        same = {token for token, i in ours.items() if theirs.get(token) == i}
        return (
            {token: i for token, i in ours.items() if token not in same},
            {token: i for token, i in theirs.items() if token not in same},
        )

    def same_merges(self, other: Vocabulary) -> bool:
        """Whether both merge letters into tokens in the same order."""
        if other.raw_merges and other.raw_merges in (self.raw_merges, *self._same_merges):
            return True
        if self._merges_as_text == other._merges_as_text != b"" or self.merges == other.merges:
            self._same_merges.append(other.raw_merges)
            return True
        return False

    @cached_property
    def _lines(self) -> frozenset[bytes]:
        """The entries of a map of tokens to ids that has one on each line; empty for another layout."""
        return frozenset(self.raw_ids.split(b"\n")) if self.raw_ids.startswith(b"{\n") else frozenset()

    @cached_property
    def _merges_as_text(self) -> bytes:
        """Newer versions of the library write each merge as a list on lines of its own, older ones as a text."""
        texts = self.raw_merges.replace(b'[\n        "', b'"').replace(b'",\n        "', b" ")
        return texts.replace(b'"\n      ]', b'"')


def from_tokenizer_json(raw: bytes) -> Vocabulary:
    """The vocabulary in a tokenizer.json. Raises as ``json.loads`` and look-ups do if it is malformed."""
    check_amount(raw)
    start = max(raw.find(_MODEL), 0)
    merges, rest = _cut_out(raw, _MERGES, start)  # the larger of the two first, because the rest is copied
    ids, rest = _cut_out(rest, _IDS, start)
    document = json.loads(rest)
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    found = Vocabulary(ids, merges, added, document)
    model = document["model"]
    if not ids:  # another layout
        found.ids = _by_token(model.pop("vocab"))
    if not merges:
        found.merges = _as_text(model.pop("merges", None) or [])
    return found


def from_separate_files(ids: bytes, merges: bytes, added: bytes) -> Vocabulary:
    """The vocabulary in vocab.json, merges.txt and added_tokens.json, of which the last two may be empty."""
    return Vocabulary(ids, merges, dict(json.loads(added or b"{}")))


def from_lines(raw: bytes) -> Vocabulary:
    """The vocabulary in a vocab.txt: a token on each line, with the line's number from 0 as its id."""
    found = Vocabulary(b"", b"", {})
    found.ids = {token: i for i, token in enumerate(raw.decode().rstrip("\n").split("\n"))}
    return found


def _by_token(given: Any) -> Mapping[str, int]:
    if isinstance(given, list):  # of a unigram model: pairs of token and score
        return {entry[0]: i for i, entry in enumerate(given)}
    return dict(given)


def _as_text(given: Any) -> Sequence[str]:
    return [one if isinstance(one, str) else " ".join(one) for one in given]


def _cut_out(raw: bytes, key: bytes, start: int) -> tuple[bytes, bytes]:
    """The value of a member of the model, and the document with null in its place; nothing, in another layout."""
    found = raw.find(key, start)
    begin = found + len(key)
    end = raw.find(_END.get(raw[begin : begin + 1], b"\0"), begin) + len(b"\n    ]")
    if found < 0 or end < begin or raw[begin + 1 : begin + 2] != b"\n":
        return b"", raw
    return raw[begin:end], b"".join((raw[:begin], b"null", raw[end:]))


def difference(one: Vocabulary, other: Vocabulary) -> Difference:
    """How ``other`` differs from ``one``. Raises as their look-ups do."""
    ours, theirs = one.changed(other)
    ours, theirs = {**ours, **one.added}, {**theirs, **other.added}
    moved = [Change(token, i, there) for token, i in ours.items() if (there := theirs.get(token, i)) != i]
    renamed, more = [], []
    lost = {i: token for token, i in ours.items() if token not in theirs}
    for token, i in theirs.items():
        if token in ours or (token in other.added and one.ids.get(token) == i):
            continue  # it may be a token of the model as well
        if i not in lost:
            more.append(token)
        elif token in other.added and lost[i] in one.added:
            renamed.append(Change(i, lost[i], token))
        else:
            moved.append(Change(i, lost[i], token))
    splits = [] if moved or one.same_merges(other) else ["merges"]
    splits += [part for part in CUTTING if not alike(one.rest.get(part), other.rest.get(part))]
    here, there = one.rest.get("model", {}), other.rest.get("model", {})
    splits += [key for key in CUTTING_IN_MODEL if (here.get(key) or None) != (there.get(key) or None)]
    return Difference(moved, renamed, more, splits)


def alike(one: Any, other: Any) -> bool:
    """Whether two settings agree in all that both give: newer versions of the library write more keys."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(alike(one[key], other[key]) for key in one.keys() & other.keys())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def _entries(lines: Iterable[bytes]) -> dict[str, int]:
    """The entries on these lines, in order of their ids."""
    found = b",".join(line.rstrip(b",") for line in lines if line.startswith(b"      "))
    return dict(sorted(json.loads(b"{%b}" % found).items(), key=itemgetter(1)))
