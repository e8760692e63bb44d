"""The cleaned text of the repository, by kind and part."""

from __future__ import annotations

import json
import lzma
from functools import cache
from typing import NamedTuple

from examples.low_resource.errors import ExampleError
from examples.low_resource.settings import DATA

SOURCES = ("libreoffice", "gnome")


class Text(NamedTuple):
    """One part of all sources: pairs of an English and a Tamil text, and English paragraphs."""

    pairs: list[tuple[str, str]]
    english: list[str]


@cache
def load_text(part: str) -> Text:
    """The text of a part, ``train`` or ``held_out``. Raises ``ExampleError`` when it is not there."""
    pairs: list[tuple[str, str]] = []
    english: list[str] = []
    for source in SOURCES:
        path = DATA / f"{source}.json.xz"
        try:
            content = json.loads(lzma.decompress(path.read_bytes()))[part]
        except FileNotFoundError:
            raise ExampleError(
                f"{path}: not there; restore it with `git checkout`, or make it anew with "
                "`python -m examples.low_resource.fetch`"
            ) from None
        except (lzma.LZMAError, ValueError, KeyError) as error:
            raise ExampleError(f"{path}: damaged ({error}); restore it with `git checkout`") from None
        pairs += [(english_text, tamil) for english_text, tamil in content["pairs"]]
        english += content["english"]
    return Text(pairs, english)


def documents(kind: str) -> list[str]:
    """Training text of a kind: ``english``, ``english_short``, ``tamil`` or ``bilingual``."""
    text = load_text("train")
    if kind == "english":
        return text.english
    if kind == "english_short":
        return [english for english, _ in text.pairs]
    if kind == "tamil":
        return [tamil for _, tamil in text.pairs]
    return [f"{one} = {other}" for pair in text.pairs for one, other in (pair, pair[::-1])]
