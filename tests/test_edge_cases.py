"""Corners that once gave wrong results: slack with equal thresholds, overflow, tied heads, odd options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merge_engine as me


def test_breadcrumbs_with_slack_keeps_all_but_the_largest_when_all_are_equal() -> None:
    base = torch.zeros(10_000)
    model = torch.full((10_000,), 0.5)
    for ties, expected in (("index", 9000), ("spread", 9000)):
        merged = me.merge_tensors(
            base, [model], "breadcrumbs", density=0.5, gamma=0.1, trim_slack=1e-6, ties=ties
        )
        kept = int((merged != 0).sum())
        assert kept == expected if ties == "index" else abs(kept - expected) < 200


def test_rescaling_by_density_leaves_what_is_not_dropped() -> None:
    base, model = torch.zeros(8), torch.ones(8)
    merged = me.merge_tensors(base, [model], "task_arithmetic", density=0.5, rescale="density")
    assert torch.equal(merged, model)


@pytest.mark.parametrize("options", ({"parameters": {}}, {"base_model": "x"}))
def test_an_option_that_is_none_is_an_error(options: dict[str, object]) -> None:
    with pytest.raises(me.RecipeError):
        me.merge_tensors(torch.zeros(4), [torch.ones(4)], "ties", density=0.2, **options)


def test_dtypes_may_be_torchs() -> None:
    merged = me.merge_tensors(torch.zeros(4), [torch.ones(4)], out_dtype=torch.bfloat16)
    assert merged.dtype == torch.bfloat16


def test_a_value_too_large_for_the_output_is_not_written_as_infinity() -> None:
    base, model = torch.zeros(4), torch.full((4,), 66000.0)
    with pytest.raises(me.NonFiniteError, match=r"4 merged value\(s\) are too large for float16"):
        me.merge_tensors(base, [model], dtype="float32", out_dtype="float16")
    with pytest.raises(me.NonFiniteError, match="too large for float16, which it is merged in"):
        me.merge_tensors(base, [model], dtype="float16")
    merged = me.merge_tensors(base, [model], dtype="float32", out_dtype="float16", allow_nonfinite=True)
    assert merged.isinf().all()


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ties(base: Path, *models: Path, **parameters: object) -> dict[str, object]:
    return {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
        "parameters": {"weight": 1, **parameters},
    }


def test_counts_of_a_trim_over_the_whole_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {name: torch.randn(40, 50) for name in ("a", "b", "c")}
    tuned = {name: tensor + 0.1 * torch.randn(40, 50) for name, tensor in base.items()}
    recipe = ties(
        checkpoint(tmp_path / "base", base),
        checkpoint(tmp_path / "tuned", tuned),
        density=0.3,
        trim_slack=0.2,
        trim_scope="model",
    )
    result = me.run(recipe)
    counts = result.counts[0]
    assert counts.kept > 1800 and counts.saved_by_trim == counts.kept - 1800
    assert all(tensor.counts[0].saved_by_trim == 0 for tensor in result.per_tensor)


@pytest.mark.parametrize("stored", (False, True), ids=("without a head", "with a copy of it"))
@pytest.mark.parametrize(
    "config", ({"tie_word_embeddings": True}, {}, {"text_config": {"tie_word_embeddings": True}})
)
def test_a_head_of_its_own_unties_the_output(tmp_path: Path, stored: bool, config: dict[str, object]) -> None:
    embedding = torch.ones(6, 4)
    base = {"model.embed_tokens.weight": embedding} | (
        {"lm_head.weight": embedding.clone()} if stored else {}
    )
    tuned = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 1}
    recipe = ties(
        checkpoint(tmp_path / "base", base, **config),
        checkpoint(tmp_path / "tuned", tuned, tie_word_embeddings=False),
    )
    me.run(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path / name, {}) for name in ("base", "tuned")]
    with pytest.raises(me.PlanError, match="hold no tensors"):
        me.run(ties(*folders), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_named_twice_is_noted(tmp_path: Path) -> None:
    base, tuned = (checkpoint(tmp_path / name, {"a": torch.ones(3)}) for name in ("base", "tuned"))
    assert any("merged more than once" in note for note in me.run(ties(base, tuned, tuned)).notes)


def test_what_only_the_base_has_is_rounded_like_the_rest(tmp_path: Path) -> None:
    third = torch.full((3,), 1 / 3)
    base = checkpoint(tmp_path / "base", {"a": third, "b": third.clone()})
    tuned = checkpoint(tmp_path / "tuned", {"a": third})
    recipe = ties(base, tuned) | {"dtype": "bfloat16", "out_dtype": "float32"}
    merged = me.run(recipe).tensors
    assert merged is not None and torch.equal(merged["a"], merged["b"])
    assert torch.equal(merged["b"], third.bfloat16().float())


def test_paths_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from merge_engine.cli import show

    base, tuned = (checkpoint(tmp_path / name, {"a": torch.ones(3)}) for name in ("ba[/x]se", "tu[abc]ned"))
    result = me.run(ties(base, tuned), tmp_path / "o[bold]ut")
    show.result(Console(width=500), result)
    shown = capsys.readouterr().out
    assert "tu[abc]ned" in shown and "o[bold]ut" in shown
