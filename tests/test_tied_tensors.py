"""Tensors that a model uses as one, such as embedding and head, are one tensor of the merge."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import merge_engine as me

EMBEDDING, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
TIED, UNTIED, SILENT = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {}
RANDOM = ("ties", "dare_linear", "dare_ties", "della", "breadcrumbs")
State = dict[str, torch.Tensor]


def model(seed: int, *names: str, rows: int = 40) -> State:
    """A model whose tensors of these names, besides its embedding and another, are copies of the embedding."""
    generator = torch.Generator().manual_seed(seed)
    # Few magnitudes, so that many entries lie at the threshold of a trim and are drawn.
    embedding = torch.randint(-3, 4, (rows, 8), generator=generator).float()
    other = torch.randn(8, 8, generator=generator)
    return {EMBEDDING: embedding, OTHER: other} | {name: embedding.clone() for name in names}


def renamed(state: State, **names: str) -> State:
    return {names.get(name, name): tensor for name, tensor in state.items()}


def save(folder: Path, states: Sequence[State], configs: Sequence[Mapping[str, object]]) -> list[str]:
    paths = []
    for i, (state, config) in enumerate(zip(states, configs, strict=True)):
        path = folder / f"m{i}"
        path.mkdir()
        save_file(state, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"model_type": "test", **config}))
        paths.append(str(path))
    return paths


def merge(
    folder: Path,
    states: Sequence[State],
    configs: Mapping[str, object] | Sequence[Mapping[str, object]] = TIED,
    method: str = "dare_ties",
    **keys: Any,
) -> tuple[State, dict[str, Any], me.MergeResult]:
    """The merged tensors, the config of the output, and the result. The first state is the base."""
    configs = [configs] * len(states) if isinstance(configs, Mapping) else configs
    folder.mkdir(exist_ok=True)
    base, *models = save(folder, states, configs)
    recipe = {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": path} for path in models],
        "parameters": {"weight": 0.6, "density": 0.5},
        **keys,
    }
    result = me.run(recipe, folder / "out", device="cpu")
    return (
        load_file(folder / "out" / "model.safetensors"),
        json.loads((folder / "out" / "config.json").read_text()),
        result,
    )


@settings(max_examples=25)
@given(
    stored=st.tuples(*[st.booleans()] * 3),
    method=st.sampled_from(RANDOM),
    nested=st.booleans(),
)
def test_it_does_not_matter_who_stores_the_copy(stored: tuple[bool, ...], method: str, nested: bool) -> None:
    config = {"text_config": TIED} if nested else TIED
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        heads = [(HEAD,) if there else () for there in stored]
        found, written, _ = merge(
            Path(one), [model(i, *head) for i, head in enumerate(heads)], config, method
        )
        expected, _, _ = merge(Path(other), [model(i) for i in range(3)], config, method)
    assert found.keys() == expected.keys() == {EMBEDDING, OTHER}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert written.get("text_config", written)["tie_word_embeddings"] is True


def test_a_copy_that_is_not_written_is_noted_once(tmp_path: Path) -> None:
    _, _, result = merge(tmp_path, [model(0), model(1, HEAD), model(2, HEAD)])
    assert result.notes == [f"the same tensor in all inputs, so written once: {HEAD} as {EMBEDDING}"]


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("config", (SILENT, UNTIED))
def test_copies_in_all_inputs_stay_copies(tmp_path: Path, method: str, config: dict[str, object]) -> None:
    """No config ties them, so that both are written: with the same bytes."""
    found, written, _ = merge(tmp_path, [model(i, HEAD) for i in range(3)], config, method)
    assert torch.equal(found[HEAD], found[EMBEDDING])
    assert {key: written[key] for key in written if key == "tie_word_embeddings"} == config


@pytest.mark.parametrize("method", RANDOM)
def test_copies_in_memory_stay_copies(method: str) -> None:
    base, *models = (model(i, HEAD) for i in range(3))
    merged = me.merge_state_dicts(base, models, method, density=0.5)
    assert torch.equal(merged[HEAD], merged[EMBEDDING])


def test_a_head_that_differs_late_is_a_head_of_its_own(tmp_path: Path) -> None:
    """Also where it differs in one element among a million."""
    states = [model(i, HEAD, rows=140_000) for i in range(3)]
    states[2][HEAD][-1000, 3] += 1
    found, _, _ = merge(tmp_path, states, SILENT, "task_arithmetic")
    unequal = found[HEAD] != found[EMBEDDING]
    assert unequal.sum() == 1 and bool(unequal[-1000, 3])


def test_a_head_that_the_config_ties_away_is_not_used(tmp_path: Path) -> None:
    states = [model(0), model(1), model(2, HEAD)]
    expected, _, _ = merge(tmp_path / "a", states)
    states[2][HEAD] += 1
    found, written, result = merge(tmp_path / "b", states)
    assert found.keys() == expected.keys() and torch.equal(found[EMBEDDING], expected[EMBEDDING])
    assert written["tie_word_embeddings"] is True
    assert len(result.warnings) == 1
    assert f"{tmp_path}/b/m2: its config ties {HEAD} to {EMBEDDING}" in result.warnings[0]


@pytest.mark.parametrize("levels", (("top",), ("text_config",), ("top", "text_config")))
def test_a_model_with_a_head_of_its_own_unties_the_output_at_all_levels(
    tmp_path: Path, levels: tuple[str, ...]
) -> None:
    tied: dict[str, Any] = {"text_config": {"n": 1}} if "text_config" in levels else {}
    if "text_config" in levels:
        tied["text_config"] |= TIED
    if "top" in levels:
        tied |= TIED
    base, first, second = model(0), model(1, HEAD), model(2, HEAD)
    second[HEAD] = second[HEAD] + 1
    found, written, _ = merge(tmp_path, [base, first, second], [tied, tied, UNTIED], "task_arithmetic")
    expected = base[EMBEDDING] + sum(
        0.6 * (state[name] - base[EMBEDDING]) for state, name in ((first, EMBEDDING), (second, HEAD))
    )
    assert torch.allclose(found[HEAD], expected, atol=1e-5)
    assert written["tie_word_embeddings"] is False
    assert written.get("text_config", {}).get("tie_word_embeddings", False) is False


@pytest.mark.parametrize("top", (True, False))
def test_flags_that_disagree_tie_and_agree_in_the_output(tmp_path: Path, top: bool) -> None:
    """transformers ties if one level says so."""
    config = {"tie_word_embeddings": top, "text_config": {"tie_word_embeddings": not top}}
    found, written, _ = merge(tmp_path, [model(i, HEAD) for i in range(3)], config)
    assert HEAD not in found
    assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is True


SHARED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("prefix", ("", "model."))
@pytest.mark.parametrize("method", RANDOM)
def test_the_embedding_of_encoder_and_decoder(tmp_path: Path, prefix: str, method: str) -> None:
    """T5 and BART: all inputs store all copies, or only some do."""
    names = [f"{prefix}{name}" if name != HEAD else name for name in SHARED]
    states = [renamed(model(i, *names[1:]), **{EMBEDDING: names[0]}) for i in range(3)]
    found, _, _ = merge(tmp_path / "all", states, SILENT, method)
    assert all(torch.equal(found[name], found[names[0]]) for name in names)
    for name in names[1:]:
        del states[0][name]
    del states[1][names[2]]
    once, _, result = merge(tmp_path / "some", states, SILENT, method)
    assert once.keys() == {names[0], OTHER}
    assert torch.equal(once[names[0]], found[names[0]])
    assert len(result.notes) == 1


@pytest.mark.parametrize(
    ("embedding", "head"),
    (
        ("transformer.wte.weight", "lm_head.weight"),
        ("wte.weight", "lm_head.weight"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
        ("model.decoder.embed_tokens.weight", "proj_out.weight"),
        ("backbone.embeddings.weight", "lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("thinker.model.embed_tokens.weight", "thinker.lm_head.weight"),
    ),
)
def test_heads_of_many_architectures(tmp_path: Path, embedding: str, head: str) -> None:
    states = [renamed(model(i, *[head] * (i == 2)), **{EMBEDDING: embedding}) for i in range(3)]
    for state in states:  # an embedding of something else does not matter
        state["talker.model.embed_tokens.weight"] = torch.ones(3, 8)
    found, _, _ = merge(tmp_path, states)
    assert found.keys() == {embedding, OTHER, "talker.model.embed_tokens.weight"}


def test_a_bias_under_two_names(tmp_path: Path) -> None:
    bias, twin = "cls.predictions.bias", "cls.predictions.decoder.bias"
    states = [model(i) for i in range(3)]
    for i, state in enumerate(states):
        state[bias] = torch.full((64,), float(i))
        state[twin] = state[bias].clone()
    found, _, _ = merge(tmp_path, states)
    assert torch.equal(found[bias], found[twin])


def test_a_matrix_of_another_shape_is_no_head(tmp_path: Path) -> None:
    """A reward model keeps the name lm_head for one row."""
    states = [model(i) for i in range(3)]
    for state in states:
        state[HEAD] = torch.ones(1, 8)
    found, _, result = merge(tmp_path, states)
    assert found[HEAD].shape == (1, 8) and result.warnings == []
