"""Models with different vocabularies: rows follow their tokens, and config and tokenizer of the output say the same."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda.backend import EmulatedCudaBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from vocabularies import SPECIAL, WIDTH, save_llama, tokenizer_json, words

import merge_engine as me

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def recipe(method: str, base: Path | None, models: list[Path], **keys: Any) -> dict[str, Any]:
    found = {"merge_method": method, "models": [{"model": str(each)} for each in models]}
    if base is not None:
        found["base_model"] = str(base)
    return {**found, "parameters": {"weight": 0.5}, **keys}


def ids_of(folder: Path) -> dict[str, int]:
    return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())


def rows_of(folder: Path, name: str = EMBEDDING) -> dict[str, torch.Tensor]:
    """The row of each token."""
    tensor = load_file(folder / "model.safetensors")[name]
    return {token: tensor[i] for token, i in ids_of(folder).items() if i < len(tensor)}


def settings_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base and two fine-tunes that share the token <x>, under different ids."""
    base = save_llama(tmp_path / "base", tokenizer_json(words(20)), seed=1)
    one = save_llama(tmp_path / "one", tokenizer_json(words(20), ["<x>", "<a>"]), seed=2)
    two = save_llama(tmp_path / "two", tokenizer_json(words(20), ["<b>", "<x>"]), seed=3)
    return base, one, two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("origin", ["mean", "zero", "models", None])
def test_shared_new_tokens_merge_by_the_rule_of_the_method(
    three: tuple[Path, Path, Path], tmp_path: Path, origin: str | None, dtype: torch.dtype
) -> None:
    base, one, two = three
    weights = {one: 0.75, two: 0.5}
    given = recipe("task_arithmetic", base, [], tokenizer={"source": "union"}, dtype="float32")
    given["models"] = [{"model": str(m), "parameters": {"weight": w}} for m, w in weights.items()]
    if origin:
        given["tokenizer"]["origin"] = origin
    me.run(given, tmp_path / "out")
    assert ids_of(tmp_path / "out") == {**ids_of(base), "<x>": 20, "<a>": 21, "<b>": 22}
    assert settings_of(tmp_path / "out")["vocab_size"] == 23
    for name in (EMBEDDING, HEAD):
        old = load_file(base / "model.safetensors")[name].double()
        merged, a, b = (rows_of(each, name) for each in (tmp_path / "out", one, two))
        a_row, b_row = a["<x>"].double(), b["<x>"].double()
        start = {"zero": torch.zeros(WIDTH, dtype=torch.float64), "models": (a_row + b_row) / 2}.get(
            origin or "mean", old.mean(0).to(torch.bfloat16).double()
        )
        wanted = start + (0.75 * (a_row - start) + 0.5 * (b_row - start) if origin != "models" else 0)
        assert torch.allclose(merged["<x>"].double(), wanted, atol=2e-4)
        assert torch.equal(merged["<a>"].float(), a["<a>"].float())
        assert torch.equal(merged["<b>"].float(), b["<b>"].float())


def test_a_task_vector_that_only_one_model_trained_is_kept(tmp_path: Path) -> None:
    """The other model still has the mean, where new rows begin: TIES takes the first one's row as it is."""
    base = save_llama(tmp_path / "base", tokenizer_json(words(20)), seed=1)
    one = save_llama(tmp_path / "one", tokenizer_json(words(20), ["<x>"]), seed=2)
    two = save_llama(tmp_path / "two", tokenizer_json(words(20), ["<x>"]), seed=3)
    tensors = load_file(two / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        tensors[name][20] = load_file(base / "model.safetensors")[name].double().mean(0).to(torch.bfloat16)
    save_file(tensors, two / "model.safetensors")
    me.run(recipe("ties", base, [one, two], tokenizer_source="union"), tmp_path / "out")
    assert torch.allclose(rows_of(tmp_path / "out")["<x>"], rows_of(one)["<x>"], atol=1e-3)


_TOKENS = [f"t{i}" for i in range(12)]
_MODELS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(_TOKENS), min_size=8, max_size=12, unique=True),
        st.sampled_from(["BPE", "Unigram", "WordPiece", "WordLevel"]),
        st.integers(0, 2),
    ),
    min_size=2,
    max_size=4,
)


@settings(max_examples=25)
@given(
    models=_MODELS,
    source=st.integers(-2, 3),
    multiple=st.sampled_from([None, 1, 8]),
    extra=st.lists(st.sampled_from(_TOKENS[:4]), max_size=2, unique=True),
)
def test_rows_follow_their_tokens(
    tmp_path_factory: pytest.TempPathFactory,
    models: list[tuple[list[str], str, int]],
    source: int,
    multiple: int | None,
    extra: list[str],
) -> None:
    """Plain Python finds the rows of ``linear`` again, for any vocabularies, paddings and sources."""
    folder = tmp_path_factory.mktemp("models")
    kind = models[0][1]
    paths = []
    for i, (tokens, _, padding) in enumerate(models):
        made = tokenizer_json([*SPECIAL, *(t for t in tokens if t not in extra or i)], kind=kind)
        size = len(made["model"]["vocab"])
        paths.append(save_llama(folder / str(i), made, size + padding, seed=i, dtype=torch.float32))
    chosen = paths[source] if 0 <= source < len(paths) else None
    key = {"source": str(chosen) if chosen else ("union" if source < 0 else "base")}
    if multiple:
        key["pad_to_multiple_of"] = multiple
    me.run(recipe("linear", None, paths, tokenizer=key, allow=["tokenizer"]), folder / "out")
    ids = [ids_of(path) for path in paths]
    if chosen or source >= 0:
        wanted_ids = ids_of(chosen or paths[0])
        assert ids_of(folder / "out") == wanted_ids
    else:
        wanted_ids = dict(ids[0])
        for own in ids[1:]:
            new = sorted((i, token) for token, i in own.items() if token not in wanted_ids)
            wanted_ids |= {token: len(wanted_ids) + k for k, (_, token) in enumerate(new)}
        assert ids_of(folder / "out") == wanted_ids
    held = [rows_of(path) for path in paths]
    merged = load_file(folder / "out" / "model.safetensors")[EMBEDDING]
    size = len(wanted_ids)
    own_rows = len(load_file((chosen or paths[0]) / "model.safetensors")[EMBEDDING])
    assert len(merged) == (-(-size // multiple) * multiple if multiple else max(size, own_rows))
    assert settings_of(folder / "out")["vocab_size"] == len(merged)
    for token, i in wanted_ids.items():
        having = [rows[token].double() for rows in held if token in rows]
        spare = held[0].get(token, sum(having) / len(having)).double()
        rows = [own.get(token, spare).double() for own in held]
        assert torch.allclose(merged[i].double(), sum(rows) / len(rows), atol=1e-6), token


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.parametrize("padding", [0, 12])
def test_equal_vocabularies_give_the_bytes_of_a_merge_without(
    tmp_path: Path, method: str, padding: int
) -> None:
    paths = [save_llama(tmp_path / str(i), tokenizer_json(words(20)), 20 + padding, seed=i) for i in range(3)]
    outputs = []
    for i, keys in enumerate(({}, {"tokenizer": {}}, {"tokenizer_source": "base"})):
        me.run(recipe(method, paths[0], paths[1:], **keys), tmp_path / f"out{i}")
        outputs.append(
            {
                path.name: path.read_bytes()
                for path in (tmp_path / f"out{i}").iterdir()
                if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json")
            }
        )
    assert outputs[0] == outputs[1] == outputs[2]


def test_single_tokens(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, two = three
    tokens = {
        "w5": {"source": str(one), "force": True},
        "w6": {"source": {"kind": "zero"}, "force": True},
        "w7": {"source": {"kind": "model_token", "model": str(two), "token": "<b>"}, "force": True},
        "w8": {"source": {"kind": "model_token", "model": str(two), "token_id": 21}, "force": True},
        "<x>": {"source": str(one)},
        "<new>": {"source": {"kind": "model_token", "model": str(base), "token": "w9"}},
    }
    me.run(recipe("task_arithmetic", base, [one, two], tokenizer={"tokens": tokens}), tmp_path / "out")
    a, b, merged = rows_of(one), rows_of(two), rows_of(tmp_path / "out")
    assert torch.equal(merged["w5"], a["w5"])
    assert not merged["w6"].any()
    assert torch.equal(merged["w7"], b["<b>"])
    assert torch.equal(merged["w8"], b["<x>"])
    assert torch.equal(merged["<new>"], rows_of(base)["w9"])
    halfway = (a["<x>"].double() + b["<x>"].double()) / 2
    assert torch.allclose(merged["<x>"].double(), halfway, atol=1e-3)


def test_a_stack_takes_rows_from_models_that_its_embedding_is_not_merged_from(
    three: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, one, two = three
    slices = [{"sources": [{"model": str(m), "layer_range": [i, i + 1]}]} for i, m in enumerate((one, two))]
    given = {"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"}
    me.run(given, tmp_path / "out")
    for name, first, other, token in ((EMBEDDING, one, two, "<b>"), (HEAD, two, one, "<a>")):
        merged, own = rows_of(tmp_path / "out", name), rows_of(first, name)
        assert all(torch.equal(merged[each], row) for each, row in own.items())
        assert torch.equal(merged[token], rows_of(other, name)[token])


def test_tokens_that_the_output_lacks_are_named(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, two = three
    result = me.run(recipe("linear", base, [one, two], tokenizer_source="base"), tmp_path / "out")
    assert [line for line in result.warnings if "the output lacks" in line] == [
        f'tokenizer: the output lacks 2 tokens of {one}: "<x>", "<a>"; to keep them, set "tokenizer_source: union"',
        f'tokenizer: the output lacks 2 tokens of {two}: "<b>", "<x>"; to keep them, set "tokenizer_source: union"',
    ]


def test_ids_in_settings_follow_their_tokens(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", tokenizer_json(words(20)), seed=1, pad_token_id=5)
    generation = {
        "eos_token_id": [2, 7],
        "suppress_tokens": [3, 4],
        "max_length": 20,
        "bad_words_ids": [[3, 4]],
    }
    (base / "generation_config.json").write_text(json.dumps(generation))
    order = [*SPECIAL[::-1], *(f"w{i}" for i in range(19, 4, -1))]
    other = save_llama(tmp_path / "other", tokenizer_json(order), seed=2, eos_token_id=0, bos_token_id=1)
    result = me.run(recipe("linear", base, [base, other], tokenizer_source=str(other)), tmp_path / "out")
    ids = ids_of(other)
    config = settings_of(tmp_path / "out")
    assert ids_of(tmp_path / "out") == ids
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (18, 1, 0)
    assert config["pad_token_id"] == ids["w5"]
    generation = settings_of(tmp_path / "out", "generation_config.json")
    assert generation == {
        "eos_token_id": [ids["</s>"], ids["w7"]],
        "suppress_tokens": None,
        "max_length": 20,
        "bad_words_ids": None,
    }
    assert any("lacks the tokens of suppress_tokens" in line for line in result.warnings)


@pytest.mark.parametrize("key", ["text_config", "language_config"])
def test_the_size_of_a_nested_language_model_follows(tmp_path: Path, key: str) -> None:
    inner = {"vocab_size": 20, "hidden_size": WIDTH}
    vision = {"vocab_size": 7, "hidden_size": 4}
    paths = [
        save_llama(
            tmp_path / str(i),
            tokenizer_json(words(20), ["<x>"][:i]),
            seed=i,
            **{key: {**inner, "vocab_size": 20 + i}, "vision_config": vision, "vocab_size": 20 + i},
        )
        for i in range(2)
    ]
    me.run(recipe("linear", None, paths, tokenizer={}), tmp_path / "out")
    config = settings_of(tmp_path / "out")
    assert config["vocab_size"] == config[key]["vocab_size"] == 21
    assert config["vision_config"]["vocab_size"] == 7


def test_tied_and_untied_heads(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", tokenizer_json(words(20)), seed=1, tied=True)
    one = save_llama(tmp_path / "one", tokenizer_json(words(20), ["<x>"]), seed=2, tied=True)
    me.run(recipe("task_arithmetic", base, [one], tokenizer_source="union"), tmp_path / "tied")
    assert HEAD not in load_file(tmp_path / "tied" / "model.safetensors")
    two = save_llama(tmp_path / "two", tokenizer_json(words(20), ["<y>"]), seed=3, tied=False)
    me.run(recipe("task_arithmetic", base, [one, two], tokenizer_source="union"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[HEAD].shape == tensors[EMBEDDING].shape == (22, WIDTH)
    assert torch.equal(rows_of(tmp_path / "out", HEAD)["<x>"], rows_of(one)["<x>"])
    assert torch.equal(rows_of(tmp_path / "out", HEAD)["<y>"], rows_of(two, HEAD)["<y>"])


def test_files_of_other_formats_agree(tmp_path: Path) -> None:
    """vocab.json and merges.txt, with and without a tokenizer.json beside them; a sentencepiece model is left out."""
    base = save_llama(tmp_path / "base", tokenizer_json(words(20)), seed=1)
    one = save_llama(
        tmp_path / "one", tokenizer_json([*words(20), "w3w4"], ["<x>"], merges=["w3 w4"]), seed=2
    )
    for folder in (base, one):
        model = settings_of(folder, "tokenizer.json")["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"]]))
        (folder / "tokenizer.model").write_bytes(b"pieces")
    (one / "added_tokens.json").write_text(json.dumps({"<x>": 21}))
    decoder = {"0": {"content": "<unk>", "special": True}}
    old = settings_of(base, "tokenizer_config.json")
    (base / "tokenizer_config.json").write_text(json.dumps({**old, "added_tokens_decoder": decoder}))
    result = me.run(recipe("linear", base, [base, one], tokenizer_source="union"), tmp_path / "out")
    out = tmp_path / "out"
    assert ids_of(out)["w3w4"] == 20 and ids_of(out)["<x>"] == 21
    assert settings_of(out, "vocab.json") == {t: i for i, t in enumerate([*words(20), "w3w4", "<x>"])}
    assert (out / "merges.txt").read_text() == "#version: 0.2\nw3 w4\n"
    decoder = settings_of(out, "tokenizer_config.json")["added_tokens_decoder"]
    assert decoder["21"]["content"] == "<x>" and decoder["0"]["content"] == "<unk>"
    assert not (out / "tokenizer.model").exists()
    assert any("tokenizer.model" in line and "cannot be written" in line for line in result.warnings)
    for folder in (base, one):
        (folder / "tokenizer.json").unlink()
    me.run(recipe("linear", base, [base, one], tokenizer_source="union"), tmp_path / "out2")
    assert settings_of(tmp_path / "out2", "vocab.json")["w3w4"] == 20
    assert settings_of(tmp_path / "out2", "added_tokens.json") == {"<unk>": 0, "<x>": 21}
    assert not (tmp_path / "out2" / "tokenizer.json").exists()
    merged = load_file(tmp_path / "out2" / "model.safetensors")[EMBEDDING]
    assert torch.equal(merged, load_file(out / "model.safetensors")[EMBEDDING])


def test_files_of_a_named_model(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, two = three
    (base / "chat_template.jinja").write_text("of the base")
    (base / "special_tokens_map.json").write_text("{}")
    (two / "chat_template.jinja").write_text("of two")
    me.run(recipe("linear", base, [one, two], tokenizer_source=str(two)), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "of two"
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()
    assert ids_of(tmp_path / "out") == ids_of(two)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(two / "tokenizer.json", alone)
    me.run(recipe("linear", base, [one, two], tokenizer_source=str(alone)), tmp_path / "out2")
    assert ids_of(tmp_path / "out2") == ids_of(two)


def test_pieces_keep_their_merges_and_scores(tmp_path: Path) -> None:
    """A word that an extended tokenizer makes one piece of is one piece in the output."""
    letters = [*SPECIAL, *"abcdxyz"]
    for kind, keys in (
        ("BPE", {"merges": ["a b", "ab c"]}),
        ("Unigram", {"scores": {"ab": -1.0, "abc": -0.5}}),
    ):
        folder = tmp_path / kind
        base = save_llama(folder / "base", tokenizer_json(letters, ["<s1>"], kind=kind), seed=1)
        one = save_llama(folder / "one", tokenizer_json([*letters, "ab", "abc"], kind=kind, **keys), seed=2)
        other = {"merges": ["x y"]} if kind == "BPE" else {"scores": {"xy": -0.1}}
        two = save_llama(folder / "two", tokenizer_json([*letters, "xy"], kind=kind, **other), seed=3)
        result = me.run(recipe("linear", base, [base, one, two], tokenizer_source="union"), folder / "out")
        assert result.warnings == []
        tokenizer = Tokenizer.from_file(str(folder / "out" / "tokenizer.json"))
        assert tokenizer.encode("abcxyd<s1>").tokens == ["abc", "xy", "d", "<s1>"]
        assert ids_of(folder / "out") == {**ids_of(base), "ab": 11, "abc": 12, "xy": 13}
        assert torch.equal(rows_of(folder / "out")["abc"], rows_of(one)["abc"])


def test_pieces_of_a_tokenizer_that_works_otherwise_become_added_tokens(tmp_path: Path) -> None:
    letters = [*SPECIAL, *"abc"]
    base = save_llama(tmp_path / "base", tokenizer_json(letters), seed=1)
    made = tokenizer_json([*letters, "ab"], merges=["a b"], normalizer={"type": "Lowercase"})
    one = save_llama(tmp_path / "one", made, seed=2)
    result = me.run(recipe("linear", base, [base, one], tokenizer_source="union"), tmp_path / "out")
    assert any("normalizer" in line and "added tokens" in line for line in result.warnings)
    assert settings_of(tmp_path / "out", "tokenizer.json")["added_tokens"][-1]["content"] == "ab"


def test_bytes_are_the_same_on_all_backends_and_in_little_memory(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", tokenizer_json(words(240)), seed=1)
    one = save_llama(tmp_path / "one", tokenizer_json(words(240), ["<x>", "<y>"]), seed=2)
    turned = [*SPECIAL, *reversed(words(240)[3:]), "new"]
    two = save_llama(tmp_path / "two", tokenizer_json(turned, ["<x>"]), seed=3, dtype=torch.float32)
    made = recipe("ties", base, [one, two], tokenizer={"pad_to_multiple_of": 64})
    made["parameters"]["density"] = 0.4
    ways = ({}, {"backend": "reference"}, {"backend": EmulatedCudaBackend()}, {"memory": "2MB"})
    outputs = [me.run(made, **way).tensors for way in ways]
    for output in outputs[1:]:
        assert all(torch.equal(output[name], tensor) for name, tensor in outputs[0].items())


def test_truncation(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, two = three
    keys = {"unsafe_truncate_embeddings": True, "allow": ["tokenizer"]}
    result = me.run(recipe("linear", one, [one, two, base], **keys), tmp_path / "out")
    rows = [load_file(each / "model.safetensors")[EMBEDDING][:20].double() for each in (one, two, base)]
    merged = load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING]
    assert torch.allclose(merged.double(), sum(rows) / 3, atol=1e-3)
    assert settings_of(tmp_path / "out")["vocab_size"] == 20
    assert any("unsafe_truncate_embeddings" in line for line in result.warnings)
    me.run(recipe("linear", one, [one, two, base], arithmetic="mergekit", **keys), tmp_path / "kept")
    assert settings_of(tmp_path / "kept")["vocab_size"] == 22


def test_an_interrupted_merge_does_not_go_on_with_other_rows(three: tuple[Path, Path, Path]) -> None:
    from merge_engine.engine.records import plan_key

    base, one, two = three
    given = recipe("linear", base, [one, two], tokenizer_source="union")
    before = plan_key(me.plan(given))
    assert plan_key(me.plan(given)) == before
    document = settings_of(two, "tokenizer.json")
    document["added_tokens"][-1]["content"], document["added_tokens"][-2]["content"] = "<b>", "<x>"
    (two / "tokenizer.json").write_text(json.dumps(document))
    assert plan_key(me.plan(given)) != before


Change = Callable[[Path, dict[str, Any]], Mapping[str, Any] | None]
_numbers = count()


def _tokenizer(folder: Path, document: object) -> None:
    (folder / "tokenizer.json").write_text(
        json.dumps(document) if not isinstance(document, str) else document
    )


def _edit(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = settings_of(folder, "tokenizer.json")
        document["model"][key] = value
        _tokenizer(folder, document)

    return change


def _twice(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    _tokenizer(folder, text.replace('"w4": 4', '"w3": 4'))


def _same_id(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    _tokenizer(folder, text.replace('"w4": 4', '"w4": 3'))


@pytest.mark.parametrize(
    ("change", "keys", "lines"),
    [
        (lambda one: (one / "tokenizer.json").unlink(), {}, ["ONE: it has no tokenizer (tokenizer.json)"]),
        (lambda one: _tokenizer(one, "{"), {}, ["ONE/tokenizer.json: a malformed tokenizer: "]),
        (lambda one: _tokenizer(one, []), {}, ["ONE/tokenizer.json: a malformed tokenizer: it holds []"]),
        (_edit("vocab", {"a": "b"}), {}, ["a malformed tokenizer: the id of"]),
        (_edit("merges", [["a"]]), {}, ["is no merge of two tokens"]),
        (_edit("type", "Magic"), {}, ["its model is of the type"]),
        (_edit("vocab", {"w3": 3, "w4": 10**6}), {}, ["7 tokens have ids up to 1,000,000"]),
        (_twice, {}, ["the key 'w3' occurs twice"]),
        (_same_id, {}, ['tokens with the same id: "w3" and "w4"']),
        (
            lambda one: _tokenizer(one, tokenizer_json(words(22), kind="Unigram")),
            {},
            ["of different kinds, BPE and Unigram"],
        ),
        (
            lambda one: _tokenizer(one, tokenizer_json([*SPECIAL, *(f"v{i}" for i in range(19))])),
            {},
            ["share only 3 of 20 tokens"],
        ),
        (
            None,
            {
                "tokens": {
                    "<n>": {},
                    "w3": {"force": True},
                    "w4": {"source": "elsewhere"},
                    "w5": {"source": {"kind": "model_token", "model": "ONE", "token": "<none>"}},
                    "w6": {"source": {"kind": "model_token", "model": "ONE", "token_id": 99}},
                    "<a>": {"source": "TWO"},
                }
            },
            [
                "tokenizer.tokens.w3: force needs a source",
                "tokenizer.tokens.w4: elsewhere is not merged here",
                'tokenizer.tokens.w5: ONE has no token "<none>"',
                "tokenizer.tokens.w6: ONE has 22 rows, so token_id 99 has none",
                'tokenizer.tokens.<a>: TWO has no token "<a>"',
            ],
        ),
        (None, {"tokens": {"<n>": {}}}, ['has no row in any input for 1 token: "<n>"']),
        (None, {"source": "./nowhere"}, ["nowhere: there is no such folder or file"]),
    ],
)
def test_bad_input_is_one_line_each(
    three: tuple[Path, Path, Path],
    tmp_path: Path,
    change: Callable[[Path], None] | None,
    keys: dict[str, Any],
    lines: list[str],
) -> None:
    base, one, two = three
    if change is not None:
        change(one)
    named = json.loads(json.dumps(keys).replace("ONE", str(one)).replace("TWO", str(two)))
    with pytest.raises(me.PlanError) as caught:
        me.run(recipe("task_arithmetic", base, [one, two], tokenizer=named), tmp_path / "out")
    assert len(caught.value.problems) == len(lines), caught.value.problems
    for problem, line in zip(caught.value.problems, lines, strict=True):
        assert line.replace("ONE", str(one)).replace("TWO", str(two)) in problem
    assert not (tmp_path / "out").exists()


def test_tensors_whose_rows_cannot_be_decided_are_refused(
    three: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, two = three
    for folder in three:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.token_scale"] = torch.ones(len(tensors[EMBEDDING]), dtype=torch.bfloat16)
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(me.PlanError) as caught:
        me.run(recipe("linear", base, [one, two], tokenizer_source="union"), tmp_path / "out")
    assert any("model.token_scale: as many rows as the vocabulary" in line for line in caught.value.problems)


def test_nothing_is_imported_without_these_keys() -> None:
    import subprocess
    import sys

    code = "import sys, merge_engine; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_an_extended_language_is_cut_as_before(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real Tamil, with small tokenizers; docs/vocabularies.md has the figures of larger ones."""
    from examples.vocabularies import segmentation

    monkeypatch.setattr(segmentation, "ENGLISH", 400)
    monkeypatch.setattr(segmentation, "TAMIL", 350)
    texts = {
        part: {name: list(found)[:80] for name, found in of_part.items()}
        for part, of_part in segmentation.load_texts().items()
    }
    alone, english, *both = segmentation.rows_of_table(kind, texts, tmp_path)
    tokens = [float(cell) for cell in alone.split(" | ")[3:6]]
    assert tokens[1] == tokens[2] and (tokens[2] < tokens[0] or kind == "Unigram")
    assert alone.split(" | ")[6] == "100.0%"
    assert float(english.split(" | ")[6].rstrip("%")) > 95
    for line in (alone, *both[:2]):  # more words than with added tokens
        *_, merged, _, others = line.removesuffix(" |").split(" | ")
        assert float(merged.rstrip("%")) > 2 * float(others.rstrip("%"))


_JUNK = [
    None,
    True,
    -1,
    10**30,
    2**40,
    1.5,
    "x",
    "",
    [],
    {},
    [[]],
    {"a": {}},
    ["a", "b"],
    [["a", 1], ["a", 2]],
]


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(inner for key, one in items for inner in _places(one, (*place, key)))]


@settings(max_examples=80)
@given(data=st.data(), kind=st.sampled_from(["BPE", "Unigram", "WordPiece", "WordLevel"]))
def test_a_hostile_tokenizer_is_an_error_or_merged(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    made = tokenizer_json([*words(8), "ab"], ["<x>"], kind=kind, merges=["w3 w4"] if kind == "BPE" else ())
    base = save_llama(folder / "base", tokenizer_json(words(8), kind=kind), seed=1)
    one = save_llama(folder / "one", made, seed=2)
    files = {
        "tokenizer.json": made,
        "tokenizer_config.json": {
            **settings_of(one, "tokenizer_config.json"),
            "added_tokens_decoder": {"9": {"content": "<x>", "special": False}},
        },
    }
    name = data.draw(st.sampled_from(sorted(files)))
    *way, last = data.draw(st.sampled_from(_places(files[name])[1:]))
    inner: Any = files[name]
    for step in way:
        inner = inner[step]
    inner[last] = data.draw(st.sampled_from(_JUNK))
    for each, document in files.items():
        (one / each).write_text(json.dumps(document))
    with contextlib.suppress(me.MergeError):
        source = data.draw(st.sampled_from(["union", "base", str(one)]))
        me.plan(recipe("linear", base, [base, one], tokenizer_source=source), folder / "out")
