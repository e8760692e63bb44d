"""Stage 1: fetch the packages that hold the text, clean it, split it, and write ``data/*.json.xz``.

The files are part of the repository, so this runs only for somebody who wants to check or change them. From
Debian come LibreOffice's catalogues (English and Tamil texts of its interface), its English help, and GNOME's
user guide (English, and in part Tamil). Each source keeps a file of its own: their licences differ.

    python -m examples.low_resource.fetch
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import lzma
import re
import struct
import tarfile
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import TypeAlias

from examples.low_resource.errors import ExampleError, told
from examples.low_resource.settings import DATA, HELD_OUT_ENGLISH, HELD_OUT_PAIRS, PACKAGES, Package
from examples.low_resource.split import Pair, split_pairs, split_paragraphs

Files: TypeAlias = Mapping[PurePosixPath, bytes]

_TAMIL = re.compile(r"[\u0b80-\u0bff]")
_MARKUP = re.compile(r"[%$<>{}\\]|https?:")
_BLOCKS = {"title", "p", "desc"}  # of Mallard, GNOME's help format
_PARAGRAPH = re.compile(rb'<(p|h[1-3]) id="[^"]*"(?: class="[a-z_ ]*")? dir="auto">(.*?)</\1>', re.DOTALL)
_HIDDEN = re.compile(r'<span hidden="true"[^>]*class="(?:MAC|UNIX|WIN)"[^>]*>.*?</span>', re.DOTALL)


def download(package: Package) -> bytes:
    """The package's file, if it is the one that the settings name."""
    try:
        with urllib.request.urlopen(package.url, timeout=60) as response:
            data: bytes = response.read()
    except OSError as error:
        raise ExampleError(
            f"{package.url}: cannot be fetched ({error}); the cleaned text is in {DATA}: "
            "`git checkout` restores it, and then nothing needs to be fetched"
        ) from None
    if hashlib.sha256(data).hexdigest() != package.sha256:
        raise ExampleError(
            f"{package.url}: not the file that settings.py names (SHA-256 differs); fetch version "
            f"{package.version} elsewhere, or name the new one there"
        )
    return data


def unpack(deb: bytes) -> Files:
    """The files of a Debian package: an ``ar`` archive with the tree in its member data.tar."""
    position = len(b"!<arch>\n")
    while position < len(deb):
        header = deb[position : position + 60]
        name, size = header[:16].decode().strip(" /"), int(header[48:58])
        position += 60
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(deb[position : position + size])) as archive:
                regular = [member for member in archive if member.isfile()]
                return {
                    PurePosixPath(m.name): (archive.extractfile(m) or io.BytesIO()).read() for m in regular
                }
        position += size + size % 2
    raise ExampleError("a package without data.tar; fetch it again")


def tidy(text: str) -> str:
    """One line without markup of keys: ``_`` and ``~`` mark accelerators in menus."""
    return " ".join(html.unescape(text).replace("~", "").replace("_", "").split())


def catalogue_pairs(files: Files) -> Iterator[Pair]:
    """English and Tamil texts of LibreOffice's interface."""
    for path in sorted(files):
        if path.suffix != ".mo":
            continue
        for source, target in _messages(files[path]):
            yield from _pair(source.rpartition("\x04")[2], target)  # a context may stand before the text


def _messages(catalogue: bytes) -> Iterator[tuple[str, str]]:
    """The texts of a compiled catalogue of gettext, those with plural forms left out."""
    order = "<" if catalogue[:4] == b"\xde\x12\x04\x95" else ">"
    count, sources, targets = struct.unpack_from(f"{order}8x3I", catalogue)
    for i in range(count):
        texts = []
        for table in (sources, targets):
            length, start = struct.unpack_from(f"{order}2I", catalogue, table + 8 * i)
            texts.append(catalogue[start : start + length].decode())
        if not any("\0" in text for text in texts):
            yield texts[0], texts[1]


def guide_pairs(files: Files) -> Iterator[Pair]:
    """Blocks of GNOME's guide that are translated, from pages of the same structure in both languages."""
    for path in sorted(files):
        if path.suffix == ".page" and "/ta/" in f"{path}":
            english = files.get(PurePosixPath(f"{path}".replace("/help/ta/", "/help/C/")))
            if english is None:
                continue
            ours, theirs = list(_blocks(english)), list(_blocks(files[path]))
            if [tag for tag, _ in ours] == [tag for tag, _ in theirs]:
                for (_, source), (_, target) in zip(ours, theirs, strict=True):
                    yield from _pair(source, target, page=path.stem)


def _pair(source: str, target: str, page: str = "") -> Iterator[Pair]:
    if _MARKUP.search(source + target) or len(_TAMIL.findall(target)) * 3 < len(target):
        return
    pair = Pair(tidy(source), tidy(target), page)
    if pair.english and pair.tamil and not _TAMIL.search(pair.english):
        yield pair


def _blocks(page: bytes) -> Iterator[tuple[str, str]]:
    for element in ET.fromstring(page).iter():
        tag = str(element.tag).rpartition("}")[2]
        if tag in _BLOCKS:
            yield tag, tidy("".join(element.itertext()))


def guide_paragraphs(files: Files) -> Iterator[str]:
    """The English text of GNOME's guide."""
    for path in sorted(files):
        if path.suffix == ".page" and "/help/C/" in f"{path}":
            yield from (text for _, text in _blocks(files[path]) if text)


def help_paragraphs(files: Files) -> Iterator[str]:
    """The English text of LibreOffice's help."""
    for path in sorted(files):
        if path.suffix == ".html":
            for _, raw in _PARAGRAPH.findall(files[path]):
                text = tidy(re.sub(r"<[^>]+>", "", _HIDDEN.sub("", raw.decode())))
                if len(text.split()) > 2:
                    yield text


def write(name: str, content: Mapping[str, object]) -> None:
    """One source's text, a line for each entry so that differences can be read once it is unpacked."""
    text = json.dumps(content, ensure_ascii=False, indent=0)
    (DATA / f"{name}.json.xz").write_bytes(lzma.compress(text.encode(), preset=9))


def main() -> None:
    """Fetch, clean, split, write."""
    files = {package.name: unpack(download(package)) for package in PACKAGES}
    sources: dict[str, tuple[Iterable[Pair], Iterable[str]]] = {
        "libreoffice": (
            catalogue_pairs(files["libreoffice-l10n-ta"]),
            help_paragraphs(files["libreoffice-help-en-us"]),
        ),
        "gnome": (guide_pairs(files["gnome-user-docs"]), guide_paragraphs(files["gnome-user-docs"])),
    }
    pairs = split_pairs({name: list(found) for name, (found, _) in sources.items()}, HELD_OUT_PAIRS)
    by_part = {
        part: {pair.english for parts in pairs.values() for pair in parts[part]}
        for part in ("train", "held_out")
    }
    paragraphs = split_paragraphs(
        {name: list(f) for name, (_, f) in sources.items()}, HELD_OUT_ENGLISH, by_part
    )
    DATA.mkdir(exist_ok=True)
    for name in sources:
        write(
            name,
            {
                part: {
                    "pairs": [list(pair.texts) for pair in pairs[name][part]],
                    "english": paragraphs[name][part],
                }
                for part in ("train", "held_out")
            },
        )
        for part in ("train", "held_out"):
            words = sum(len(pair.tamil.split()) for pair in pairs[name][part])
            print(
                f"{name} {part}: {len(pairs[name][part]):,} pairs with {words:,} Tamil words, "
                f"{len(paragraphs[name][part]):,} English paragraphs"
            )


if __name__ == "__main__":
    told(main)
