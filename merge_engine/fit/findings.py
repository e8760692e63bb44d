"""What an examination of the inputs found."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from merge_engine.recipe import Misfit


@dataclass
class Findings:
    """What does not fit, one line for each cause: ``problems`` prevent the merge, ``warnings`` and ``notes`` do not.

    ``allowed`` are the kinds of misfits that the recipe allows. ``explain_tensors`` says that a problem is the cause of
    names and shapes that differ as well. ``stale_keys`` are the keys of the donor's config.json that are wrong for
    the output. ``copies`` are the recipe positions of models whose tensors are those of the base, byte for byte.
    """

    allowed: Collection[Misfit] = ()
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    explain_tensors: bool = False
    stale_keys: Collection[str] = ()
    copies: frozenset[int] = frozenset()

    def misfit(self, kind: Misfit, line: str, *, explains_tensors: bool = False) -> None:
        """A misfit that makes the result meaningless: a problem, or a warning if the recipe allows its kind."""
        if kind in self.allowed:
            self.warnings.append(line)
        else:
            self.problems.append(f'{line}; if this is meant, add "allow: [{kind}]" to the recipe')
            self.explain_tensors |= explains_tensors
