"""Fixtures that several test modules share."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

# Threads of torch's own fight over the cores with those under test: the reference takes minutes instead of seconds.
torch.set_num_threads(1)

# On a shared machine the time of an example means nothing.
settings.register_profile("merge_engine", deadline=None)
settings.load_profile("merge_engine")

SaveCheckpoint = Callable[..., Path]
Snapshot = Callable[[str | Path, str], None]

LONGEST = "test_triton_conformance.py"
"""Its one test takes three minutes: where two processes share the files, it must not be the last."""

SNAPSHOTS = Path(__file__).with_name("snapshots")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots",
        action="store_true",
        help="Write the snapshots again; read the difference before you commit it.",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first."""
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture
def assert_snapshot(request: pytest.FixtureRequest) -> Snapshot:
    """Compares a text with a file, or writes it with --update-snapshots. A relative name is in tests/snapshots."""

    def compare(name: str | Path, found: str) -> None:
        file = SNAPSHOTS / name
        if request.config.getoption("--update-snapshots"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(found, encoding="utf-8")
        assert file.exists(), f"{file}: not there yet; pytest --update-snapshots writes it"
        assert found == file.read_text(encoding="utf-8")

    return compare


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps measurements of the tests out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra ``report`` is not installed."""
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.fixture
def save_checkpoint(tmp_path: Path) -> SaveCheckpoint:
    """Writes tensors as a checkpoint folder of this name: one file, or several shards."""

    def save(
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None = None,
        shards: int = 1,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "test", **(config or {})}))
        held = {key: value.contiguous() for key, value in tensors.items()}
        if shards == 1:
            save_file(held, folder / "model.safetensors")
            return folder
        files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
        names = list(held)
        places = {key: files[i * shards // len(names)] for i, key in enumerate(names)}
        for file in files:
            save_file({key: held[key] for key in names if places[key] == file}, folder / file)
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return save
