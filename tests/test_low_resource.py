"""The low-resource example: no leaks in its data, its shipped models, its counts, and its errors."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import merge_engine as me
from examples.low_resource import settings, tables
from examples.low_resource.errors import ExampleError, told
from examples.low_resource.evaluate import likelihoods, pack
from examples.low_resource.measure import measure
from examples.low_resource.merging import SFT, Variant, recipe_for
from examples.low_resource.split import Pair, same, split_pairs
from examples.low_resource.tasks import held_out_items, sentences, training_items
from examples.low_resource.text import documents, load_text
from examples.low_resource.tokenizer import encode
from examples.low_resource.training import END_ID, MARKER, finished

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes' paths begin there."""
    monkeypatch.chdir(ROOT)


def texts(part: str, language: int) -> set[str]:
    return {same(pair[language]) for pair in load_text(part).pairs}


def test_no_text_is_in_both_parts_in_either_language() -> None:
    for language in (0, 1):
        assert not texts("train", language) & texts("held_out", language)
    held_out = {same(text) for text in load_text("held_out").english} | texts("held_out", 0)
    assert not held_out & {same(text) for text in load_text("train").english}


def test_every_text_occurs_once() -> None:
    for language in (0, 1):
        found = [same(pair[language]) for part in ("train", "held_out") for pair in load_text(part).pairs]
        assert len(found) == len(set(found))


def test_nothing_that_is_trained_on_holds_a_test_sentence() -> None:
    tested = {same(text) for language in ("english", "tamil") for text in sentences("held_out", language)}
    for kind in ("english", "english_short", "tamil"):
        assert not tested & {same(text) for text in documents(kind)}
    rng = random.Random(0)
    items = training_items(rng)
    prompts = {next(items).prompt for _ in range(2000)}
    assert not prompts & {item.prompt for found in held_out_items().values() for item in found}


def test_what_is_linked_stays_together() -> None:
    chain = [
        Pair(f"word {'abcdefgh'[i]}", f"சொல் {'abcdefgh'[(i + shift) % 8]}")
        for i in range(8)
        for shift in (0, 1)
    ]
    parts = split_pairs({"one": chain[:5], "two": chain[5:]}, 0.5)
    assert not any(found["train"] for found in parts.values()) or not any(
        found["held_out"] for found in parts.values()
    )
    page = [Pair(f"block {'abcdefgh'[i]}", f"பகுதி {'abcdefgh'[i]}", page="a page") for i in range(8)]
    found = split_pairs({"guide": page}, 0.5)["guide"]
    assert sorted(map(len, found.values())) == [0, 8]


def test_items_have_one_right_choice() -> None:
    assert set(held_out_items()) == set(settings.ITEMS)
    for found in held_out_items().values():
        assert len(found) > 100
        for item in found:
            assert len(set(item.choices)) == 4


def test_choices_are_scored_as_if_each_stood_alone() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    items = held_out_items()["tamil", "edge"][:5]
    with torch.inference_mode():
        packed = likelihoods(model, pack(items))
        for row, item in enumerate(items):
            for column, choice in enumerate(item.choices):
                prompt, answer = encode([item.prompt, choice])
                ids = torch.tensor([[END_ID, *prompt, *answer, END_ID]])
                each = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                alone = each[len(prompt) :].sum()
                assert packed[row, column] == pytest.approx(float(alone), rel=1e-3, abs=1e-2)


def counts(variant: Variant, steps: int) -> me.ModelCounts:
    return me.run(recipe_for(variant, settings.MODELS, steps)).counts[SFT]


def test_the_longer_ct_the_more_of_sft_is_lost_and_slack_lowers_it() -> None:
    lost = []
    for steps in settings.SHIPPED_CT:
        plain = counts(Variant("ties"), steps)
        lost.append(plain.lost_share)
        elect = [counts(Variant("ties_elect", slack), steps) for slack in settings.SLACKS["ties_elect"]]
        retain = [counts(Variant("ties_retain", slack), steps) for slack in settings.SLACKS["ties_retain"]]
        for slacked in (elect, retain):
            shares = [plain.lost_share, *(found.lost_share for found in slacked)]
            assert shares == sorted(shares, reverse=True) and shares[-1] < shares[0]
            assert all(found.kept == plain.kept for found in slacked)
            assert all(found.saved_by_sign == plain.lost - found.lost for found in slacked)
    assert lost == sorted(set(lost))


def test_the_shipped_models_load_as_any_checkpoint_does(tmp_path: Path) -> None:
    for name in ("base", "sft", *(f"ct-{steps}" for steps in settings.SHIPPED_CT)):
        assert AutoModelForCausalLM.from_pretrained(settings.MODELS / name).dtype == torch.float16
    me.run(settings.RECIPES / "ties_elect.yaml", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.decode(tokenizer("தமிழ் text")["input_ids"]) == "தமிழ் text"


@pytest.mark.parametrize("recipe", sorted(settings.RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_works_as_it_stands(recipe: Path) -> None:
    me.plan(recipe)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text(json.dumps({"identity": "of other settings"}))
    with pytest.raises(ExampleError, match=r"of another run, .* remove it"):
        finished(tmp_path, "expected")


def test_what_an_interrupted_stage_left_is_made_anew(tmp_path: Path) -> None:
    stage = tmp_path / "base"
    stage.mkdir()
    (stage / "model.safetensors").write_bytes(b"half")
    assert not finished(stage, "expected") and not stage.exists()
    stage.mkdir()
    (stage / "thesis.tex").write_text("dear")
    with pytest.raises(ExampleError, match="no stage wrote"):
        finished(stage, "expected")


def test_a_seed_half_done_is_named(tmp_path: Path) -> None:
    shutil.copytree(settings.MODELS / "base", tmp_path / "base")
    with pytest.raises(ExampleError, match=r"half done, it lacks sft, ct-100; .* goes on"):
        measure(tmp_path, [100], tmp_path / "results.json")


def test_results_of_other_checkpoints_are_refused(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"identity": "another", "rows": []}))
    with pytest.raises(ExampleError, match="remove it to measure anew"):
        measure(settings.MODELS, [100], results)


def test_missing_and_damaged_text_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.low_resource.text.DATA", tmp_path)
    with pytest.raises(ExampleError, match="git checkout"):
        load_text.__wrapped__("train")
    (tmp_path / "libreoffice.json.xz").write_bytes(b"no xz")
    with pytest.raises(ExampleError, match="damaged"):
        load_text.__wrapped__("train")


def test_a_package_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.low_resource import fetch

    package = settings.Package("none", "1", (ROOT / "none.deb").as_uri(), "")
    with pytest.raises(ExampleError, match="cannot be fetched"):
        fetch.download(package)
    with pytest.raises(ExampleError, match="SHA-256 differs"):
        fetch.download(settings.Package("none", "1", (ROOT / "LICENSE").as_uri(), ""))
    with pytest.raises(SystemExit, match=r"^error: [^\n]*$"):
        told(lambda: fetch.download(package) and None)


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    found = tables.made()
    assert all(f"<!-- table {name} -->" in page for name in found)
    assert tables.filled(page, found) == page
