"""Embeddings and heads cut to the rows that all inputs have: ``unsafe_truncate_embeddings``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_engine.fit import Remarks
from merge_engine.operands import Operand, RowMap, Rows
from merge_engine.text import some
from merge_engine.vocabulary.base import Alignment, alignable
from merge_engine.vocabulary.names import is_vocabulary
from merge_engine.vocabulary.settings import stated_size, with_size


class Truncation(Alignment):
    """Each vocabulary tensor has the first rows that all inputs have. Tokenizers are not looked at.

    The config gets the number of rows, except with ``keep_config``: mergekit leaves it as it is.
    """

    def __init__(self, keep_config: bool):
        self.remarks = Remarks()
        self.written = {}
        self._keep_config = keep_config
        self._cut: dict[str, int] = {}

    def align(
        self, name: str, operands: Sequence[Operand], labels: Sequence[str], has_base: bool
    ) -> list[Operand]:
        """See ``Alignment.align``."""
        if not is_vocabulary(name) or not alignable(operands):
            return list(operands)
        rows = min(operand.shape[0] for operand in operands)
        if all(operand.shape[0] == rows for operand in operands):
            return list(operands)
        self._cut[name] = rows
        first_rows = RowMap.of_runs(rows, [(0, 0, 0)])
        return [each if each.shape[0] == rows else Rows.of([each], first_rows) for each in operands]

    def finish(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Alignment.finish``."""
        if not self._cut:
            return dict(config)
        rows = min(self._cut.values())
        self.remarks.warnings.append(
            f"unsafe_truncate_embeddings: {some(list(self._cut), 3)} have only the first {rows} rows; tokens from "
            f"{rows} on have none, and the result means nothing if the ids below {rows} are not the same tokens in "
            'all models; "tokenizer_source: union" keeps all tokens'
        )
        if self._keep_config:
            self.remarks.warnings.append(
                f"config.json: vocab_size stays {stated_size(config)}, as mergekit leaves it; set it to {rows} to load "
                "the output"
            )
            return dict(config)
        return with_size(config, rows)
