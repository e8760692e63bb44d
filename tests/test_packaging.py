"""What is in the source tree is in the package: every folder of modules, and every file that is no module."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
BUILT = (".so", ".pyc")


def test_every_folder_of_modules_is_a_package() -> None:
    found = {
        ".".join(init.parent.relative_to(ROOT).parts) for init in ROOT.glob("merge_engine/**/__init__.py")
    }
    assert found | {"merge_engine.kernels"} == set(SETUPTOOLS["packages"])
    assert SETUPTOOLS["package-dir"] == {"merge_engine.kernels": "kernels"}


def test_every_file_of_a_package_is_in_it() -> None:
    lost = []
    for folder in ("merge_engine", "kernels"):
        for file in ROOT.glob(f"{folder}/**/*"):
            if file.is_dir() or file.suffix in BUILT:
                continue
            package = next(parent for parent in file.parents if (parent / "__init__.py").exists())
            name = ".".join(package.relative_to(ROOT).parts)
            patterns = [*SETUPTOOLS["package-data"].get(name, []), "*.py"]
            if not any(fnmatch.fnmatchcase(str(file.relative_to(package)), pattern) for pattern in patterns):
                lost.append(str(file.relative_to(ROOT)))
    assert lost == []
