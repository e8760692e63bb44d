"""Results as JSON, one file a run, named by date and subject."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import cache_folder
from benchmarks.machine import describe

RESULTS = Path(__file__).with_name("results")


def save(subject: str, mergekit: str | None, results: dict[str, Any]) -> Path:
    """Write results together with date, machine and versions. Returns the file."""
    now = datetime.now(timezone.utc)
    document = {"date": now.isoformat(timespec="seconds"), **describe(cache_folder(), mergekit), **results}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{now:%Y-%m-%d-%H%M}-{subject}.json"
    file.write_text(json.dumps(document, indent=2) + "\n")
    return file
