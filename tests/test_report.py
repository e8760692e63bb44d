"""The report: its counts, its measurements, its errors, and that no text from a checkpoint is trusted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint, Snapshot
from pages import EVIL, read

import merge_engine as me
from merge_engine.checkpoint import MANIFEST_NAME, carried_files
from merge_engine.observe.discards import Place

LAYERS = 3
NAMES = [
    "embeddings.word_embeddings.weight",
    *(
        f"encoder.layer.{layer}.{kind}"
        for layer in range(LAYERS)
        for kind in ("attention.self.query.weight", "attention.self.query.bias", "output.dense.weight")
    ),
    "pooler.dense.weight",
]


def tensors(
    seed: int, size: float = 1.0, base: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """A model in the names of BERT: random, or a base with random changes of some size."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(48, generator=generator) for name in NAMES}
    if base is None:
        return made
    return {name: base[name] + size * change for name, change in made.items()}


@pytest.fixture
def merged(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> Path:
    """TIES of a large and a small task vector, with a slack for the small one."""
    base = tensors(0)
    save_checkpoint("base", base)
    save_checkpoint("large", tensors(1, 0.5, base))
    save_checkpoint("small", tensors(2, 0.1, base))
    me.run(recipe(tmp_path), tmp_path / "out")
    return tmp_path / "out"


def recipe(folder: Path, **parameters: Any) -> dict[str, Any]:
    own = {"weight": 0.5, "sign_slack": 0.5}
    return {
        "merge_method": "ties",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / "large"), "parameters": {"weight": 0.5}},
            {"model": str(folder / "small"), "parameters": own},
        ],
        "parameters": {"density": 0.5, **parameters},
    }


def report(folder: Path) -> tuple[str, dict[str, Any]]:
    page, numbers = me.write_report(folder)
    return page.read_text(encoding="utf-8"), json.loads(numbers.read_text())


def test_places() -> None:
    assert Place.of("model.layers.3.mlp.up_proj.weight") == ("model.layers", 3, "mlp.up_proj")
    assert Place.of("model.layers.11.mlp.experts.7.w1.weight") == ("model.layers", 11, "mlp.experts.*.w1")
    assert Place.of("encoder.layer.0.output.dense.bias") == ("encoder.layer", 0, "output.dense.bias")
    assert Place.of("model.embed_tokens.weight") == ("", None, "model.embed_tokens")
    assert Place.of("weight") == ("", None, "weight")


def test_discards_are_the_counts_summed_up(merged: Path, tmp_path: Path) -> None:
    result = me.run(recipe(tmp_path))
    found = me.discards(result)
    assert found.total == result.counts
    assert set(found.by_layer) == {("encoder.layer", layer) for layer in range(LAYERS)}
    assert set(found.by_kind) == {
        "embeddings.word_embeddings",
        "attention.self.query",
        "attention.self.query.bias",
        "output.dense",
        "pooler.dense",
    }
    for model in (0, 1):
        assert sum(counts[model].lost for counts in found.by_kind.values()) == result.counts[model].lost
        layer = [t.counts[model].kept for t in result.per_tensor if ".layer.1." in t.name]
        assert found.by_layer["encoder.layer", 1][model].kept == sum(layer)
    assert 0 < found.total[0].lost_share < found.total[1].lost_share
    assert found.total[1].saved_share > 0


def test_a_report_says_what_the_run_counted(merged: Path) -> None:
    page, numbers = report(merged)
    counts = json.loads((merged / MANIFEST_NAME).read_text())["counts"]["1"]
    assert {key: numbers["total"]["1"][key] for key in counts} == counts
    assert numbers["total"]["1"]["lost_share"] == counts["lost"] / counts["kept"]
    assert len(numbers["layers"]) == LAYERS
    assert f"{counts['lost']:,}" in page and page.count("<svg") == 4
    assert numbers["models"] == {"0": "large", "1": "small"}


def test_norms_and_cosines_are_those_of_the_task_vectors(merged: Path) -> None:
    _, numbers = report(merged)
    base = tensors(0)
    flat = [
        torch.cat([model[n] - base[n] for n in NAMES]).double()
        for model in (tensors(1, 0.5, base), tensors(2, 0.1, base))
    ]
    found = numbers["task_vectors"]["total"]
    assert found["norms"] == pytest.approx({str(i): float(d.norm()) for i, d in enumerate(flat)}, rel=1e-6)
    cosine = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())
    assert found["cosines"] == [{"models": [0, 1], "cosine": pytest.approx(cosine, abs=1e-6)}]


def test_a_model_that_is_the_base_has_no_norm_and_no_angle(
    merged: Path, save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    save_checkpoint("same", tensors(0))
    plan = recipe(tmp_path)
    plan["models"][1]["model"] = str(tmp_path / "same")
    me.run(plan, tmp_path / "other")
    found = report(tmp_path / "other")[1]["task_vectors"]["total"]
    assert found["norms"]["1"] == 0 and found["cosines"][0]["cosine"] is None


def test_the_page_of_a_small_merge(
    save_checkpoint: SaveCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_snapshot: Snapshot,
) -> None:
    names = ["embed.weight", "layers.0.mlp.weight", "layers.1.mlp.weight"]
    base = {name: torch.arange(32.0) - 7 * i for i, name in enumerate(names)}
    for factor, name in ((5, "one"), (11, "<i>two<i>"), (3, "three")):
        tuned = {key: value + (torch.arange(32) * factor % 17 - 8) / 8 for key, value in base.items()}
        save_checkpoint(name, tuned)
    save_checkpoint("base", base)
    monkeypatch.chdir(tmp_path)
    plan = recipe(Path(), ties="index", trim_slack=0.125)
    plan["models"] = [
        {"model": "one", "parameters": {"weight": 0.5}},
        {"model": "<i>two<i>", "parameters": {"weight": 0.25}},
        {"model": "three", "parameters": {"weight": 0.25, "sign_slack": 3}},
    ]
    me.run(plan, "out")
    page, _ = report(Path("out"))
    page = re.sub(r"<svg.*?</svg>", "<svg/>", page, flags=re.DOTALL)
    page = re.sub(r"<style>.*?</style>", "<style/>", page, flags=re.DOTALL)
    assert_snapshot("report.html", re.sub(r"digest <code>[0-9a-f]{12}", "digest <code>DIGEST", page))


def test_the_same_merge_gives_the_same_report(merged: Path) -> None:
    assert report(merged) == report(merged)


def test_three_models_and_no_election(merged: Path, save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    save_checkpoint("third", tensors(3, 0.2, tensors(0)))
    plan = recipe(tmp_path)
    plan["models"].append({"model": str(tmp_path / "third"), "parameters": {"weight": 1}})
    me.run(plan, tmp_path / "three")
    page, numbers = report(tmp_path / "three")
    assert len(numbers["task_vectors"]["total"]["cosines"]) == 3 and "third" in page
    del plan["models"][1]["parameters"]["sign_slack"], plan["parameters"]
    me.run(plan | {"merge_method": "task_arithmetic"}, tmp_path / "sum")
    page, numbers = report(tmp_path / "sum")
    assert "no election" in page and numbers["total"]["0"]["lost"] == 0


def test_what_trim_slack_saved_is_not_shown_by_layer_where_it_is_not_known(
    merged: Path, tmp_path: Path
) -> None:
    me.run(recipe(tmp_path, trim_scope="model", trim_slack=0.5), tmp_path / "whole")
    page, numbers = report(tmp_path / "whole")
    assert "known in total only" in page and numbers["total"]["1"]["saved_by_trim"] > 0
    me.run(recipe(tmp_path, trim_slack=0.5), tmp_path / "each")
    assert "known in total only" not in report(tmp_path / "each")[0]


@pytest.mark.parametrize("change", ["gone", "rewritten"])
def test_without_the_inputs_the_rest_is_shown_and_the_page_says_so(merged: Path, change: str) -> None:
    weights = merged.parent / "small" / "model.safetensors"
    if change == "gone":
        weights.unlink()
        weights.parent.joinpath("config.json").unlink()
        weights.parent.rmdir()
    else:
        weights.write_bytes(weights.read_bytes())
    page, numbers = report(merged)
    assert "Not shown" in page and page.count("<svg") == 2
    assert ("no longer there" if change == "gone" else "rewritten") in numbers["task_vectors"]["missing"]


def test_nothing_that_a_checkpoint_says_becomes_part_of_the_page(
    save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    base = {f"layers.{i}.{EVIL}": torch.randn(32) for i in range(2)}
    folders = []
    for seed, name in enumerate(("base", "a<b>&'c", "b")):
        torch.manual_seed(seed)
        folders.append(save_checkpoint(name, {key: v + torch.randn(32) for key, v in base.items()}))
    plan = {
        "merge_method": "ties",
        "base_model": str(folders[0]),
        "models": [{"model": str(folder)} for folder in folders[1:]],
        "parameters": {"weight": 1},
    }
    me.run(plan, tmp_path / "out")
    page, _ = report(tmp_path / "out")
    reader = read(page)
    assert "b" not in reader.tags[: reader.tags.index("h1")]
    assert "&lt;script&gt;" in page


def test_a_folder_whose_name_is_no_text(merged: Path, tmp_path: Path) -> None:
    folder = merged.rename(tmp_path / os.fsdecode(b"\xff"))
    assert "\\udcff" in report(folder)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "holds no merge_manifest.json"),
        ("{", "no valid JSON"),
        ("[]", "not the manifest of a merge"),
        ('{"format": 3}', "not the manifest of a merge"),
        ('{"format": "3"}', "not the manifest of a merge"),
        (
            '{"format": 1}',
            "has format 1, and this version of merge_engine reads format 3; run the merge again$",
        ),
        (
            '{"format": 2}',
            "has format 2, and this version of merge_engine reads format 3; run the merge again$",
        ),
    ],
)
def test_a_folder_without_a_manifest(tmp_path: Path, text: str | None, expected: str) -> None:
    if text is not None:
        (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(me.ManifestError, match=expected):
        me.write_report(tmp_path)


def test_the_command_line_names_the_files_or_the_error(merged: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "merge_engine", "report"]
    done = subprocess.run([*command, str(merged)], capture_output=True, text=True)
    assert done.returncode == 0 and "merge_report.html" in done.stdout
    failed = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr


def test_a_method_without_task_vectors(merged: Path, tmp_path: Path) -> None:
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in ("large", "small")]
    me.run({"merge_method": "linear", "models": models}, tmp_path / "mean")
    with pytest.raises(me.ReportError, match="linear, which has no task vectors"):
        me.write_report(tmp_path / "mean")


def test_without_what_draws_the_error_says_how_to_get_it(merged: Path, without_matplotlib: None) -> None:
    with pytest.raises(me.ReportError, match=r'pip install "merge_engine\[report\]"'):
        me.write_report(merged)


def test_a_report_is_no_part_of_the_model(merged: Path, tmp_path: Path) -> None:
    report(merged)
    assert not any("report" in name for name in carried_files(merged))
    me.run(recipe(tmp_path, density=0.2), merged, overwrite=True)
    assert not (merged / "merge_report.html").exists() and not (merged / "merge_report.json").exists()
