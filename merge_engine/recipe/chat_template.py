"""The recipe's key ``chat_template``: ``auto``, the name of a template of ours, or Jinja text.

A template is a program of somebody else. It is parsed, so that one with a mistake is refused before the merge, and
never run.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from merge_engine.recipe.problems import InvalidValue
from merge_engine.text import did_you_mean, shown

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.nodes import Node
    from jinja2.parser import Parser

AUTO = "auto"
"""The template that most inputs have."""
BUILT_IN = ("alpaca", "chatml", "exaone", "llama3", "mistral")
_LONGEST = 1_000_000
"""Characters of a template. The largest known ones have 50,000."""


def read_chat_template(raw: str) -> str:
    """The value of the key, checked. Raises ``InvalidValue`` with the reason."""
    if raw in (AUTO, *BUILT_IN):
        return raw
    if problem := problem_of_template(raw) if "{" in raw else _problem_of_name(raw):
        raise InvalidValue(("", problem))
    return raw


def template_text(value: str) -> str:
    """The Jinja text that a value of the key stands for, which is not ``auto``."""
    if value not in BUILT_IN:
        return value
    return (
        (resources.files("merge_engine.recipe") / "templates" / f"{value}.jinja").read_text("utf-8").strip()
    )


def problem_of_template(text: str) -> str | None:
    """Why a text is no chat template that transformers can use; None if it is one."""
    from jinja2 import TemplateSyntaxError, nodes

    if len(text) > _LONGEST:
        return f"has {len(text):,} characters; a chat template has at most {_LONGEST:,}"
    environment = _environment()
    try:
        tree = environment.parse(text)
        for kind, known in ((nodes.Filter, environment.filters), (nodes.Test, environment.tests)):
            for node in tree.find_all(kind):
                if node.name not in known:
                    what = f"{kind.__name__.lower()} {shown(node.name)}"
                    return f"line {node.lineno} of the template: there is no {what}{did_you_mean(node.name, known)}"
        if not any(node.name == "messages" for node in tree.find_all(nodes.Name)):
            return 'is no chat template: it does not use "messages", the texts of a conversation'
    except TemplateSyntaxError as error:
        return f"line {error.lineno} of the template: {(error.message or '').rstrip('.')}"
    except RecursionError:
        return "the template is nested too deeply"
    except ValueError:
        return "a number in the template has thousands of digits"
    return None


def _problem_of_name(name: str) -> str:
    known = (AUTO, *BUILT_IN)
    nearest = did_you_mean(name, known) or f"; give one of {', '.join(known)}, or Jinja text"
    return f"there is no template {shown(name)}{nearest}"


@cache
def _environment() -> Environment:
    """What transformers parses templates with."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` is around what an assistant says."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
