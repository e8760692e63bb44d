"""Adapters named as models are refused, with their base and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_model, state_dict
from safetensors.torch import save_file
from test_fit_configs import plan

import merge_engine as me

REMEDY = "merge it into its base first (PEFT: merge_and_unload) and name the result"
PUT_IN = 'name it behind its model, as "model: model+adapter"'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative, so that messages show them as they are."""
    monkeypatch.chdir(tmp_path)


def factors(style: str = "lora_{}.weight", names: str = "AB") -> dict[str, torch.Tensor]:
    made = {}
    for i in range(2):
        for one, shape in zip(names.split() if " " in names else names, ((4, 16), (16, 4)), strict=True):
            made[f"base_model.model.model.layers.{i}.self_attn.q_proj.{style.format(one)}"] = torch.ones(
                shape
            )
    return made


def save_adapter(
    name: str, tensors: dict[str, torch.Tensor] | None = None, suffix: str = "safetensors", **settings: Any
) -> Path:
    folder = Path(name)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4} | settings))
    if suffix == "bin":
        torch.save(tensors or factors(), folder / "adapter_model.bin")
    else:
        save_file(tensors or factors(), folder / "adapter_model.safetensors")
    return folder


def problems(*models: Path, method: str = "linear") -> list[str]:
    with pytest.raises(me.PlanError) as caught:
        me.plan(
            {
                "merge_method": method,
                "models": [{"model": str(model)} for model in models],
                "parameters": {"weight": 1.0},
            }
        )
    return caught.value.problems


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_adapters_of_one_base_share_a_line(suffix: str) -> None:
    models = [save_adapter(name, suffix=suffix, base_model_name_or_path="org/base") for name in "ab"]
    assert problems(*models) == [f"a, b: a LoRA adapter of org/base, no whole model; {PUT_IN}"]


def test_a_base_and_an_adapter() -> None:
    base, adapter = save_model(Path("base"), 0), save_adapter("adapter")
    line = f"adapter: a LoRA adapter, no whole model; {PUT_IN}"
    assert problems(base, adapter) == [line]
    with pytest.raises(me.PlanError) as caught:
        plan(base, adapter)
    assert caught.value.problems == [line]


@pytest.mark.parametrize(
    ("style", "names"),
    [
        ("lora_{}.default.weight", "AB"),
        ("lora_embedding_{}", "AB"),
        ("lora_{}.weight", "down up"),
        ("hada_{}", "w1_a w1_b"),
        ("lokr_{}", "w1 w2_a"),
    ],
)
def test_a_file_with_factors_is_an_adapter_whatever_its_name(style: str, names: str) -> None:
    Path("a").mkdir()
    save_file(factors(style, names), "a/model.safetensors")
    assert problems(Path("a")) == [f"a: a LoRA adapter, no whole model; {PUT_IN}"]


def test_an_adapter_of_another_kind() -> None:
    adapter = save_adapter("a", {"ia3_l.weight": torch.ones(4)}, peft_type="IA3")
    assert problems(adapter) == [f"a: a IA3 adapter, no whole model; {REMEDY}"]


@pytest.mark.parametrize(
    "end", ["ia3_l", "vera_lambda_b", "oft_r.default.weight", "boft_R", "prompt_embeddings", "lora_E"]
)
def test_factors_of_other_kinds_are_known_without_settings(end: str) -> None:
    Path("a").mkdir()
    save_file({f"layers.{i}.q_proj.{end}": torch.ones(4) for i in range(2)}, "a/model.safetensors")
    [line] = problems(Path("a"))
    if "lora" in end:
        assert line == f"a: a LoRA adapter, no whole model; {PUT_IN}"
    else:
        assert line == f"a: an adapter, no whole model; {REMEDY}"


def test_a_model_with_factors_that_are_not_merged_into_it() -> None:
    model = save_model(Path("a"), 0, tensors=state_dict(0) | factors())
    [line] = problems(model)
    assert line.startswith("a: holds the factors of a LoRA adapter that is not merged into the weights")


def test_whole_weights_beside_an_adapter_config_are_a_model() -> None:
    models = [
        save_model(Path(name), i, adapter_config__json={"peft_type": "LORA"}) for i, name in enumerate("ab")
    ]
    assert plan(*models).warnings == ()
