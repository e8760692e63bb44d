"""The manifest describes a merge and its result for programs, the model card for people."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SaveCheckpoint
from safetensors.torch import load_file
from written import load_folder
from xxhash import xxh3_128

import merge_engine as me
from merge_engine.checkpoint import open_checkpoint
from merge_engine.observe.card import encode_card
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.result import MergeResult
from merge_engine.recipe import load_recipe

# The first is larger than a block of a digest, the last has no bytes.
SHAPES = {
    "embed.weight": (4100, 2100),
    "layers.0.weight": (70, 300),
    "norm.weight": (300,),
    "scale": (),
    "no": (0, 2),
}
HEX = re.compile(r"[0-9a-f]{32}")


@pytest.fixture
def recipe(save_checkpoint: SaveCheckpoint) -> dict[str, Any]:
    torch.manual_seed(0)
    base, a, b = (
        save_checkpoint(
            name, {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in SHAPES.items()}
        )
        for name in ("base", "a", "b")
    )
    models = [{"model": str(folder), "parameters": {"weight": 0.5, "density": 0.3}} for folder in (a, b)]
    return {"merge_method": "dare_ties", "base_model": str(base), "models": models, "seed": 1}


def merged(recipe: dict[str, Any], out: Path, **options: Any) -> dict[str, Any]:
    me.run(recipe, out, **options)
    manifest: dict[str, Any] = json.loads((out / "merge_manifest.json").read_text())
    return manifest


def digest_of(tensor: torch.Tensor) -> str:
    data = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    blocks = (data[start : start + (1 << 24)] for start in range(0, len(data), 1 << 24))
    return xxh3_128(b"".join(xxh3_128(block).digest() for block in blocks)).hexdigest()


@pytest.mark.parametrize("memory", ("400MB", "1MB"))  # the second cuts the large tensor
def test_digests_are_those_of_the_tensors_written(
    recipe: dict[str, Any], tmp_path: Path, memory: str
) -> None:
    manifest = merged(recipe, tmp_path / "out", memory=memory)
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: digest_of(written[name]) for name in sorted(SHAPES)}
    assert {name: tensor["digest"] for name, tensor in manifest["tensors"].items()} == expected
    lines = "".join(f"{digest}  {name}\n" for name, digest in expected.items())
    assert manifest["digest"] == xxh3_128(lines.encode()).hexdigest()


def test_the_same_merge_has_the_same_digests_and_another_seed_has_not(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    first = merged(recipe, tmp_path / "first")
    again = merged(recipe, tmp_path / "again", memory="1MB", shard_size="100KB", threads=1)
    assert (again["digest"], again["tensors"]) == (first["digest"], first["tensors"])
    other = merged(recipe | {"seed": 2}, tmp_path / "other")
    assert other["digest"] != first["digest"]
    for name in ("embed.weight", "layers.0.weight", "norm.weight"):
        assert other["tensors"][name]["digest"] != first["tensors"][name]["digest"]
    assert other["tensors"]["no"] == first["tensors"]["no"]


def test_format_3(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Every key with the type of its value, on which other programs may rely."""
    counts = {"kept": int, "lost": int, "saved_by_trim": int, "saved_by_sign": int}
    of_models = {"0": counts, "1": counts}
    stage = {"bytes": int, "busy_seconds": float}
    stages = dict.fromkeys(("read", "compute", "digest", "write", "publish"), stage)
    file = {"bytes": int, "mtime_ns": int, "header": str}
    given = {"fingerprint": str, "roles": list, "files": {"model.safetensors": file}}
    side = {"bytes": int, "digest": str}
    manifest = merged(recipe, tmp_path / "out")
    assert_schema(
        manifest,
        {
            "format": int,
            "versions": {"merge_engine": str, "python": str, "platform": str},
            "backend": str,
            "recipe": str,
            "inputs": {
                recipe["base_model"]: given,
                recipe["models"][0]["model"]: given,
                recipe["models"][1]["model"]: given,
            },
            "digest": str,
            "tensors": {
                name: {
                    "digest": str,
                    "elements": int,
                    **({"blocks": list} if name == "embed.weight" else {}),
                    **({"counts": of_models} if name != "no" else {}),
                }
                for name in SHAPES
            },
            "counts": of_models,
            "shards": {"model.safetensors": {"bytes": int, "header": str}},
            "files": {"config.json": side, "README.md": side, "mergekit_config.yml": side},
            "notes": list,
            "warnings": list,
            "ledger": {
                "seconds": float,
                "bytes_from_storage": (int, type(None)),
                "bound_by": (str, type(None)),
                **stages,
            },
        },
    )
    assert manifest["format"] == 3
    assert manifest["versions"]["merge_engine"] == version("merge_engine")
    assert load_recipe(manifest["recipe"]) == load_recipe(recipe)
    assert manifest["backend"] == "cpu"
    assert {path: given["roles"] for path, given in manifest["inputs"].items()} == {
        recipe["base_model"]: ["base"],
        recipe["models"][0]["model"]: ["0"],
        recipe["models"][1]["model"]: ["1"],
    }
    for path, given in manifest["inputs"].items():
        checkpoint = open_checkpoint(Path(path))
        assert given["fingerprint"] == checkpoint.fingerprint
        assert given["files"] == {
            file.path.name: {"bytes": file.size, "mtime_ns": file.mtime_ns, "header": header}
            for file, header in checkpoint.contents
        }
    assert HEX.fullmatch(manifest["digest"])
    elements = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    assert {name: tensor["elements"] for name, tensor in manifest["tensors"].items()} == elements
    for key in counts:
        for model in of_models:
            by_tensor = [t["counts"][model][key] for t in manifest["tensors"].values() if "counts" in t]
            assert manifest["counts"][model][key] == sum(by_tensor)


def test_digests_of_blocks_headers_and_files(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = merged(recipe, out, shard_size="1MB")
    tensor = manifest["tensors"]["embed.weight"]
    block, large = 1 << 24, load_folder(out)["embed.weight"].view(torch.uint8).flatten().numpy().tobytes()
    expected = [xxh3_128(large[start : start + block]).hexdigest() for start in range(0, len(large), block)]
    assert tensor["blocks"] == expected and len(expected) == 2
    assert set(manifest["shards"]) == {file.name for file in out.glob("*.safetensors")}
    for name, shard in manifest["shards"].items():
        data = (out / name).read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        assert shard == {"bytes": len(data), "header": xxh3_128(header).hexdigest()}
    for name, side in manifest["files"].items():
        data = (out / name).read_bytes()
        assert side == {"bytes": len(data), "digest": xxh3_128(data).hexdigest()}


def assert_schema(value: Any, schema: Any, place: str = "") -> None:
    """A schema is a map with exactly these keys, or a type."""
    if isinstance(schema, dict):
        assert isinstance(value, dict) and set(value) == set(schema), place
        for key, inner in schema.items():
            assert_schema(value[key], inner, f"{place}.{key}")
    else:
        assert isinstance(value, schema) and not isinstance(value, bool), place


def test_one_model_with_two_roles_and_a_method_without_task_vectors(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    models = [{"model": recipe["base_model"], "parameters": {"weight": 1}}] * 2
    manifest = merged({"merge_method": "linear", "models": models}, tmp_path / "out")
    assert [given["roles"] for given in manifest["inputs"].values()] == [["0", "1"]]
    assert manifest["counts"] == {}
    assert all("counts" not in tensor for tensor in manifest["tensors"].values())


def front_matter(card: bytes) -> dict[str, Any]:
    text = card.decode()
    assert text.startswith("---\n")
    about: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return about


def test_the_card_names_models_of_the_hub_and_the_digest(recipe: dict[str, Any], tmp_path: Path) -> None:
    manifest = merged(recipe, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_bytes()
    assert front_matter(card) == {"library_name": "transformers", "tags": ["merge", "merge_engine"]}
    assert f"`{manifest['digest']}`" in card.decode() and recipe["base_model"] in card.decode()
    assert manifest["recipe"] in card.decode()

    here = tmp_path / "here"
    here.mkdir()
    names = ["owner/base", f"{here}", "owner/tuned@v1.0", "owner/1.0: #'\"", "owner/base@main"]
    models = [{"model": name} for name in names[1:]]
    hub = load_recipe({"merge_method": "task_arithmetic", "base_model": names[0], "models": models})
    result = MergeResult(tmp_path, None, [], {}, Ledger(), [])
    about = front_matter(encode_card([hub], result, "0" * 32))
    assert about["base_model"] == ["owner/base", "owner/tuned", "owner/1.0: #'\""]
