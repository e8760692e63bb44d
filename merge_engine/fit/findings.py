"""What an examination of the inputs found."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from merge_engine.recipe import Misfit


@dataclass
class Remarks:
    """Messages about inputs, one line for each cause.

    ``problems`` prevent the merge, ``warnings`` say what may be wrong, and ``notes`` what was done. ``allowed`` are
    the kinds of misfits that the recipe allows.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    allowed: Collection[Misfit] = ()

    def misfit(self, kind: Misfit, line: str, way_out: str = "") -> bool:
        """Report a misfit that makes the result meaningless, and say whether it is a problem.

        It has a way out before the key that allows it. If the recipe allows this kind, it is a warning.
        """
        if kind in self.allowed:
            self.warnings.append(line)
            return False
        ways = f"{way_out}; " if way_out else ""
        self.problems.append(f'{line}; {ways}if this is meant, add "allow: [{kind}]" to the recipe')
        return True


@dataclass
class Findings(Remarks):
    """What does not fit.

    ``explain_tensors`` says that a problem is the cause of names and shapes that differ as well. ``stale_keys`` are
    the keys of the donor's config.json that are wrong for the output. ``copies`` are the recipe positions of models
    whose tensors are those of the base, byte for byte. ``chat_template`` is the Jinja text that the output gets by the
    recipe; None leaves it with the donor's.
    """

    explain_tensors: bool = False
    stale_keys: Collection[str] = ()
    copies: frozenset[int] = frozenset()
    chat_template: str | None = None
