"""Rows that are brought together by their tokens: ``tokenizer`` and ``tokenizer_source``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_engine.checkpoint import Checkpoint, locate, read_settings
from merge_engine.errors import CheckpointError
from merge_engine.fit import Remarks
from merge_engine.operands import Operand
from merge_engine.recipe import (
    BASE,
    UNION,
    ModelReference,
    ModelToken,
    Recipe,
    TokenizerSettings,
    TokenSettings,
    ZeroRow,
    exclude_key,
)
from merge_engine.storage.bounded import MAX_CONFIG
from merge_engine.text import counted, shown, some
from merge_engine.vocabulary.base import Alignment, alignable
from merge_engine.vocabulary.files import encode_settings, tokenizer_edits
from merge_engine.vocabulary.inputs import Input, compare, read_inputs
from merge_engine.vocabulary.names import is_vocabulary, may_be_vocabulary
from merge_engine.vocabulary.settings import named_tokens, stated_size, with_ids, with_size
from merge_engine.vocabulary.sources import Origin, RowSources, TokenRow
from merge_engine.vocabulary.tokenizer import TOKENIZER_CONFIG, Tokenizer, read_tokenizer, some_tokens
from merge_engine.vocabulary.union import Named, unite, with_tokens

_GENERATION = "generation_config.json"


@dataclass(frozen=True, eq=False)
class _Output:
    """The output's tokenizer. ``folder`` has its other files, and the tokenizer ``in_files`` before any change."""

    folder: Path
    in_files: Tokenizer
    tokenizer: Tokenizer
    least_rows: int


class ByTokens(Alignment):
    """All inputs get the rows of the output's tokens. Raises ``CheckpointError`` for what cannot be read."""

    def __init__(self, recipe: Recipe, opened: Mapping[ModelReference, Checkpoint], donor: ModelReference):
        settings = recipe.vocabulary
        assert settings is not None
        self.remarks = Remarks(allowed=recipe.allow)
        self._settings: TokenizerSettings = settings
        self._opened = opened
        self._mergekit = recipe.arithmetic == "mergekit"
        self._inputs = read_inputs(opened, donor, self.remarks)
        self._telling = {label: each.rows for label, each in self._inputs.items() if each.rows_tell}
        self._donor = self._inputs[opened[donor].label]
        compare(self._donor, list(self._inputs.values()), self.remarks)
        self._output = self._make_output()
        given = dict(self._given())
        if self.remarks.problems:  # they say why rows cannot be decided
            raise CheckpointError(self.remarks.problems)
        self._sources = self._make_sources(given)
        self._undecided: list[str] = []
        self.written, self.dropped = tokenizer_edits(
            self._output.folder,
            self._output.tokenizer,
            self._output.tokenizer is not self._output.in_files,
            self._donor.checkpoint.folder,
            self.remarks.warnings,
        )

    def align(
        self, name: str, operands: Sequence[Operand], labels: Sequence[str], has_base: bool
    ) -> list[Operand]:
        """See ``Alignment.align``."""
        if is_vocabulary(name) and alignable(operands):
            spare = {
                label: each.checkpoint.tensors[name]
                for label, each in self._inputs.items()
                if label not in labels and name in each.checkpoint.tensors
            }
            if not alignable([*operands, *spare.values()]):
                spare = {}
            return self._sources.align(name, operands, labels, has_base, spare)
        if self._moves_rows and any(
            may_be_vocabulary(name, operand, self._telling.get(label))
            for operand, label in zip(operands, labels, strict=True)
        ):
            self._undecided.append(name)
        return list(operands)

    def finish(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Alignment.finish``."""
        self._report()
        rows, config = self._sources.rows, dict(config)
        if rows != self._donor.rows or rows != (stated_size(config) or rows):
            config = with_size(config, rows)
        if all(self._output.tokenizer.ids.get(t) == i for t, i in self._donor.in_files.ids.items()):
            return config
        lost: dict[str, Any] = {}
        own = self._own_ids()
        config = with_ids(config, self._new_id, own, lost)
        generation = read_settings(self._donor.checkpoint.folder / _GENERATION, MAX_CONFIG)
        if generation is not None:
            changed = with_ids(generation, self._new_id, own, lost)
            if changed != generation:
                self.written = {**self.written, _GENERATION: encode_settings(changed)}
        if lost:
            keys = [f"{key} ({shown(ids)} in {self._donor.label})" for key, ids in lost.items()]
            self.remarks.warnings.append(
                f"tokenizer: the output's vocabulary lacks the tokens of {some(keys)}, which are null in its settings; "
                "set them to ids of other tokens"
            )
        return config

    def _new_id(self, i: int) -> int | None:
        """The output's id of a token that has the id ``i`` in the donor. An id that is no token stays."""
        token = self._donor.in_files.tokens.get(i)
        return i if token is None else self._output.tokenizer.ids.get(token)

    def _own_ids(self) -> Mapping[str, Any]:
        """The ids of special tokens where the output's tokenizer comes from."""
        folder, own = self._output.folder, {}
        own.update(
            named_tokens(
                read_settings(folder / TOKENIZER_CONFIG, MAX_CONFIG) or {}, self._output.tokenizer.ids
            )
        )
        for name in ("config.json", _GENERATION):
            own.update(read_settings(folder / name, MAX_CONFIG) or {})
        return own

    def _make_output(self) -> _Output:
        source = self._settings.source
        donor = self._donor
        if source == UNION:
            first = Named(donor.label, donor.tokenizer)
            others = [each for each in self._inputs.values() if each is not donor]
            union = unite(first, [Named(each.label, each.tokenizer) for each in others])
            self.remarks.notes += union.notes
            self.remarks.warnings += union.warnings
            folder, in_files, made = donor.checkpoint.folder, donor.in_files, union.tokenizer
            least = donor.rows
        elif source == BASE or self._input(source) is not None:
            chosen = donor if source == BASE else self._input(source)
            assert chosen is not None
            folder, in_files, made = chosen.checkpoint.folder, chosen.in_files, chosen.tokenizer
            least = chosen.rows
        else:
            located = locate(source.path, source.revision, weights=False)
            folder = located if located.is_dir() else located.parent
            in_files = made = read_tokenizer(folder)
            least = 0
        made = with_tokens(made, self._settings.tokens or {})
        for each in self._inputs.values():
            if dropped := [token for token in each.tokenizer.ids if token not in made.ids]:
                self.remarks.warnings.append(
                    f"tokenizer: the output lacks {counted(len(dropped), 'token')} of {each.label}: "
                    f'{some_tokens(dropped)}; to keep them, set "tokenizer_source: union"'
                )
        return _Output(folder, in_files, made, least)

    def _input(self, reference: ModelReference) -> Input | None:
        """The input of this name, however its path is written."""
        checkpoint = self._opened.get(reference)
        if checkpoint is None and reference.revision is None and reference.lora is None:
            path = Path(reference.path).expanduser()
            there = (each for each in self._opened.values() if each.adapter is None)
            checkpoint = next((each for each in there if path.exists() and path.samefile(each.path)), None)
        return None if checkpoint is None else self._inputs[checkpoint.label]

    def _given(self) -> Iterator[tuple[int, TokenRow]]:
        """What the recipe says of single tokens, by their ids in the output."""
        for token, settings in (self._settings.tokens or {}).items():
            place = f"tokenizer.tokens.{token}"
            if settings.source is not None:
                found = self._token_row(place, token, settings)
                if found is not None:
                    yield self._output.tokenizer.ids[token], found
            elif settings.force:
                self.remarks.problems.append(
                    f"{place}: force needs a source; name the model that the row comes from"
                )

    def _token_row(self, place: str, token: str, settings: TokenSettings) -> TokenRow | None:
        source = settings.source
        if isinstance(source, ZeroRow):
            return TokenRow(None, None, settings.force)
        assert source is not None
        reference = source.model if isinstance(source, ModelToken) else source
        found = self._input(reference)
        problems = self.remarks.problems
        if found is None:
            names = some([each.label for each in self._inputs.values()])
            problems.append(f"{place}: {reference} is not merged here; name one of {names}")
            return None
        if isinstance(source, ModelToken) and source.token_id is not None:
            row = source.token_id
            if row >= found.rows:
                problems.append(
                    f"{place}: {found.label} has {found.rows} rows, so token_id {row} has none; name one below that"
                )
        else:
            wanted = source.token if isinstance(source, ModelToken) and source.token is not None else token
            row = found.tokenizer.ids.get(wanted, -1)
            if row < 0:
                problems.append(
                    f"{place}: {found.label} has no token {shown(wanted)}; name a model that has it"
                )
        return TokenRow(found.checkpoint.label, row, settings.force)

    def _make_sources(self, given: Mapping[int, TokenRow]) -> RowSources:
        made = self._output.tokenizer
        multiple = self._settings.pad_to_multiple_of
        rows = made.size if multiple or self._mergekit else max(made.size, self._output.least_rows)
        if multiple:
            rows = -(-rows // multiple) * multiple
        origin: Origin = self._settings.origin or ("mergekit" if self._mergekit else "mean")
        own = {label: self._column(each, rows) for label, each in self._inputs.items()}
        self._moves_rows = any(
            each.rows != rows or own[label] != list(range(rows)) for label, each in self._inputs.items()
        ) or any(row.force for row in given.values())
        return RowSources(own, made.tokens, rows, self._donor.checkpoint.label, origin, given)

    def _column(self, given: Input, rows: int) -> list[int]:
        """The id of each row of the output in an input, -1 where it has none.

        A row that is no token of the output is the one at the same place, if that is none of the input's tokens: models
        have more rows than tokens, so that their number is a multiple of 64 or 128.
        """
        ids, taken, named = given.tokenizer.ids, given.tokenizer.tokens, self._output.tokenizer.tokens
        if self._mergekit:
            return [ids.get(named[i], -1) if i in named else -1 for i in range(rows)]
        return [
            ids.get(named[i], -1) if i in named else -1 if i in taken or i >= given.rows else i
            for i in range(rows)
        ]

    def _report(self) -> None:
        problems, sources = self.remarks.problems, self._sources
        if sources.without_source:
            tokens = list(sources.without_source)
            name = next(iter(sources.without_source.values()))
            line = (
                f"tokenizer: {name} has no row in any input for {counted(len(tokens), 'token')}: "
                f"{some_tokens(tokens)}; name a source for each under tokenizer.tokens, such as "
                "{source: {kind: zero}}"
            )
            if self._mergekit:
                self.remarks.warnings.append(f"{line}; zeros are written, as mergekit does")
            else:
                problems.append(line)
        for (label, token), name in sources.lacking.items():
            problems.append(
                f"tokenizer.tokens.{token}: {name} of {label} has no row for it; name another model"
            )
        if self._undecided:
            problems.append(
                f"{some(self._undecided, 3)}: as many rows as the vocabulary, but a name that does not say whether "
                f"they belong to tokens; leave such tensors out with {exclude_key(self._undecided[0])}"
            )
