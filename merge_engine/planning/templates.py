"""The output's chat template, where the recipe sets one."""

from __future__ import annotations

import json
import re

from merge_engine.checkpoint.chat_templates import OTHERS, TOKENIZER, find_template, with_template
from merge_engine.fit import Remarks
from merge_engine.planning.side_edits import OutputFiles, SideEdits
from merge_engine.text import some

_SPECIAL = re.compile(r"<[|｜][^\s<>|｜'\"]+[|｜]>|\[\|[^\s|'\"]+\|\]|<(?:start|end)_of_\w+>")
"""How most families write tokens of their own in templates. Shorter ones, such as [INST], may be text."""
_TOKENS = ("tokenizer.json", "added_tokens.json", "vocab.json", "tokenizer.model")


def edit_template(text: str, files: OutputFiles, remarks: Remarks) -> SideEdits:
    """The edits of an output's files, and those that make ``text`` its chat template.

    Templates by other names, such as those for tools, are in the format that is replaced: they are left out, with
    a note. A template that the output has anyway changes nothing. Raises ``CheckpointError`` for files that cannot
    be read.
    """
    present = find_template(files)
    if present is not None and present.text == text.strip():
        return files.edits
    in_files = sorted(name for name in files.names if name.startswith(OTHERS))
    others = [*(present.others if present else ()), *(name.removeprefix(OTHERS) for name in in_files)]
    if others:
        remarks.notes.append(
            f"chat_template: replaces the donor's; its templates by other names are left out: {some(others)}"
        )
    _check_tokens(text, files, remarks)
    return files.edits.then(with_template(files, text), in_files)


def _check_tokens(text: str, files: OutputFiles, remarks: Remarks) -> None:
    """Warn of special tokens that a template writes and the tokenizer would cut into pieces."""
    holding = [raw for name in _TOKENS if (raw := files.read(name)) is not None]
    if not holding:
        remarks.warnings.append("chat_template: the output has no tokenizer that could use it")
        return
    added = (files.settings(TOKENIZER) or {}).get("added_tokens_decoder")
    holding.append(json.dumps(added, ensure_ascii=False).encode())
    missing = [token for token in dict.fromkeys(_SPECIAL.findall(text)) if not _is_in(token, holding)]
    if missing:
        remarks.warnings.append(
            f"chat_template: the output's tokenizer lacks tokens that the template writes, and cuts them into pieces: "
            f"{some(missing)}"
        )


def _is_in(token: str, files: list[bytes]) -> bool:
    """Whether files hold a token, which JSON may write with escapes."""
    return any(form.encode() in raw for raw in files for form in (token, json.dumps(token)[1:-1]))
