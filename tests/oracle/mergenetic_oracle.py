"""What mergenetic's mergers make of vectors, in mergekit's environment: one JSON object a line in, one a line out.

In: ``merger`` (the name of a class), ``given`` (the arguments that are its own) and ``vector``. Out: ``recipe``, YAML.
The rest of mergenetic, which needs much more, is not imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

MODULES = {
    "LinearMerger": "linear_merger",
    "SlerpMerger": "slerp_merger",
    "TaskArithmeticMerger": "taskarithmetic_merger",
    "TiesMerger": "ties_merger",
    "TiesDareMerger": "ties_dare_merger",
    "DareTaskArithmeticMerger": "dare_taskarithmetic_merger",
}


def only_its_mergers() -> None:
    """Stand in for mergenetic's package, whose import needs all that it ever uses."""
    found = importlib.util.find_spec("mergenetic")
    if found is None:
        sys.exit("mergenetic is not installed (tests/oracle/README.md)")
    package: Any = ModuleType("mergenetic")
    package.__path__ = found.submodule_search_locations
    package.clean_gpu = lambda: None
    sys.modules["mergenetic"] = package


def answer(job: dict[str, Any], folder: str) -> dict[str, str]:
    module = importlib.import_module(f"mergenetic.merging.{MODULES[job['merger']]}")
    merger = getattr(module, job["merger"])(
        run_id="run", path_to_store_yaml=folder, path_to_store_merged_model=folder, **job["given"]
    )
    return {"recipe": Path(merger.create_individual_configuration(np.array(job["vector"]))).read_text()}


if __name__ == "__main__":
    only_its_mergers()
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line), folder)), flush=True)
