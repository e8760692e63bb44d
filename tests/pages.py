"""What every page must be: one file, without scripts, in which no text of others becomes markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

EVIL = '<script>alert(1)</script>"&$\\frac{'

_EMPTY = {"meta", "wbr", "br", "path", "use", "rect"}


class Reader(HTMLParser):
    """Notes every tag, what it refers to, and the text that stands for it; texts of table rows, cell by cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.alternatives: list[str] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == [], "tags that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if dict(attrs).get("role") == "img":
            self.alternatives.append(dict(attrs).get("aria-label") or "")
        if tag not in _EMPTY:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _EMPTY:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _EMPTY:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "tr" in self._open and self.rows[-1]:
            self.rows[-1][-1] = f"{self.rows[-1][-1]}{data}".strip()
        if self._open and self._open[-1] == "h2":
            self.headings[-1] += data


def read(page: str) -> Reader:
    """The page, after a check that it needs nothing else and runs nothing."""
    reader = Reader(page)
    assert "script" not in reader.tags and "img" not in reader.tags
    assert all(link.startswith(("#", "./")) for link in reader.links)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)  # but for the names of SVG's own formats
    assert len(reader.alternatives) == page.count("<svg") and all(reader.alternatives)
    assert not re.search(r"\bnan\b|\binf\b", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    return reader
