"""The files beside the weights that an output takes over from the donor: they must not change during the merge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from merge_engine.checkpoint import carried_files, encode_config, merged_config
from merge_engine.errors import CheckpointError
from merge_engine.planning import MergePlan
from merge_engine.storage import File
from merge_engine.text import some


def side_files_of(planned: MergePlan) -> dict[str, File]:
    """Config, tokenizer and the like of the donor that the output gets, by name. Raises ``CheckpointError``."""
    other = planned.edits.written.keys() | planned.edits.dropped
    carried = carried_files(planned.donor.path)
    return {name: File.of(path) for name, path in carried.items() if name not in other}


class SideFileWriter(Protocol):
    """Takes files of an output beside its weights (see ``CheckpointTransaction``)."""

    def add_file(self, name: str, data: bytes, /) -> None: ...  # noqa: D102
    def copy_file(self, name: str, source: Path, /) -> None: ...  # noqa: D102


def add_side_files(planned: MergePlan, writer: SideFileWriter, side_files: Mapping[str, File]) -> None:
    """Add config, tokenizer and the like of the donor, with the output's dtype in the config, and what is edited.

    Raises ``CheckpointError`` for a file that cannot be read or has changed, and ``OutputError``.
    """
    for name, file in side_files.items():
        if name == "config.json":
            dtypes = {task.out for task in planned.tasks if task.out.mergeable}
            written = planned.recipe.output_dtype or (dtypes.pop() if len(dtypes) == 1 else None)
            config = merged_config(dict(planned.donor.config), written, planned.untied)
            writer.add_file(name, encode_config(config))
        else:
            writer.copy_file(name, file.path)
    for name, content in planned.edits.written.items():
        writer.add_file(name, content)
    if changed := [file.path.name for file in side_files.values() if File.of(file.path) != file]:
        raise CheckpointError(
            f"{planned.donor.path}: changed while it was merged: {some(changed)}; run the merge again once nothing "
            "writes to it"
        )
