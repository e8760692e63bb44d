"""From values to a page of HTML, and to its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merge_engine.errors import OutputError, ReportError, way_out


def require_extra() -> None:
    """Raise ``ReportError`` with the way out if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReportError('a report needs matplotlib; run: pip install "merge_engine[report]"') from None


def fill(template: str, **values: Any) -> str:
    """The page of a template in this package. Every value is escaped, but for plots (see ``plot``)."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("merge_engine.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def plot(svg: str | None) -> Any:
    """A plot that the template does not escape: matplotlib has escaped its text."""
    from markupsafe import Markup

    return None if svg is None else Markup(svg)


def write(file: Path, text: str) -> None:
    """Write a page or its numbers. Raises ``OutputError``."""
    try:
        # The name of a folder may have bytes that are not UTF-8.
        file.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror}{way_out(error)}") from error
