"""Tokenizers that differ: other ids are refused, other tokens and merges are warned of."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from families import TOKENIZER, changed, save_model, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_fit_configs import plan

import merge_engine as me
from merge_engine.fit.vocabulary import Change, difference, from_tokenizer_json

ADDED = {"<|begin_of_text|>": 60, "<|end_of_text|>": 61, "<|reserved_special_token_0|>": 62, "<|eot_id|>": 63}
IDS: dict[str, int] = TOKENIZER["model"]["vocab"]
TOKENS = st.text(st.sampled_from('ab"\\,{}[]:\n Ġé\u2028'), min_size=1, max_size=4)
VOCABULARIES = st.lists(TOKENS, unique=True, max_size=8).map(
    lambda tokens: {t: i for i, t in enumerate(tokens)}
)
MERGES = st.lists(st.tuples(TOKENS, TOKENS), max_size=4)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative, so that messages show them as they are."""
    monkeypatch.chdir(tmp_path)


def warned(other: str | None, own: str | None = None, **keys: Any) -> list[str]:
    """The warnings for a model with another tokenizer.json."""
    base = save_model(Path("base"), 0, tokenizer__json=own or tokenizer())
    return list(plan(base, save_model(Path("tuned"), 1, tokenizer__json=other), **keys).warnings)


@pytest.mark.parametrize("indent", [2, None])
@pytest.mark.parametrize("allow", [(), ("tokenizer",)])
def test_other_ids_are_refused_unless_allowed(indent: int | None, allow: tuple[str, ...]) -> None:
    swapped = IDS | {"Ġword1": 2, "Ġword2": 1}
    line = (
        "tokenizer: tuned and base give other ids to the same tokens, or other tokens to the same ids, so the rows of "
        'their embeddings do not belong together: "Ġword1" is 1 in base, 2 in tuned, and 1 more'
    )
    if allow:
        assert warned(tokenizer(indent, vocab=swapped), allow=list(allow)) == [line]
        return
    with pytest.raises(me.PlanError) as caught:
        warned(tokenizer(indent, vocab=swapped))
    assert caught.value.problems == [
        f'{line}; to bring them together by their tokens, add "tokenizer_source: union" to the recipe; if this is '
        'meant, add "allow: [tokenizer]" to the recipe'
    ]


def test_another_vocabulary_of_the_same_size_is_refused() -> None:
    with pytest.raises(me.PlanError, match=r'id 0 is "Ġword0" in base, "Ġwort0" in tuned, and 59 more'):
        warned(tokenizer(vocab={token.replace("d", "t"): i for token, i in IDS.items()}))


def test_added_tokens_with_other_ids_are_refused() -> None:
    with pytest.raises(me.PlanError, match=r'"<\|end_of_text\|>" is 61 in base, 63 in tuned'):
        warned(tokenizer(added=ADDED | {"<|end_of_text|>": 63, "<|eot_id|>": 61}))


def test_a_reserved_token_with_another_name_is_warned_of() -> None:
    named = {token.replace("<|reserved_special_token_0|>", "<|im_start|>"): i for token, i in ADDED.items()}
    assert warned(tokenizer(added=named)) == [
        'tokenizer: added tokens have other names in tuned: id 62 is "<|reserved_special_token_0|>" in base, '
        '"<|im_start|>" in tuned; the output gets those of base'
    ]


def test_more_tokens_are_warned_of() -> None:
    assert warned(tokenizer(added=ADDED | {"<tool>": 64, "</tool>": 65})) == [
        'tokenizer: tokens only in tuned: "<tool>", "</tool>"; the output\'s tokenizer is that of base and lacks them; '
        'to keep them, add "tokenizer_source: union"'
    ]


def test_other_merges_are_warned_of() -> None:
    merges = list(reversed(TOKENIZER["model"]["merges"]))
    assert warned(tokenizer(merges=merges)) == [
        "tokenizer: tuned may cut texts into other tokens than base, whose tokenizer the output gets: merges differ"
    ]


def test_another_normalizer_is_warned_of() -> None:
    [line] = warned(json.dumps(changed(TOKENIZER, normalizer={"type": "NFC"}), indent=2))
    assert line.endswith("normalizer differ")


@pytest.mark.parametrize(
    "other",
    [
        tokenizer(None),
        tokenizer(4),
        tokenizer(merges=[one.split(" ") for one in TOKENIZER["model"]["merges"]]),
        tokenizer(None, merges=[one.split(" ") for one in TOKENIZER["model"]["merges"]]),
        tokenizer(vocab=dict(reversed(IDS.items()))),
        tokenizer(ignore_merges=False),
        tokenizer(added=ADDED | {"Ġword5": 5}),
        json.dumps(changed(TOKENIZER, truncation={"max_length": 512}, padding={"strategy": "BatchLongest"})),
        json.dumps(
            changed(TOKENIZER, pre_tokenizer=TOKENIZER["pre_tokenizer"] | {"use_regex": True}), indent=2
        ),
    ],
)
def test_the_same_tokenizer_in_another_layout_is_silent(other: str) -> None:
    assert warned(other) == []
    assert warned_again(other) == []


def warned_again(other: str) -> list[str]:
    """With the donor's and the model's tokenizers exchanged."""
    base, tuned = save_model(Path("base2"), 0, tokenizer__json=other), save_model(Path("tuned2"), 1)
    return list(plan(base, tuned).warnings)


def test_a_unigram_model() -> None:
    pieces = [[token, -float(i)] for token, i in IDS.items()]
    own = tokenizer(type="Unigram", vocab=pieces, merges=None)
    assert (
        warned(tokenizer(None, type="Unigram", vocab=[[t, 0.0] for t, _ in pieces], merges=None), own) == []
    )
    swapped = [pieces[1], pieces[0], *pieces[2:]]
    other = save_model(
        Path("other"), 2, tokenizer__json=tokenizer(type="Unigram", vocab=swapped, merges=None)
    )
    with pytest.raises(me.PlanError, match='"Ġword0" is 0 in base, 1 in other'):
        plan(Path("base"), other)


def test_vocab_json_and_merges_txt() -> None:
    def model(name: str, ids: dict[str, int], merges: str) -> Path:
        path = save_model(Path(name), len(name), tokenizer__json=None)
        (path / "vocab.json").write_text(json.dumps(ids))
        (path / "merges.txt").write_text(merges)
        return path

    base = model("base", IDS, "#version: 0.2\na b\nc d\n")
    assert plan(base, model("alike", IDS, "#version: 0.1\na b\nc d\n")).warnings == ()
    assert plan(base, model("merges", IDS, "c d\na b\n")).warnings[0].endswith("merges differ")
    with pytest.raises(me.PlanError, match=r"allow: \[tokenizer\]"):
        plan(base, model("other", {token: 59 - i for token, i in IDS.items()}, "a b\n"))


def test_vocab_txt() -> None:
    def model(seed: int, tokens: str) -> Path:
        return save_model(Path(f"m{seed}"), seed, tokenizer__json=None, vocab__txt="\n".join(tokens.split()))

    base = model(0, "[PAD] [UNK] a b")
    assert (
        plan(base, model(1, "[PAD] [UNK] a b c")).warnings[0].startswith('tokenizer: tokens only in m1: "c"')
    )
    with pytest.raises(me.PlanError, match='"a" is 2 in m0, 3 in m2, and 1 more'):
        plan(base, model(2, "[PAD] [UNK] b a"))


def test_models_are_compared_by_files_that_both_have() -> None:
    ids = json.dumps({token: 59 - i for token, i in IDS.items()})
    base = save_model(Path("base"), 0, vocab__json=json.dumps(IDS))
    slow, fast = (
        save_model(Path("slow"), 1, tokenizer__json=None, vocab__json=ids),
        save_model(Path("fast"), 2),
    )
    with pytest.raises(me.PlanError, match=r'slow and base .* "Ġword0" is 0 in base, 59 in slow'):
        plan(base, slow, fast)
    assert plan(fast, slow).warnings == ()  # no file to compare


def test_a_sentencepiece_model_is_compared_byte_for_byte() -> None:
    models = [
        save_model(Path(f"m{i}"), i, tokenizer__json=None, tokenizer__model=f"{i > 1}") for i in range(3)
    ]
    assert plan(models[0], models[1]).warnings == ()
    [line] = plan(models[0], models[2]).warnings
    assert line.endswith("tokenizer.model differ")


@pytest.mark.parametrize(
    "broken", ["", "{", "[]", "null", '{"model": {}}', tokenizer()[:300], tokenizer(vocab=3)]
)
def test_a_malformed_tokenizer_is_named_and_passes(broken: str) -> None:
    [line] = warned(broken)
    where = Path("tuned") / "tokenizer.json"
    assert line == f"{where}: a malformed tokenizer; not compared with the other models"


def test_a_malformed_tokenizer_of_the_base_is_named_once() -> None:
    base = save_model(Path("base"), 0, tokenizer__json="{")
    tuned = [save_model(Path(f"m{i}"), i) for i in (1, 2)]
    assert plan(base, *tuned).warnings == (
        "base/tokenizer.json: a malformed tokenizer; not compared with the other models",
    )


@pytest.mark.parametrize("key", ["ignore_merges", "byte_fallback", "unk_token", "continuing_subword_prefix"])
@pytest.mark.parametrize("indent", [None, 2])
def test_settings_of_the_model_that_cut_otherwise(key: str, indent: int | None) -> None:
    [line] = warned(tokenizer(indent, **{key: "word" if "_t" in key or "_s" in key else True}))
    assert line.endswith(f"{key} differ")
    assert warned_again(tokenizer(indent, **{key: None})) == []  # as if it were not given


def test_a_pipe_is_not_waited_for() -> None:
    base, tuned = save_model(Path("base"), 0), save_model(Path("tuned"), 1, tokenizer__json=None)
    os.mkfifo(tuned / "tokenizer.json")
    start = time.monotonic()
    [line] = plan(base, tuned).warnings
    assert "not a regular file; " in line and "; not compared" in line
    assert time.monotonic() - start < 10


@given(VOCABULARIES, VOCABULARIES, st.sampled_from([2, 3, None]), MERGES)
def test_any_layout_gives_what_the_parsed_files_give(
    one: dict[str, int], other: dict[str, int], indent: int | None, merges: list[tuple[str, str]]
) -> None:
    def written(ids: dict[str, int], indent: int | None, merges: Any) -> bytes:
        return tokenizer(indent, vocab=ids, merges=merges, added={}).encode()

    texts = [" ".join(pair) for pair in merges]
    found = difference(
        from_tokenizer_json(written(one, 2, texts)), from_tokenizer_json(written(other, indent, merges))
    )
    moved = {Change(token, i, other[token]) for token, i in one.items() if other.get(token, i) != i}
    by_id = {i: token for token, i in one.items()}
    new = {token: i for token, i in other.items() if token not in one}
    moved |= {Change(i, by_id[i], token) for token, i in new.items() if i in by_id and by_id[i] not in other}
    assert set(found.moved) == moved
    assert set(found.more) == new.keys() - {change.other for change in moved}
    assert not found.renamed and not found.splits
