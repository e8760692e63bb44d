"""The recipe's key ``tensors``: names that are mapped to others, and tensors that are left out."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from merge_engine.text import shown


class TensorNames(BaseModel):
    """Which tensors of an input take part in the merge, and under which names.

    ``rename`` has the new text by the text at the start of a name; the first entry that fits is used, and "" fits
    every name. ``exclude`` has patterns of whole names, as the shell knows them (``*``, ``?``, ``[abc]``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    exclude: tuple[str, ...] = ()
    rename: dict[str, str] = {}

    def to_plain(self) -> dict[str, object]:
        """The keys that are set, as in a recipe."""
        exclude = {"exclude": list(self.exclude)} if self.exclude else {}
        return exclude | ({"rename": self.rename} if self.rename else {})


def rename_key(renames: Mapping[str, str]) -> str:
    """The text of a recipe that maps names, for a message."""
    entries = ", ".join(f"{shown(old)}: {shown(new)}" for old, new in renames.items())
    return f"tensors: {{rename: {{{entries}}}}}"


def exclude_key(pattern: str) -> str:
    """The text of a recipe that leaves tensors out, for a message."""
    return f"tensors: {{exclude: [{shown(pattern)}]}}"
