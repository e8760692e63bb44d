"""Merges of models with LoRA adapters: the bytes of a merge of the models that the adapters make."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TOKENIZER, changed, save_model, state_dict
from lora import MODULES, PREFIX, factors, save_adapter
from safetensors.torch import load_file, save_file
from test_low_rank import formula
from test_over_link import Linked

import merge_engine as me
from merge_engine.engine.records import plan_key
from merge_engine.inspect.diff import diff
from merge_engine.inspect.verify import verify
from merge_engine.report import write_report

SCALE = 8 / 4


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative, so that messages show them as they are."""
    monkeypatch.chdir(tmp_path)


def put_in(
    state: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], scale: float = SCALE
) -> dict[str, torch.Tensor]:
    """The tensors of a model with an adapter, by the formula."""
    done = dict(state)
    for module in MODULES:
        a, b = (adapter[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        done[f"{module}.weight"] = formula(state[f"{module}.weight"], a, b, scale)
    return done


def passthrough(model: str, **keys: Any) -> dict[str, torch.Tensor]:
    tensors = me.run(
        {"merge_method": "passthrough", "models": [{"model": model}], **keys}, device="cpu"
    ).tensors
    assert tensors is not None
    return tensors


def assert_same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> None:
    assert found is not None and found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["{module}.lora_{side}.weight", "{module}.lora_{side}.default.weight"])
def test_into_its_model(name: str, suffix: str) -> None:
    save_model(Path("base"), 0)
    save_adapter("lora", factors(name=name))
    if suffix == "bin":
        weights = Path("lora/adapter_model.safetensors")
        torch.save(load_file(weights), "lora/adapter_model.bin")
        weights.unlink()
    assert_same(passthrough("base+lora"), put_in(state_dict(0), factors()))


def test_a_folder_of_a_trainer_has_more_files() -> None:
    """Its optimizer is no part of the adapter, and a whole model beside it is not the adapter."""
    save_model(Path("base"), 0)
    save_adapter("run/checkpoint-500")
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
        Path("run/checkpoint-500", name).write_bytes(b"x")
    save_file({"w": torch.ones(2)}, "run/checkpoint-500/model.safetensors")
    assert_same(passthrough("base+run/checkpoint-500"), put_in(state_dict(0), factors()))


def models(folder: str = ".") -> dict[str, dict[str, torch.Tensor]]:
    """A base with an adapter of its own, and two models of which one has an adapter; also whole, as expected."""
    states = {name: state_dict(seed) for seed, name in enumerate(("base", "one", "two"))}
    for seed, (name, state) in enumerate(states.items()):
        save_model(Path(folder, name), seed, tensors=state)
    for seed, name in enumerate(("of-base", "of-two")):
        save_adapter(Path(folder, name), factors(seed=seed))
    whole = {
        "whole-base": put_in(states["base"], factors(seed=0)),
        "one": states["one"],
        "whole-two": put_in(states["two"], factors(seed=1)),
    }
    for name, state in whole.items():
        if name.startswith("whole"):
            save_model(Path(folder, name), 0, tensors=state)
    return whole


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.7},
    "ties": {"density": 0.4, "weight": 0.5, "trim_scope": "model"},
    "della": {"density": 0.5, "epsilon": 0.2, "weight": 0.5},
}


def recipe(method: str, base: str, *given: str, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": model} for model in given],
        "parameters": METHODS[method],
        **keys,
    }


@pytest.mark.parametrize("method", METHODS)
def test_merged_as_the_whole_models_are(method: str) -> None:
    models()
    expected = me.run(recipe(method, "whole-base", "one", "whole-two"), device="cpu").tensors
    assert expected is not None
    with_adapters = recipe(method, "base+of-base", "one", "two+of-two")
    assert_same(me.run(with_adapters, device="cpu").tensors, expected)
    assert_same(me.run(with_adapters, backend=Linked()).tensors, expected)
    me.run(with_adapters, "out", device="cpu", memory=200_000)
    assert_same(load_file("out/model.safetensors"), expected)


@pytest.mark.parametrize("linked", [False, True])
def test_large_tensors_in_little_memory(linked: bool) -> None:
    """Tensors that are read in many pieces, past the page cache and through it."""
    random = torch.Generator().manual_seed(3)
    module = {"w": (700, 611)}
    state = {"w.weight": torch.randn(700, 611, generator=random).bfloat16()}
    save_model(Path("base"), 0, None, tensors=state)
    save_model(Path("other"), 0, None, tensors={"w.weight": -state["w.weight"]})
    made = factors(module, dtype=torch.bfloat16)
    save_adapter("lora", made)
    a, b = (made[f"{PREFIX}w.lora_{side}.weight"] for side in "AB")
    save_model(Path("whole"), 0, None, tensors={"w.weight": formula(state["w.weight"], a, b, SCALE)})
    found, expected = (
        me.run(
            recipe("ties", "other", "base", model),
            memory=2_500_000,
            **({"backend": Linked()} if linked else {"device": "cpu"}),
        ).tensors
        for model in ("base+lora", "whole")
    )
    assert expected is not None
    assert_same(found, expected)


def test_the_base_is_known_with_its_adapter() -> None:
    """A base with an adapter that is listed again is the base; the same model without it is not."""
    models()
    plan = me.plan(recipe("task_arithmetic", "base+of-base", "./base+./of-base", "base", "one"))
    assert list(plan.models) == [1, 2]
    repeated = me.plan(recipe("task_arithmetic", "base", "one", "two+of-two", "two+of-two"))
    assert "two+of-two is merged more than once, as models[1], models[2]" in repeated.notes


def test_any_change_of_the_adapter_makes_another_plan() -> None:
    models()
    used = recipe("task_arithmetic", "base", "two+of-two")

    def key() -> str:
        return plan_key(me.plan(used))

    before = key()
    assert key() == before != plan_key(me.plan(recipe("task_arithmetic", "base", "two+of-base")))
    settings = Path("of-two/adapter_config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 9}))
    with_settings = key()
    weights = Path("of-two/adapter_model.safetensors")
    os.utime(weights, ns=(1, 1))
    assert len({before, with_settings, key()}) == 3


def test_an_adapter_that_changes_before_the_run_is_noticed() -> None:
    models()
    plan = me.plan(recipe("task_arithmetic", "base", "two+of-two"))
    os.utime("of-two/adapter_model.safetensors", ns=(1, 1))
    with pytest.raises(me.CheckpointError, match=r"adapter_model\.safetensors: it has been written to"):
        me.run(plan, "out", device="cpu")
    assert not Path("out").exists()


def test_manifest_verify_and_report_know_the_adapter() -> None:
    models()
    used = recipe("ties", "base", "two+of-two", "two")
    me.run(used, "out", device="cpu")
    inputs = json.loads(Path("out/merge_manifest.json").read_text())["inputs"]
    assert inputs.keys() == {"base", "two", "two+of-two"}
    assert inputs["two+of-two"]["roles"] == ["0"]
    assert inputs["two+of-two"]["adapter"]["path"] == "of-two"
    assert inputs["two+of-two"]["adapter"]["files"].keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert verify("out", inputs=True).complete
    write_report(Path("out"))
    weights = Path("of-two/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    os.utime(weights, ns=(1, 1))
    [finding] = verify("out", inputs=True).input_findings
    assert finding.file == "two+of-two" and "adapter_model.safetensors: was written" in finding.problem
    shutil.rmtree("of-two")
    [finding] = verify("out", inputs=True).input_findings
    assert "a part of it is no longer there" in finding.problem


def test_diff_takes_an_adapter() -> None:
    whole = models()
    found = diff("two", "two+of-two")
    assert {tensor.name for tensor in found.tensors} == {f"{module}.weight" for module in MODULES}
    assert not found.config and "config.json" not in {n for n, s in found.files.items() if s != "equal"}
    assert diff("whole-two", "two+of-two").equal == len(whole["one"])


def test_models_that_are_the_same_are_found() -> None:
    models()
    plan = me.plan(recipe("task_arithmetic", "whole-two", "one", "two+of-two"))
    assert any(line.startswith("two+of-two: its tensors are those of whole-two") for line in plan.warnings)


def test_the_output_is_not_written_over_an_adapter() -> None:
    models()
    with pytest.raises(me.PlanError, match="of-two"):
        me.plan(recipe("task_arithmetic", "base", "two+of-two"), "of-two", overwrite=True)


def test_config_and_tokenizer_are_those_of_the_model() -> None:
    models()
    me.run(recipe("task_arithmetic", "base+of-base", "one"), "out", device="cpu")
    assert Path("out/tokenizer.json").read_bytes() == Path("base/tokenizer.json").read_bytes()
    assert not Path("out/adapter_config.json").exists()


def test_tokens_of_an_adapter_are_a_warning() -> None:
    models()
    added = [*TOKENIZER["added_tokens"], {"id": 64, "content": "<new>"}]
    Path("of-two/tokenizer.json").write_text(json.dumps(changed(TOKENIZER, added_tokens=added)))
    plan = me.plan(recipe("task_arithmetic", "base", "two+of-two"))
    assert plan.warnings == (
        'tokenizer: of-two comes with tokens that two has not, or has otherwise: "<new>"; its own tokenizer is not '
        "used",
    )
    shutil.copy("two/tokenizer.json", "of-two/tokenizer.json")
    assert me.plan(recipe("task_arithmetic", "base", "two+of-two")).warnings == ()
