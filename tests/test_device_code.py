"""The arithmetic headers compile as CUDA device code, without fused multiply-add and without spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_arithmetic_compiles_for_every_architecture(tmp_path: Path) -> None:
    source = Path(__file__).with_name("device_arithmetic.cu")
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", "--threads=0", "-c", str(source)]
    command += [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
    built = subprocess.run([*command, "-o", str(tmp_path / "object.o")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", built.stderr)]
    assert len(spills) == 4 * len(ARCHITECTURES) and not any(spills)
