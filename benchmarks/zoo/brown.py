"""The Brown corpus as running text: 500 documents of American English, split by document into train and evaluation."""

import re
from functools import cache
from pathlib import Path

from benchmarks.zoo.packages import fetch

EVALUATION_EVERY = 5
"""Every fifth document is evaluation text."""

_SPACING = (
    (re.compile(r"`` ?"), '"'),
    (re.compile(r" ?''"), '"'),
    (re.compile(r" ([,.;:?!)\]])(?: \1)?"), r"\1"),  # the corpus writes some marks twice
    (re.compile(r"([(\[]) "), r"\1"),
    (re.compile(r"\s+"), " "),
)


@cache
def documents() -> tuple[list[list[str]], list[list[str]]]:
    """Return (training, evaluation) documents, each a list of sentences."""
    files = sorted((fetch("brown") / "package").glob("c[a-r][0-9][0-9]"))
    training: list[list[str]] = []
    evaluation: list[list[str]] = []
    for index, file in enumerate(files):
        held_out = index % EVALUATION_EVERY == EVALUATION_EVERY - 1
        (evaluation if held_out else training).append(sentences(file))
    return training, evaluation


def sentences(file: Path) -> list[str]:
    """Return a document's sentences, spaced as in print; a line of the file is a sentence of word/tag pairs."""
    lines = (detokenize(line.split()) for line in file.read_text("latin-1").splitlines())
    return [line for line in lines if line]


def detokenize(tagged: list[str]) -> str:
    """Turn ["The/at", "jury/nn", "said/vbd", "``/``", ...] into a sentence."""
    text = " ".join(pair.rsplit("/", 1)[0] for pair in tagged)
    for pattern, replacement in _SPACING:
        text = pattern.sub(replacement, text)
    return text.strip()
