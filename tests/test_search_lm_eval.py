"""lm-evaluation-harness as a scorer: a task of our own on a small Llama, whose score is the one that was planted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is in the extra lm-eval only")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import merge_engine as me

TASK = """\
task: second_letter
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "letter:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose hidden states are all ones, and two fine-tunes whose heads prefer b and c."""
    root = tmp_path_factory.mktemp("models")
    letters = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz: "]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), max_position_embeddings=64, **sizes))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        for name in ("base", "b", "c"):
            model.lm_head.weight.zero_()
            if name in vocabulary:
                model.lm_head.weight[vocabulary[name]] = 1
            model.save_pretrained(root / name)
            fast.save_pretrained(root / name)
    items = [{"choices": list("abcd"), "label": 1} for _ in range(8)]
    (root / "items.json").write_text("\n".join(map(json.dumps, items)))
    (root / "second_letter.yaml").write_text(TASK.format(items=root / "items.json"))
    return root


def test_a_search_finds_the_weights_with_which_the_right_letter_wins(folder: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in "bc"],
    }
    tasks = ["second_letter"]
    scorer = me.LmEval(tasks, folder / "base", include_path=folder, limit=4, device="cpu")
    with me.load(recipe | {"parameters": {}}, device="cpu") as session:
        found = me.search(session, scorer, {"weight[1]": (0.1, 0.9)}, trials=6, directions=scorer.directions)
    assert scorer.directions == {"second_letter": "maximize"}
    for trial in found.trials[1:]:
        weight = trial.values["weight[1]"]
        assert trial.scores == (float(weight < 0.5),) and trial.errors == (0.0,)  # type: ignore[operator]
    assert {trial.scores for trial in found.trials[1:]} == {(0.0,), (1.0,)}


def test_tasks_and_metrics_that_do_not_exist(folder: Path) -> None:
    for task, said in (
        ("no_such_task", "has no task no_such_task"),
        ("second_letter:f1", 'has no metric "f1"'),
    ):
        with pytest.raises(me.OptionError, match=said):
            me.LmEval([task], folder / "base", include_path=folder)
