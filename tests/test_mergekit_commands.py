"""mergekit's commands under their own names: every option of 0.1.5 is taken, and done or answered."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import SaveCheckpoint
from safetensors.torch import load_file, save_file

import merge_engine as me
from merge_engine.cli import mergekit
from merge_engine.cli.app import call as command_line
from merge_engine.recipe import load_recipe

RECIPE = """\
merge_method: dare_ties
base_model: base
models: [{model: a}, {model: b}]
parameters: {weight: 0.5, density: 0.5}
"""

SWITCHES = (
    *(
        "allow-crimes",
        "trust-remote-code",
        "cuda",
        "low-cpu-memory",
        "lazy-unpickle",
        "read-to-gpu",
        "multi-gpu",
    ),
    *("async-write", "copy-tokenizer", "clone-tensors", "write-model-card", "quiet"),
    *("unsafe-truncate-embeddings", "safe-serialization"),
)
"""mergekit's options that may be given as ``--x`` and as ``--no-x``."""

VALUES = {
    "--transformers-cache": "cache",
    "--lora-merge-cache": "cache",
    "--lora-merge-dtype": "float32",
    "--random-seed": "0",
    "--device": "cpu",
    "--num-threads": "1",
    "-j": "1",
    "--write-threads": "4",
    "--out-shard-size": "1B",
}


@pytest.fixture(autouse=True)
def place(save_checkpoint: SaveCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", "before")  # so that it is as before afterwards
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        save_checkpoint(name, {f"model.layers.{i}.w": torch.randn(16, 8) for i in range(2)})
        Path(name, "tokenizer.json").write_text("{}")
    Path("recipe.yaml").write_text(RECIPE)


def call(monkeypatch: pytest.MonkeyPatch, line: str) -> int:
    """Runs the command line in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["merge-engine", *line.split()])
    return command_line()


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for shard in sorted(Path(folder).glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    me.run("recipe.yaml", "expected")
    return tensors("expected")


def test_every_option_is_taken(
    expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {"safe-serialization": "no-", "cuda": ""}
    given = [f"--{name}" for name in SWITCHES if refused.get(name) != ""]
    given = [option for option in given if option not in ("--quiet",)]
    line = " ".join([*given, *(f"{name} {value}" for name, value in VALUES.items()), "-v -v --gpu-rich"])
    assert call(monkeypatch, f"mergekit-yaml recipe.yaml out {line}") == 0
    assert same(tensors("out"), expected)
    assert os.environ["HF_HUB_CACHE"] == "cache"
    notes = capsys.readouterr().err.splitlines()
    answered = {"async-write", "clone-tensors", "gpu-rich", "lazy-unpickle", "lora-merge-cache", "multi-gpu"}
    answered |= {"lora-merge-dtype", "low-cpu-memory", "read-to-gpu", "trust-remote-code", "write-threads"}
    assert {note.split(":")[1].strip() for note in notes} == {"-v", *(f"--{name}" for name in answered)}
    assert all(note.startswith("note: ") and note.count(": ") == 2 for note in notes)

    line = " ".join(f"--no-{name}" for name in SWITCHES if refused.get(name) != "no-")
    assert call(monkeypatch, f"mergekit-yaml {line} recipe.yaml out") == 0
    assert same(tensors("out"), expected)
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(":")[1].strip() for note in notes] == ["--no-copy-tokenizer", "--no-write-model-card"]


def test_options_that_are_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    me.run(load_recipe("recipe.yaml").model_copy(update={"seed": 7}), "seven")
    assert (
        call(monkeypatch, "mergekit-yaml recipe.yaml out --random-seed 7 --quiet -v --out-shard-size 600")
        == 0
    )
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert same(tensors("out"), tensors("seven")) and len(list(Path("out").glob("*.safetensors"))) == 2
    written = load_recipe(Path("out/mergekit_config.yml"))
    assert (written.seed, written.allow) == (7, ())

    Path("a/config.json").write_text('{"model_type": "another"}')
    assert call(monkeypatch, "mergekit-yaml recipe.yaml out") == 1
    assert "architecture" in capsys.readouterr().err
    assert call(monkeypatch, "mergekit-yaml recipe.yaml out --allow-crimes") == 0
    assert load_recipe(Path("out/mergekit_config.yml")).allow == ("architecture",)


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[object] = []
    monkeypatch.setattr(mergekit, "merge", lambda *arguments, **options: devices.append(options["device"]))
    for line in ("", "--cuda", "--gpu-rich", "--device cpu --cuda", "--device cuda:1", "--no-cuda"):
        assert call(monkeypatch, f"mergekit-yaml recipe.yaml out {line}") == 0
    assert devices == ["auto", "cuda", "cuda", "cpu", "cuda:1", "auto"]


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("mergekit-yaml recipe.yaml out --no-safe-serialization", 2, "only safetensors are written"),
        (
            "mergekit-yaml recipe.yaml out --random-seed -1",
            2,
            "random_seed: must be a whole number from 0 to 2**64 - 1",
        ),
        ("mergekit-yaml recipe.yaml out --out-shard-size lots", 2, "'lots' is not a size"),
        ("mergekit-yaml recipe.yaml out -j 0", 2, "threads: must be a whole number from 1"),
        ("mergekit-yaml recipe.yaml out --device mps", 2, 'there is no device "mps"'),
        ("mergekit-yaml recipe.yaml", 2, "missing argument 'out_path'"),
        ("mergekit-yaml nowhere.yaml out", 1, "nowhere.yaml: cannot read the recipe"),
        ("mergekit-multi recipe.yaml -I parts", 2, "--out-path: required"),
        ("mergekit-multi recipe.yaml --out-path out", 2, "missing option '--intermediate-dir'"),
        ("mergekit-pytorch two.yaml out", 1, "two.yaml: holds 2 recipes, and one is needed here"),
        ("mergekit-pytorch lost.yaml out -i", 1, "./lost: there is no such folder or file"),
    ],
)
def test_bad_input_is_one_line_and_no_output(
    line: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("two.yaml").write_text(f"name: x\n{RECIPE}---\n{RECIPE}")
    Path("lost.yaml").write_text(RECIPE.replace("model: a", "model: ./lost"))
    assert call(monkeypatch, line) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ") and message in said
    assert not Path("out").exists()


def test_an_earlier_output_is_replaced(
    expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RECIPE.replace("dare_ties", "ties")
    me.run(other, "out", shard_size=600)
    Path("base/mergekit_config.yml").write_text("that of the base")
    assert call(monkeypatch, "mergekit-yaml recipe.yaml out") == 0
    assert same(tensors("out"), expected) and me.verify("out").complete
    assert Path("out/mergekit_config.yml").read_text() == load_recipe("recipe.yaml").to_yaml()


DOCUMENTS = (
    f"{RECIPE}---\nname: mean\nmerge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\n".replace(
        "[{model: a}, {model: b}]\nparameters: {weight: 0.5, d",
        "[{model: mean}]\nparameters: {weight: 0.5, d",
    )
    + "parameters: {weight: 0.5}\n"
)


def test_multi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(DOCUMENTS)
    command = "mergekit-multi recipe.yaml --intermediate-dir parts"
    assert call(monkeypatch, f"{command} --out-path out --quiet") == 0
    made = Path("parts/mean/model.safetensors").stat().st_mtime_ns
    assert me.verify("parts/mean").complete and me.verify("out", inputs=True).complete
    assert call(monkeypatch, f"{command} --out-path out --lazy") == 0
    assert Path("parts/mean/model.safetensors").stat().st_mtime_ns == made
    assert call(monkeypatch, f"{command} --out-path out --no-lazy") == 0
    assert Path("parts/mean/model.safetensors").stat().st_mtime_ns > made
    capsys.readouterr()

    Path("recipe.yaml").write_text("name: last\n" + DOCUMENTS)
    assert call(monkeypatch, f"{command} --quiet --out-path unused") == 0
    assert (
        capsys.readouterr().err == "note: --out-path: not used, because all recipes in the file have a name\n"
    )
    assert not Path("unused").exists() and same(tensors("parts/last"), tensors("out"))


def test_pytorch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("files").mkdir()
    one, other = {"x": torch.ones(4), "y": torch.ones(2)}, {"x": torch.zeros(4), "z[0]": torch.zeros(2)}
    torch.save(one, "files/one.pt")
    save_file(other, "files/other.safetensors")
    Path("files.yaml").write_text(
        "merge_method: linear\nmodels: [{model: files/one.pt}, {model: files/other.safetensors}]\n"
        "parameters: {weight: 0.5}\n"
    )
    assert call(monkeypatch, "mergekit-pytorch files.yaml out") == 1
    assert capsys.readouterr().err == (
        "error: files/one.pt: y: not in every model; -u merges what any model has, -i what all have\n"
        "error: files/other.safetensors: z[0]: not in every model; -u merges what any model has, -i what all have\n"
    )
    assert call(monkeypatch, "mergekit-pytorch files.yaml out -i") == 0
    assert same(tensors("out"), {"x": torch.full((4,), 0.5)})
    assert call(monkeypatch, "mergekit-pytorch files.yaml out --tensor-union") == 0
    assert same(tensors("out"), {"x": torch.full((4,), 0.5), "y": torch.ones(2), "z[0]": torch.zeros(2)})
