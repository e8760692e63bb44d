"""Names of models: folders are used as they are, other names are looked up on the hub (here a stand-in)."""

from __future__ import annotations

import errno
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from merge_engine.checkpoint import locate
from merge_engine.errors import CheckpointError


class Hub:
    """Stands in for ``snapshot_download``: a repository with the given files, or an error."""

    def __init__(self, folder: Path, files: list[str], error: Exception | None = None):
        self.folder, self.files, self.error = folder, files, error
        self.calls: list[tuple[str, str | None, list[str]]] = []

    def __call__(
        self, repo: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        self.calls.append((repo, revision, allow_patterns))
        if self.error:
            raise self.error
        wanted = huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in wanted:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).touch()
        return str(self.folder)

    def fetched(self) -> set[str]:
        return {file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()}


def install(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, Hub(tmp_path, []))
    assert locate(str(tmp_path), None) == tmp_path
    with pytest.raises(CheckpointError, match="this is a local path"):
        locate(str(tmp_path), "main")
    assert hub.calls == []


def test_repository_with_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "LICENSE",
    ]
    unwanted = [
        *("pytorch_model.bin", "README.md", "onnx/model.safetensors", "consolidated.safetensors"),
        *("4bit/model.safetensors", "checkpoint-500/model.safetensors", "2_Dense/pytorch_model.bin"),
    ]
    hub = install(monkeypatch, Hub(tmp_path / "snapshot", files + unwanted))
    assert locate("owner/name", "v1") == tmp_path / "snapshot"
    assert hub.fetched() == set(files)
    assert [call[:2] for call in hub.calls] == [("owner/name", "v1")]


def test_repository_with_pickles_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, Hub(tmp_path / "snapshot", ["config.json", "pytorch_model.bin"]))
    locate("owner/name", None)
    assert hub.fetched() == {"config.json", "pytorch_model.bin"}


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("cannot reach the hub\nmore lines"),
        HFValidationError("Repo id must be different"),
        ConnectionError("\nno network"),
        RuntimeError(),
    ],
)
def test_errors_are_one_line(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Hub(tmp_path, [], error))
    with pytest.raises(CheckpointError, match=r"^o/m: neither a folder here nor a model") as caught:
        locate("o/m", "v2")
    assert "\n" not in str(caught.value)
    assert "v2" in str(caught.value)
    assert str(caught.value).rpartition(": ")[2]


def refused(path: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(path, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_paths_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no such folder or file" in refused("~nosuchuser/model")
    assert "cannot be read: File name too long" in refused(str(tmp_path / ("x" * 300)))

    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    assert refused(str(tmp_path)) == f"{tmp_path}: cannot be read: Permission denied; check its permissions"


def test_mistyped_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama-instruct").mkdir()
    typed = tmp_path / "lama-instruct"
    message = refused(str(typed))
    assert message == f"{typed}: there is no such folder or file; did you mean {tmp_path / 'llama-instruct'}?"
    assert refused(str(tmp_path / "mistral")).endswith("there is no such folder or file")
    assert refused(str(tmp_path / "no" / "llama-instruct")).endswith("there is no such folder or file")
    install(monkeypatch, Hub(tmp_path, [], RuntimeError("no network")))
    monkeypatch.chdir(tmp_path)
    assert refused("lama-instruct").endswith("no network; did you mean llama-instruct?")
