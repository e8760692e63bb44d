"""Configs, templates and settings of generation that differ: refused, warned of, or silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from families import GENERATION, LLAMA, QWEN, TOKENIZER_CONFIG, changed, save_model, state_dict

import merge_engine as me
from merge_engine.planning import MergePlan


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative, so that messages show them as they are."""
    monkeypatch.chdir(tmp_path)


def plan(base: Path, *models: Path, method: str = "task_arithmetic", **keys: Any) -> MergePlan:
    return me.plan(
        {
            "merge_method": method,
            "base_model": str(base),
            "models": [{"model": str(model)} for model in models],
            "parameters": {"weight": 1.0},
            **keys,
        }
    )


def said(base: Mapping[str, Any], tuned: Mapping[str, Any], folder: Path, **keys: Any) -> list[str]:
    """The warnings for a base and a model with these configs, without the names of their folders."""
    shutil.rmtree(folder, ignore_errors=True)
    pair = save_model(folder / "base", 0, base), save_model(folder / "tuned", 1, tuned)
    return [line.replace(f"{folder}/", "") for line in plan(*pair, **keys).warnings]


LLAMA_INSTRUCT = {
    "config__json": changed(LLAMA, eos_token_id=[128001, 128008, 128009], transformers_version="4.42.3"),
    "generation_config__json": changed(GENERATION, eos_token_id=[128001, 128008, 128009]),
    "tokenizer_config__json": changed(
        TOKENIZER_CONFIG, eos_token="<|eot_id|>", chat_template="{{ messages }}"
    ),
}
QWEN_BASE = {
    "config__json": QWEN,
    "generation_config__json": {"do_sample": False, "eos_token_id": 151643, "max_new_tokens": 2048},
    "tokenizer_config__json": {"eos_token": "<|endoftext|>", "bos_token": None, "chat_template": "A"},
}
QWEN_INSTRUCT = {
    "config__json": changed(QWEN, "use_mrope", eos_token_id=151645, max_position_embeddings=32768),
    "generation_config__json": {"do_sample": True, "eos_token_id": [151645, 151643], "temperature": 0.7},
    "tokenizer_config__json": {"eos_token": "<|im_end|>", "bos_token": None, "chat_template": "B"},
}


@pytest.mark.parametrize("files", [{}, QWEN_BASE])
def test_a_healthy_family_gives_no_warnings(files: dict[str, Any]) -> None:
    """Tunes that were saved with another version of transformers, and a pad token for training."""
    base = save_model(Path("base"), 0, **files)
    config = json.loads((base / "config.json").read_text())
    tuned = changed(
        config,
        "pretraining_tp",
        "sliding_window",
        _name_or_path="org/base",
        transformers_version="4.51.3",
        torch_dtype="float32",
        use_cache=False,
        pad_token_id=0,
        head_dim=8,
        max_window_layers=2,
    )
    tokens = json.loads((base / "tokenizer_config.json").read_text())
    tokens |= {"pad_token": "<|end_of_text|>", "padding_side": "right"}
    models = [
        save_model(Path(f"m{i}"), i, **(files | {"config__json": tuned, "tokenizer_config__json": tokens}))
        for i in (1, 2)
    ]
    planned = plan(base, *models)
    assert planned.warnings == ()
    assert planned.notes == ()


def test_a_llama_family_with_instruct_models() -> None:
    base = save_model(Path("base"), 0)
    models = [save_model(Path(name), i, **LLAMA_INSTRUCT) for i, name in enumerate(("chat", "code"), 1)]
    assert list(plan(base, *models).warnings) == [
        "chat template: in chat, code, but not in base, so the output has none; to change that, set "
        "chat_template, or copy tokenizer_config.json from chat into the output",
        "eos_token_id: [128001] in base, [128001, 128008, 128009] in chat, code; the output stops where base does, "
        "and may run on after an answer; to change that, copy generation_config.json from chat into the output",
    ]


def test_a_qwen_family_with_an_instruct_model() -> None:
    pair = save_model(Path("base"), 0, **QWEN_BASE), save_model(Path("chat"), 1, **QWEN_INSTRUCT)
    first = [line.partition(":")[0] for line in plan(*pair).warnings]
    assert first == ["config.json", "chat template", "eos_token_id", "generation_config.json"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mistral"),
        ("hidden_size", 32),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 1),
        ("intermediate_size", 64),
        ("attention_bias", True),
    ],
)
def test_other_architectures_are_refused_unless_allowed(key: str, value: Any) -> None:
    tuned = changed(LLAMA, **{key: value})
    with pytest.raises(me.PlanError) as caught:
        said(LLAMA, tuned, Path("a"))
    [line] = caught.value.problems
    assert f"{key} is {json.dumps(LLAMA[key])} in" in line and json.dumps(value) in line
    assert line.endswith('; if this is meant, add "allow: [architecture]" to the recipe')
    [allowed] = said(LLAMA, tuned, Path("b"), allow=["architecture"])
    assert allowed == line.replace("a/", "").partition("; if this is meant")[0]


def test_one_line_for_models_that_differ_in_everything() -> None:
    base = save_model(Path("base"), 0)
    tensors = {f"transformer.{name}": tensor[:8] for name, tensor in state_dict(1).items()}
    config = changed(QWEN, hidden_size=8, num_attention_heads=1, num_key_value_heads=1)
    models = [save_model(Path(f"m{i}"), i, config, tensors=tensors, tokenizer__json=None) for i in (1, 2)]
    with pytest.raises(me.PlanError) as caught:
        plan(base, *models)
    [line] = caught.value.problems
    assert 'model_type is "llama" in' in line and "also different: num_key_value_heads" in line


def test_a_nested_config_is_compared() -> None:
    def nested(**text: Any) -> dict[str, Any]:
        return {"model_type": "vlm", "text_config": changed(LLAMA, **text)}

    assert said(nested(), nested(rope_theta=10000.0), Path("a")) == [
        "config.json: text_config.rope_theta is 500000.0 in base, 10000.0 in tuned; the output gets 500000.0"
    ]
    with pytest.raises(me.PlanError, match=r"text_config\.num_key_value_heads is 2 in"):
        said(nested(), nested(num_key_value_heads=1), Path("b"))


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("architectures", ["LlamaModel"], '["LlamaModel"]'),
        ("rope_theta", 10000.0, "10000.0"),
        ("rope_scaling", None, "none"),
        ("rms_norm_eps", 1e-6, "1e-06"),
        ("max_position_embeddings", 4096, "4096"),
        ("sliding_window", 4096, "4096"),
        ("hidden_act", "gelu", '"gelu"'),
        ("vocab_size", 80, "80"),
        ("tie_word_embeddings", True, "true"),
    ],
)
def test_other_computations_are_warned_of(key: str, value: Any, shown: str) -> None:
    lines = said(LLAMA, changed(LLAMA, **{key: value}), Path("a"))
    [line] = [line for line in lines if line.startswith("config.json")]
    assert line.startswith(f"config.json: {key} is ") and f"{shown} in tuned" in line


def test_a_key_that_is_missing_has_its_default() -> None:
    old = changed(LLAMA, "rope_theta", "rope_scaling", "attention_bias")
    assert said(old, changed(old, rope_theta=10000.0, attention_bias=False), Path("a")) == []
    [line] = said(old, changed(old, rope_theta=1e6), Path("a"))
    assert line == "config.json: rope_theta is 10000.0 in base, 1000000.0 in tuned; the output gets 10000.0"


def test_rope_is_the_same_in_old_and_new_configs() -> None:
    scaling = dict(LLAMA["rope_scaling"])
    new = changed(LLAMA, "rope_theta", "rope_scaling", rope_parameters={**scaling, "rope_theta": 500000.0})
    assert said(LLAMA, new, Path("a")) == []
    old = changed(LLAMA, rope_scaling={"type": "linear", "factor": 2.0})
    both = changed(LLAMA, rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2.0})
    assert said(old, both, Path("a")) == []
    plain = changed(LLAMA, "rope_scaling")
    default = changed(plain, "rope_theta", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert said(plain, default, Path("a")) == []


def test_a_vision_model_is_the_same_with_and_without_a_section_for_its_language_model() -> None:
    flat = changed(QWEN, model_type="qwen2_vl", vision_config={"depth": 2}, tie_word_embeddings=False)
    text = changed(QWEN, "architectures", "tie_word_embeddings", model_type="qwen2_vl_text")
    top = {key: flat[key] for key in ("model_type", "architectures", "vision_config", "tie_word_embeddings")}
    assert said(flat, {**top, "text_config": text}, Path("a")) == []
    assert said({**top, "text_config": text}, flat, Path("b")) == []
    [line] = said(flat, {**top, "text_config": changed(text, rope_theta=1.0)}, Path("c"))
    assert line == "config.json: rope_theta is 1000000.0 in base, 1.0 in tuned; the output gets 1000000.0"


def test_null_is_a_value_where_it_switches_off() -> None:
    capped = changed(LLAMA, final_logit_softcapping=30.0)
    [line] = said(capped, changed(LLAMA, final_logit_softcapping=None), Path("a"))
    assert line == "config.json: final_logit_softcapping is 30.0 in base, none in tuned; the output gets 30.0"
    assert said(capped, LLAMA, Path("b")) == []  # older configs do not state the default


def test_unknown_keys_give_one_line() -> None:
    one = changed(LLAMA, **{f"key{i}": i for i in range(9)})
    other = changed(LLAMA, **{f"key{i}": -1 for i in range(9)}, only_here=1)
    assert said(one, other, Path("a")) == [
        "config.json: other keys differ: key0, key1, key2, key3, key4 and 4 more; the output gets those of base"
    ]


def test_layers_in_the_config_but_not_in_the_tensors() -> None:
    with pytest.raises(me.PlanError, match=r"num_hidden_layers is 2 in .*allow: \[layers\]"):
        said(LLAMA, changed(LLAMA, num_hidden_layers=4), Path("a"))
    assert len(said(LLAMA, changed(LLAMA, num_hidden_layers=4), Path("a"), allow=["layers"])) == 1


def test_a_donor_without_config_and_tokenizer() -> None:
    bare = save_model(
        Path("bare"),
        0,
        None,
        tokenizer__json=None,
        tokenizer_config__json=None,
        generation_config__json=None,
    )
    lines = plan(bare, save_model(Path("tuned"), 1)).warnings
    assert f"{bare}: it has no config.json, so the output has none; copy that of tuned" in lines
    assert f"{bare}: it has no tokenizer, so the output has none; copy that of tuned" in lines
    assert plan(Path("tuned"), bare).warnings == ()


def test_types_that_are_promoted_to_a_larger_one() -> None:
    base = save_model(Path("base"), 0)
    halves = {name: tensor.half() for name, tensor in state_dict(1).items()}
    tuned = save_model(Path("tuned"), 1, tensors=halves)
    [line] = plan(base, tuned).warnings
    assert "bfloat16 in" in line and "so the output is float32" in line
    assert plan(base, tuned, dtype="bfloat16").warnings == ()
    floats = {name: tensor.float() for name, tensor in state_dict(1).items()}
    assert plan(base, save_model(Path("float"), 1, tensors=floats)).warnings == ()


def test_templates_are_found_where_transformers_finds_them() -> None:
    base = save_model(Path("base"), 0)
    places = {
        "chat_template__jinja": "{{ messages }}",
        "chat_template__json": {"chat_template": "{{ messages }}"},
        "tokenizer_config__json": changed(
            TOKENIZER_CONFIG, chat_template=[{"name": "default", "template": "x"}]
        ),
    }
    for name, content in places.items():
        tuned = save_model(Path(name), 1, **{name: content})
        [line] = plan(base, tuned).warnings
        assert line.startswith("chat template: in ") and f"copy {name.replace('__', '.')} from" in line
        assert plan(tuned, base).warnings == ()  # then the donor has it
    alike = [save_model(Path(f"m{i}"), i, chat_template__jinja="{{ x }}" + "\n" * i) for i in (1, 2)]
    assert plan(*alike).warnings == ()


def test_special_tokens_and_settings_of_generation() -> None:
    base = save_model(Path("base"), 0)
    tokens = changed(TOKENIZER_CONFIG, bos_token={"content": "<s>", "lstrip": False}, pad_token="x")
    tuned = save_model(
        Path("tuned"),
        1,
        tokenizer_config__json=tokens,
        generation_config__json=changed(GENERATION, temperature=0.7),
    )
    first, second = plan(base, tuned).warnings
    assert 'tokenizer_config.json: bos_token is "<|begin_of_text|>" in' in first and '"<s>" in' in first
    silent = {"use_cache": True, "output_attentions": False, "top_k": 50, "num_beams": 1}
    other = save_model(Path("silent"), 1, generation_config__json=changed(GENERATION, **silent))
    assert plan(base, other).warnings == ()
    assert second.endswith(f"other settings in {tuned}: temperature 0.7; the output gets those of {base}")


def test_files_that_cannot_be_read_are_named_and_pass() -> None:
    base = save_model(Path("base"), 0)
    tuned = save_model(Path("tuned"), 1, tokenizer_config__json="{", generation_config__json="[]")
    lines = plan(base, tuned).warnings
    assert len(lines) == 2
    assert all(line.endswith("not compared with the other models") for line in lines)


def test_a_long_path_shows_the_part_that_differs() -> None:
    deep = Path("long-" * 10) / "runs"
    base = save_model(deep / "base" / "final", 0)
    tuned = save_model(deep / "tuned" / "final", 1, changed(LLAMA, rope_theta=1.0))
    [line] = plan(base, tuned).warnings
    assert line == (
        "config.json: rope_theta is 500000.0 in base/final, 1.0 in tuned/final; the output gets 500000.0"
    )


def test_what_a_config_holds_is_printable_in_messages() -> None:
    [line] = said(LLAMA, changed(LLAMA, hidden_act="a\u202e\x9b\n"), Path("a"))
    assert line.isprintable()


def test_warnings_are_in_manifest_and_card() -> None:
    base = save_model(Path("base"), 0)
    tuned = save_model(Path("tuned"), 1, changed(LLAMA, rope_theta=1.0))
    planned = plan(base, tuned)
    result = me.run(planned, Path("out"))
    assert result.warnings == list(planned.warnings)
    manifest = json.loads((Path("out") / "merge_manifest.json").read_text())
    assert manifest["warnings"] == result.warnings
    assert result.warnings[0] in (Path("out") / "README.md").read_text()


def test_linear_says_what_it_takes_from_a_base() -> None:
    base = save_model(Path("base"), 0)
    models = [save_model(Path(f"m{i}"), i) for i in (1, 2)]
    assert plan(base, *models, method="linear").notes == (
        "linear takes only config and tokenizer from base_model",
    )
