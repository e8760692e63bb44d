"""All reasons not to write to a folder are found before the work begins."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from written import NEW, ONE_FILE, STATE, names_in, plan, write_all

from merge_engine.checkpoint import CheckpointWriter, check_output_folder
from merge_engine.errors import OutputError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    return tmp_path / "model"


def the_problem(folder: Path, inputs: list[Path], overwrite: bool = False, needed: int = 0) -> str:
    (problem,) = check_output_folder(folder, inputs, overwrite, needed)
    assert str(folder) in problem
    assert "\n" not in problem
    return problem


def test_good_folders(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new", tmp_path / "a" / "b", tmp_path / "empty"):
        assert check_output_folder(folder, [model], False, 1000) == []
    (tmp_path / "empty" / "old.txt").touch()
    assert check_output_folder(tmp_path / "empty", [model], True, 1000) == []
    assert not (tmp_path / "new").exists()


def test_folder_in_use(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("model.safetensors.part", "model-00002-of-00003.safetensors.record.part"):
        (folder / name).touch()
    (folder / f"merge-{'0a' * 16}.part").mkdir()
    assert check_output_folder(folder, [model], False, 0) == []  # nothing but the rest of a killed merge
    (folder / "notes.txt").touch()
    assert "is not empty; choose another folder or pass --overwrite" in the_problem(folder, [model])
    assert check_output_folder(folder, [model], True, 0) == []


@pytest.mark.parametrize(
    ("present", "refused"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["model.safetensors", "pytorch_model.bin.index.json"], "pytorch_model.bin.index.json"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "adapter_config.json, adapter_model.safetensors",
        ),
        (["consolidated.safetensors"], "consolidated.safetensors"),
        (["model.safetensors", "adapter.safetensors"], None),
        (["model-00001-of-00002.safetensors", "config.json"], None),
    ],
)
def test_weights_that_would_be_loaded_with_the_new_files(
    present: list[str], refused: str | None, tmp_path: Path
) -> None:
    for name in present:
        (tmp_path / name).touch()
    if refused is None:
        assert check_output_folder(tmp_path, [], True, 0) == []
        return
    expected = (
        f"{tmp_path}: holds {refused}, which a loader could take together with the new files; remove it"
    )
    assert the_problem(tmp_path, [], overwrite=True).startswith(expected)
    with pytest.raises(OutputError, match="which a loader could take"):
        CheckpointWriter(tmp_path, plan(STATE), overwrite=True)
    assert names_in(tmp_path) == sorted(present)


def test_a_rest_of_a_merge_that_no_merge_can_use(tmp_path: Path) -> None:
    """`plan` refuses what `run` would."""
    (tmp_path / "merge.part").mkdir()
    assert check_output_folder(tmp_path, [], False, 0) == []
    (tmp_path / "merge.part" / "mine.txt").touch()
    assert "mine.txt: no merge knows this file" in the_problem(tmp_path, [])
    (tmp_path / "merge.part" / "journal").write_text("{")
    assert "journal: is damaged" in the_problem(tmp_path, [], overwrite=True)
    shutil.rmtree(tmp_path / "merge.part")
    (tmp_path / "merge.part").symlink_to("elsewhere")
    assert "merge.part: is in the way" in the_problem(tmp_path, [], overwrite=True)


def test_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("none")
    assert f"a link to {tmp_path / 'none'}, which does not exist" in the_problem(tmp_path / "link", [])


@pytest.mark.parametrize("name", ["model.safetensors.part", "model.safetensors.record.part"])
def test_a_folder_with_the_name_of_a_part_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with (
        pytest.raises(OutputError, match=f"{name}: cannot be written: .*; .*move "),
        CheckpointWriter(
            tmp_path, plan(NEW, ONE_FILE), key="one", overwrite=True, record=lambda _: b""
        ) as writer,
    ):
        write_all(writer, NEW)
        writer.finish()
    assert names_in(tmp_path) == [name]


def test_parts_of_a_killed_merge_need_no_room_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(bytes(40_960))
    (tmp_path / f"merge-{'0a' * 16}.part").mkdir()
    (tmp_path / f"merge-{'0a' * 16}.part" / "x").write_bytes(bytes(40_960))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 0))  # type: ignore[attr-defined]
    assert check_output_folder(tmp_path, [], False, 81_920) == []
    assert "needs 0.2 MB" in the_problem(tmp_path, [], needed=200_000)


def test_inputs_are_never_written_to(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(model)
    for folder in (model, link, model / ".." / "model"):
        for source in (model, link, model / "model.safetensors"):
            assert "is the folder of the input" in the_problem(folder, [source, source], overwrite=True)
    (tmp_path / "links").mkdir()
    linked_file = tmp_path / "links" / "renamed.safetensors"
    linked_file.symlink_to(model / "model.safetensors")
    assert "is the folder of the input" in the_problem(model, [linked_file], overwrite=True)
    for folder in (model / "out", link / "a" / "out", tmp_path):
        assert "inside or around the input" in the_problem(folder, [model], overwrite=True)


def test_files_in_the_way(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in the_problem(file, [])
    assert "is a file, no folder" in the_problem(file / "out", [])


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert f"no permission to write to {tmp_path}" in the_problem(tmp_path / "out", [])


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> object:
        asked.append(path)
        return shutil._ntuple_diskusage(10**10, 10**10 - 2_500_000_000, 2_500_000_000)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    problem = the_problem(tmp_path / "a" / "b", [], needed=14_000_000_000)
    assert "needs 14.00 GB, its disk has 2.50 GB free" in problem
    assert asked == [tmp_path]


def test_all_problems_at_once(model: Path) -> None:
    assert len(check_output_folder(model, [model], False, 10**18)) == 3


def test_files_may_be_merged_into_a_folder_beside_them(model: Path, tmp_path: Path) -> None:
    for folder in (model / "out", tmp_path / "out"):
        assert check_output_folder(folder, [model / "model.safetensors"], False, 0) == []


def test_paths_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "File name too long" in the_problem(tmp_path / ("x" * 300), [])
    (tmp_path / "circle").symlink_to("circle")
    assert "leads back to itself" in the_problem(tmp_path / "circle" / "out", [])

    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    assert "Permission denied" in the_problem(tmp_path / "out", [])
