"""Results as JSON, with the date, the machine, its limits, and versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from merge_engine.bench.limits import Limits
from merge_engine.bench.machine import describe
from merge_engine.bench.suite import Result, Suite
from merge_engine.bench.tables import fits


def save(file: Path, suite: Suite, limits: Limits, results: Sequence[Result]) -> None:
    """Write the results so far as JSON. Raises ``OSError``."""
    disks = {"inputs": suite.root, "output": suite.output}
    rates = {use: limits.disk(folder) for use, folder in disks.items()}
    document = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **describe(disks, suite.mergekit),
        "limits_bytes_per_second": {
            "memory": limits.memory,
            "link": limits.link,
            **{use: asdict(rate) for use, rate in rates.items() if rate},
        },
        "cases": [result.as_dict() for result in results],
        "seconds_by_bytes": [
            {"method": method, "cache": cache, "contestant": name, **asdict(line)}
            for (method, cache, name), line in fits(results).items()
        ],
    }
    file.write_text(json.dumps(document, indent=1) + "\n")
