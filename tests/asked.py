"""Scripts in tests/oracle that answer one job after the other, in mergekit's environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest

Ask: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def answering(script: str) -> Iterator[Ask]:
    """A function from a job to the answer of a script, which runs until the context ends."""
    python = os.environ.get("MERGE_ENGINE_ORACLE")
    if not python:
        pytest.skip("MERGE_ENGINE_ORACLE is not set (tests/oracle/README.md)")
    command = [python, str(Path(__file__).parent / "oracle" / script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        questions, answers = process.stdin, process.stdout
        assert questions is not None and answers is not None

        def ask(job: dict[str, Any]) -> dict[str, Any]:
            print(json.dumps(job), file=questions, flush=True)
            found: dict[str, Any] = json.loads(answers.readline())
            return found

        yield ask
