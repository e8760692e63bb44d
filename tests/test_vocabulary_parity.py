"""`arithmetic: mergekit` gives mergekit's bytes for vocabularies that differ, and every output loads in transformers.

mergekit runs in an environment of its own (tests/oracle/README.md), once for everything here. Its order of models, and
so the ids of new tokens, depends on the hash seed: rows are compared token by token.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from vocabularies import SPECIAL, save_llama, tokenizer_json, words

import merge_engine as me

pytestmark = pytest.mark.oracle

SCRIPT = Path(__file__).parent / "oracle" / "mergekit_oracle.py"
TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
UNION = {"tokenizer_source": "union"}
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "union, one model with new tokens": ("task_arithmetic", ["first", "a", "c"], UNION),
    "union, shared new tokens": ("task_arithmetic", ["first", "a", "b"], UNION),
    "union, ties": ("ties", ["first", "a", "b", "c"], UNION),
    "union, linear": ("linear", ["first", "a", "b", "c"], UNION),
    "base": ("ties", ["first", "a", "b"], {"tokenizer_source": "base"}),
    "a model": ("linear", ["first", "a", "b"], {"tokenizer_source": "a"}),
    "padded": ("linear", ["c", "a", "b"], {"tokenizer": {"pad_to_multiple_of": 8}}),
    "more rows than tokens": ("ties", ["spare", "a", "b"], UNION),
    "tokens beyond the rows": ("task_arithmetic", ["first", "beyond", "b"], {"tokenizer": {}}),
    "permuted": ("task_arithmetic", ["first", "permuted", "a"], UNION),
    "permuted source": ("task_arithmetic", ["first", "permuted", "a"], {"tokenizer_source": "permuted"}),
    "other dtypes": ("task_arithmetic", ["first", "a", "wide"], UNION),
    "single tokens": (
        "task_arithmetic",
        ["first", "a", "b"],
        {
            "tokenizer": {
                "tokens": {
                    "w5": {"source": "a", "force": True},
                    "<x>": {"source": "b"},
                    "w6": {"source": {"kind": "zero"}, "force": True},
                    "w7": {"source": {"kind": "model_token", "model": "b", "token_id": 25}, "force": True},
                    "w8": {"source": {"kind": "model_token", "model": "a", "token": "<y>"}, "force": True},
                }
            }
        },
    ),
}


def save_models(folder: Path, dtype: torch.dtype) -> None:
    permuted = [*SPECIAL, *reversed(words(24)[3:])]
    for seed, (name, made, rows) in enumerate(
        [
            ("first", tokenizer_json(words(24)), None),
            ("a", tokenizer_json(words(24), ["<x>", "<y>"]), None),
            ("b", tokenizer_json(words(24), ["<x>", "<z>"]), None),
            ("c", tokenizer_json(words(24)), None),
            ("spare", tokenizer_json(words(24)), 32),
            ("beyond", tokenizer_json(words(24), ["<u>"]), 24),
            ("permuted", tokenizer_json(permuted), None),
        ]
    ):
        save_llama(folder / name, made, rows, seed=seed, dtype=dtype)
    save_llama(folder / "wide", tokenizer_json(words(24), ["<x>"]), seed=9, dtype=torch.float32)


def recipe(folder: Path, case: str) -> dict[str, Any]:
    method, (base, *models), keys = CASES[case]
    listed = models if method != "linear" else [base, *models]
    parameters = {"weight": 0.6} | ({"density": 0.5} if method == "ties" else {})
    text = json.dumps(
        {
            "merge_method": method,
            "base_model": base,
            "models": [{"model": model} for model in listed],
            "parameters": parameters,
            **keys,
        }
    )
    for each in folder.iterdir():
        text = text.replace(f'"{each.name}"', f'"{each}"') if each.is_dir() else text
    return dict(json.loads(text))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[dict[str, Any], Path]]:
    """The recipe and mergekit's output for each case in each dtype."""
    python = os.environ.get("MERGE_ENGINE_ORACLE")
    if not python:
        pytest.skip("MERGE_ENGINE_ORACLE is not set (tests/oracle/README.md)")
    found = {}
    jobs = []
    root = tmp_path_factory.mktemp("vocabularies")
    for dtype in (torch.bfloat16, torch.float32):
        folder = root / str(dtype).removeprefix("torch.")
        save_models(folder, dtype)
        for number, case in enumerate(CASES):
            made = recipe(folder, case)
            config, output = root / f"{folder.name}{number}.yaml", root / f"{folder.name}{number}"
            config.write_text(yaml.safe_dump(made))
            jobs.append({"config": str(config), "output": str(output)})
            found[folder.name, case] = made, output
    save_file({"none": torch.zeros(1)}, root / "none.safetensors")
    job = {"inputs": str(root / "none.safetensors"), "output": str(root / "out.safetensors"), "cases": []}
    (root / "job.json").write_text(json.dumps({**job, "recipes": jobs}))
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    subprocess.run([python, SCRIPT, root / "job.json"], check=True, env=environment, capture_output=True)
    return found


def ids_of(folder: Path) -> dict[str, int]:
    document = json.loads((folder / "tokenizer.json").read_text())
    return document["model"]["vocab"] | {token["content"]: token["id"] for token in document["added_tokens"]}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_bytes(outputs, case: str, dtype: str, tmp_path: Path) -> None:
    made, theirs = outputs[dtype, case]
    if made["merge_method"] == "ties":
        made["parameters"]["ties"] = "index"
    me.run(made | {"arithmetic": "mergekit"}, tmp_path / "out")
    ids, other_ids = ids_of(tmp_path / "out"), ids_of(theirs)
    assert ids.keys() == other_ids.keys()
    merged, expected = (load_file(each / "model.safetensors") for each in (tmp_path / "out", theirs))
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
        if name in TENSORS:
            order, other_order = list(ids.values()), [other_ids[token] for token in ids]
            assert torch.equal(tensor[order], expected[name][other_order])
            # float32 means of new rows differ in the last bits
            near = {"rtol": 1e-5, "atol": 1e-8} if tensor.dtype == torch.float32 else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(tensor[len(ids) :], expected[name][len(ids) :], **near)
        else:
            assert torch.equal(tensor, expected[name])
    ours, config = (json.loads((each / "config.json").read_text()) for each in (tmp_path / "out", theirs))
    assert {key: ours[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")} == {
        key: config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")
    }


@pytest.mark.parametrize("case", CASES)
def test_outputs_load(outputs, case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made, _ = outputs["bfloat16", case]
    made.get("parameters", {}).pop("ties", None)
    me.run(made, tmp_path / "out")
    model, said = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert dict(tokenizer.get_vocab()) == ids_of(tmp_path / "out")
    ids = torch.tensor([list(tokenizer.get_vocab().values())])
    assert ids.max() < model.config.vocab_size
    assert torch.isfinite(model(ids).logits).all()
