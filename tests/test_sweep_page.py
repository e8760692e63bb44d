"""The page of a sweep: its numbers are those of the results, its links lead there, no text becomes markup."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from conftest import SaveCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import EVIL, read
from safetensors.torch import load_file

import merge_engine as me
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.result import MergeResult, ModelCounts, TensorResult
from merge_engine.report import SweepEntry, write_sweep_page
from merge_engine.report.drawing import COLOURS
from merge_engine.report.sweep_data import Sweep
from merge_engine.report.values import in_order, score_text, text_of

ELEMENTS = 1000
MODELS = ("/models/one", "/models/two")


def result(*counts: ModelCounts, models: tuple[str, ...] = MODELS) -> MergeResult:
    tensor = TensorResult("weight", ELEMENTS, dict(enumerate(counts)))
    return MergeResult(None, None, [tensor], dict(enumerate(models)), Ledger(), [])


def grid(axes: Mapping[str, list[Any]], **given: Any) -> list[SweepEntry]:
    """A recipe for each combination; each model's counts depend on the first axis and on its position."""
    entries = []
    for values in product(*axes.values()):
        first = next(iter(axes.values())).index(values[0])
        counts = [ModelCounts(100 + 10 * first, 7 * model + first, model, 2) for model in range(2)]
        label = ",".join(f"{axis}={value}" for axis, value in zip(axes, values, strict=True))
        entries.append(SweepEntry(label, dict(zip(axes, values, strict=True)), result(*counts), **given))
    return entries


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[list[SweepEntry], list[str]]:
    """Grids of up to three axes, of which recipes may be missing and some change nothing."""
    axes = {
        name: draw(
            st.lists(
                st.sampled_from([0, 0.5, 1, 2.5, "a", None, True]), min_size=1, max_size=3, unique_by=str
            )
        )
        for name in ("density", "slack", "method")[: draw(st.integers(1, 3))]
    }
    counted = st.integers(0, 3)
    entries = []
    for values in product(*axes.values()):
        counts = []
        for _ in range(2):
            kept = draw(counted)
            counts.append(ModelCounts(kept, draw(st.integers(0, kept)), 0, draw(st.integers(0, kept))))
        given_values = dict(zip(axes, values, strict=True))
        entries.append(
            SweepEntry(str(values), given_values, result(*counts), None, {"s": float(draw(counted))})
        )
    kept_entries = [entry for entry in entries if draw(st.booleans())] or entries[:1]
    return kept_entries, list(axes)


@given(sweeps())
def test_every_number_of_every_recipe_is_at_its_place(drawn: tuple[list[SweepEntry], list[str]]) -> None:
    entries, axes = drawn
    sweep = Sweep(entries, axes, [None] * len(entries))
    by_title = {measure.title: measure for measure in sweep.measures}

    def number(title: str, row: int, model: str | None) -> float:
        """The number at the place of a recipe: the only point that agrees with it in all dimensions."""
        measure, values = by_title[title], {**entries[row].values, "recipe": row, "model": model}
        wanted = [text_of(values[dimension]) for dimension in measure.dimensions]
        (found,) = [p.value for p in measure.points if [text_of(value) for value in p.at] == wanted]
        return found

    for row, entry in enumerate(entries):
        for position, model in enumerate(("one", "two")):
            counts = entry.result.counts[position]
            assert number("Kept", row, model) == pytest.approx(100 * counts.kept / ELEMENTS)
            assert number("Lost to the election", row, model) == pytest.approx(100 * counts.lost_share)
            assert number("Saved by slack", row, model) == pytest.approx(100 * counts.saved_share)
        assert number("Score: s", row, None) == entry.scores["s"]


@given(st.dictionaries(st.sampled_from(["density", "slack", "x"]), st.just([1, 2]), min_size=1), st.data())
@settings(max_examples=5)
def test_the_page_has_a_row_for_each_recipe_and_the_file_beside_it_the_same_numbers(
    tmp_path_factory: pytest.TempPathFactory, axes: dict[str, list[Any]], data: st.DataObject
) -> None:
    score = data.draw(st.floats(-1e6, 1e6))
    entries = grid(axes, scores={"accuracy": (score, 0.25)})
    folder = tmp_path_factory.mktemp("page")
    page, numbers = write_sweep_page(entries, axes, folder / "sweep.html")
    reader = read(page.read_text(encoding="utf-8"))
    rows = reader.rows[-len(entries) :]
    recipes = json.loads(numbers.read_text())["recipes"]
    for entry, row, recipe in zip(entries, rows, recipes, strict=True):
        assert row[0] == entry.label == recipe["label"] and recipe["values"] == entry.values
        cells = []
        for name, counts in zip(MODELS, entry.result.counts.values(), strict=True):
            found = recipe["models"][name]
            assert {key: found[key] for key in counts.as_dict()} == counts.as_dict()
            assert found["kept_share"] == counts.kept / ELEMENTS
            cells += [f"{found[key]:.2%}" for key in ("kept_share", "lost_share", "saved_share")]
        assert row[1:] == [*cells, f"{score:.2f} ± 0.25"]
        assert recipe["scores"] == {"accuracy": {"score": score, "error": 0.25}}


@pytest.fixture
def merged(
    save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> tuple[list[SweepEntry], dict[str, torch.Tensor]]:
    """TIES at two densities, and a mean, which has no task vectors; and the base."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(16, 8, generator=generator) for i in range(2)}
    models = [
        save_checkpoint(
            name, {key: value + torch.randn(16, 8, generator=generator) / 4 for key, value in base.items()}
        )
        for name in ("a<b>", "b")
    ]
    entries = []
    for method, density in (("ties", 0.25), ("ties", 0.5), ("linear", 1.0)):
        recipe = {
            "merge_method": method,
            "models": [{"model": str(model), "parameters": {"weight": 1}} for model in models],
        }
        if method == "ties":
            recipe |= {
                "base_model": str(save_checkpoint(f"base {density}", base)),
                "parameters": {"density": density},
            }
        label = f"{method}%20?#{density}"
        outcome = me.run(recipe, tmp_path / "out" / label)
        entries.append(SweepEntry(label, {"density": density}, outcome, tmp_path / "out" / label))
    return entries, base


def test_norms_are_those_of_the_merged_tensors_and_links_lead_to_the_merges(
    merged: tuple[list[SweepEntry], dict[str, torch.Tensor]],
) -> None:
    entries, base = merged
    home = entries[0].folder.parent  # type: ignore[union-attr]
    me.write_report(home / entries[0].label)
    page, numbers = write_sweep_page(entries, ["density"], home / "sweep.html", norms=True)
    recipes = json.loads(numbers.read_text())["recipes"]
    size = math.sqrt(sum(float(value.double().square().sum()) for value in base.values()))
    for entry, recipe in zip(entries[:2], recipes, strict=False):
        assert entry.folder is not None
        out = load_file(entry.folder / "model.safetensors")
        squares = sum(float((out[key] - value).double().square().sum()) for key, value in base.items())
        assert recipe["base_norm"] == pytest.approx(size) and recipe["merged_norm"] == pytest.approx(
            math.sqrt(squares)
        )
        for name, found in recipe["models"].items():
            model = load_file(Path(name) / "model.safetensors")
            deltas = [(model[key] - value).double().flatten() for key, value in base.items()]
            kept = [d.abs().sort().values[-int(entry.values["density"] * d.numel()) :] for d in deltas]  # type: ignore[operator]
            share = torch.cat(kept).norm() / torch.cat(deltas).norm()
            assert found["kept_norm_share"] == pytest.approx(float(share), rel=1e-5)
    text = page.read_text(encoding="utf-8")
    reader = read(text)
    assert "linear, which has no task vectors" in text
    nowhere = [replace(entry, folder=None) for entry in entries]
    page, _ = write_sweep_page(nowhere, ["density"], home / "other.html", norms=True)
    assert "its tensors are in no folder" in page.read_text(encoding="utf-8")
    assert {"Norm of what was kept", "Norm of the merged task vector"} <= set(reader.headings)
    links = [unquote(link) for link in reader.links if link.startswith("./")]
    assert sorted(links) == sorted(
        [*(f"./{entry.label}" for entry in entries), f"./{entries[0].label}/merge_report.html"]
    )
    assert all((home / link).exists() for link in links)


def test_the_same_sweep_gives_the_same_bytes_and_no_norms_unless_asked_for(
    merged: tuple[list[SweepEntry], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    texts = []
    for _ in range(2):
        files = write_sweep_page(merged[0], ["density"], tmp_path / "sweep.html")
        texts.append([file.read_bytes() for file in files])
    assert texts[0] == texts[1] and b"norm" not in texts[0][0].lower()


def test_names_and_labels_of_others_stay_text(tmp_path: Path) -> None:
    models = (f"/m/{EVIL}", "/m/b")
    entries = [
        SweepEntry(
            f"{EVIL} {x}",
            {EVIL: f"{EVIL}{x}"},
            result(ModelCounts(5 + x), models=models),
            tmp_path / EVIL,
            {EVIL: x},
        )
        for x in (1, 2)
    ]
    for axes in ([EVIL], []):
        page, _ = write_sweep_page(entries, axes, tmp_path / "sweep.html")
        text = page.read_text(encoding="utf-8")
        read(text)
        assert "&lt;script&gt;" in text


def test_panels_and_lines_follow_the_axes(tmp_path: Path) -> None:
    axes = {"density": [0.5, 0.1], "slack": [0, 2], "seed": [1, 2, 3]}
    scored = [
        SweepEntry(e.label, e.values, e.result, None, {"s": sum(e.values.values())})  # type: ignore[arg-type]
        for e in grid(axes)
    ]
    page, _ = write_sweep_page(scored, axes, tmp_path / "sweep.html")
    reader = read(page.read_text(encoding="utf-8"))
    assert reader.headings == ["Kept", "Lost to the election", "Saved by slack", "Score: s", "All numbers"]
    # Counts depend on the density alone: one panel, a line for each model. The score depends on all three axes.
    assert [text.split(".")[0] for text in reader.alternatives] == [
        "Lines over density: Kept, one for each model",
        "Lines over density: Lost to the election, one for each model",
        "Lines over density: Saved by slack, one for each model",
        *(f"Lines over density: Score: s, one for each slack; seed = {seed}" for seed in (1, 2, 3)),
    ]
    assert "From 1.1 to 3.5" in reader.alternatives[3] and "From 3.1 to 5.5" in reader.alternatives[5]


def test_every_point_is_drawn_once_also_where_a_value_is_none(tmp_path: Path) -> None:
    axes = {"x": [1, 2, 3], "dtype": [None, "float32"]}
    entries = [
        SweepEntry(str(i), e.values, result(), None, {"s": float(i)}) for i, e in enumerate(grid(axes))
    ]
    text = write_sweep_page(entries, axes, tmp_path / "sweep.html")[0].read_text(encoding="utf-8")
    for colour in COLOURS[:2]:
        assert len(re.findall(rf'<use [^>]*style="fill: {colour}', text)) == 3
    assert "dtype = null" in text


def test_a_list_becomes_bars_and_what_is_no_number_a_dash(tmp_path: Path) -> None:
    entries = [
        SweepEntry(f"recipe {i}", {}, result(ModelCounts(i)), None, {"s": float("nan") if i else 3.0})
        for i in range(3)
    ]
    page, numbers = write_sweep_page(entries, [], tmp_path / "sweep.html")
    text = page.read_text(encoding="utf-8")
    reader = read(text)
    assert reader.alternatives[0].startswith("Bars: Kept, one for each recipe")
    assert [row[-1] for row in reader.rows[-3:]] == ["3", "–", "–"]
    assert json.loads(numbers.read_text())["recipes"][1]["scores"]["s"] == {"score": None, "error": None}
    assert "0 in all recipes: Lost to the election, Saved by slack" in text


def test_recipes_without_task_vectors_and_scores(tmp_path: Path) -> None:
    entries = [SweepEntry("mean", {}, result()), SweepEntry("sum", {}, result())]
    text = write_sweep_page(entries, [], tmp_path / "sweep.html")[0].read_text(encoding="utf-8")
    assert "nothing is drawn" in text and read(text).rows == [["recipe"], ["mean"], ["sum"]]


@pytest.mark.parametrize(
    ("entries", "axes", "problem"),
    [
        ([], [], "a sweep without recipes"),
        (grid({"x": [1, 2]}), ["x", "y"], '"x=2": has no value of the axis "y"'),
        (grid({"x": [1, 2], "y": [1, 2]}), ["x"], '"x=1,y=1" and "x=1,y=2": have the same values'),
    ],
)
def test_what_cannot_be_shown(
    tmp_path: Path, entries: list[SweepEntry], axes: list[str], problem: str
) -> None:
    with pytest.raises(me.ReportError, match=problem):
        write_sweep_page(entries, axes, tmp_path / "sweep.html")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(me.OutputError, match=r"nowhere/sweep\.html: cannot be written"):
        write_sweep_page(grid({"x": [1]}), ["x"], tmp_path / "nowhere" / "sweep.html")


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path: Path, without_matplotlib: None) -> None:
    with pytest.raises(me.ReportError, match=r'pip install "merge_engine\[report\]"'):
        write_sweep_page(grid({"x": [1]}), ["x"], tmp_path / "sweep.html")


def test_values_and_scores_as_text() -> None:
    assert in_order([10, 9.5, 10, 2]) == [2, 9.5, 10] and in_order(["b", 1, "a"]) == ["b", 1, "a"]
    assert [text_of(value) for value in ("ties", 0.5, None, True, [0, 2])] == [
        "ties",
        "0.5",
        "null",
        "true",
        "[0, 2]",
    ]
    assert score_text(0.42134, 0.0051234) == "0.4213 ± 0.0051" and score_text(12.3456, 12.0) == "12 ± 12"
    assert (
        score_text(0.123456789, None) == "0.12346" == score_text(0.123456789, 0.0)
        and score_text(None, 1) == "–"
    )
