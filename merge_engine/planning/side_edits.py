"""The files beside the weights that an output has otherwise than the donor, whose files it inherits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_engine.checkpoint import parse_settings, read_settings
from merge_engine.errors import CheckpointError, way_out
from merge_engine.storage.bounded import MAX_CONFIG, MAX_TOKENIZER, read_bounded


@dataclass(frozen=True)
class SideEdits:
    """Files beside the weights that the output has otherwise than the donor: ``written`` by name, and ``dropped``."""

    written: Mapping[str, bytes] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()

    def then(self, written: Mapping[str, bytes], dropped: Iterable[str] = ()) -> SideEdits:
        """These edits and later ones, which count where both change a file."""
        gone = frozenset(dropped)
        kept = {name: content for name, content in self.written.items() if name not in gone}
        return SideEdits({**kept, **written}, (self.dropped | gone) - written.keys())


@dataclass(frozen=True)
class OutputFiles:
    """The files beside the weights that the output has: those it inherits, by name, after some edits.

    Raises ``CheckpointError`` if one cannot be read or is no JSON object where there must be one.
    """

    carried: Mapping[str, Path]
    edits: SideEdits

    @property
    def names(self) -> frozenset[str]:
        """The names of all of them."""
        return (frozenset(self.carried) | self.edits.written.keys()) - self.edits.dropped

    def read(self, name: str) -> bytes | None:
        """The bytes of a file; None if the output has no such file."""
        if name not in self.names:
            return None
        if name in self.edits.written:
            return self.edits.written[name]
        path = self.carried[name]
        try:
            return read_bounded(path, MAX_TOKENIZER)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}{way_out(error)}") from error

    def settings(self, name: str) -> Mapping[str, Any] | None:
        """The JSON object in a file of at most 10 MB; None if the output has no such file."""
        if name in self.edits.written:
            return parse_settings(self.edits.written[name], Path(name))
        return read_settings(self.carried[name], MAX_CONFIG) if name in self.names else None
