"""The tests of the Triton kernels in Triton's interpreter: a process of its own, beside the other tests.

The first import of the kernels decides whether they are interpreted. That takes as long as all other tests together, so
it is started when the tests are collected.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
FILES = ("test_conformance.py", "triton_kernels.py", "triton_streaming.py")


class Interpreted:
    """The running tests."""

    def __init__(self) -> None:
        command = [
            sys.executable,
            "-W",
            "ignore::RuntimeWarning",
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
        ]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "MERGE_ENGINE_TEST_BACKENDS": "triton"}
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 (until ``end``)
        self._process = subprocess.Popen(
            [*command, *(TESTS / file for file in FILES)],
            cwd=TESTS.parent,
            env=environment,
            stdout=self._printed,
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> tuple[int, str]:
        """The exit status, and what was printed, once all tests have ended."""
        status = self._process.wait()
        self._printed.seek(0)
        return status, self._printed.read()

    def end(self) -> None:
        """End the tests if they still run, and forget what they printed."""
        self._process.kill()
        self._process.wait()
        self._printed.close()
