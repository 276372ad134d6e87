"""Text that a language model writes itself, as rows of token ids to calibrate on.

After Liu et al. 2023, "LLM-QAT", arXiv:2305.17888, section 2.1, and Williams, Chrysostomou and Aletras 2024,
"Self-calibration for Language Model Quantization and Pruning", arXiv:2410.17170: a text begins with a random token, and
each token behind it is drawn from what the model makes of those before. Both papers bend what is drawn, to likelier
tokens (the first few greedy, only the tokens that make up 95 % of all chances) or to less likely ones (a temperature
above 1 at first). What calibrates best is neither, and texts that are short, of which a row holds several
(docs/calibration.md). Tokens that end a text are tokens like others.

Many rows are written at the same time. Shapes: ids ``[B, T]``, logits ``[B, V]``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["Decoder", "TextSettings", "draw", "write_rows"]


class Decoder(Protocol):
    """A language model that reads rows as they grow."""

    longest: int | None  # tokens of a row up to which its cost is bearable; None: any number
    bytes_per_token: int  # of its cache

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 ``[B, V]`` of the token behind ids int64 ``[B, T]``.

        The first T - 1 columns are those of the call before; T = 1 begins anew.
        """
        ...


@dataclass(frozen=True)
class TextSettings:
    """How to write.

    Attributes:
        text: Tokens of a text.
        greedy: Tokens behind the first one that are the likeliest.
        temperature: Logits are divided by it.
        top_p: Chances of the tokens that are drawn from.
    """

    text: int = 64
    greedy: int = 0
    temperature: float = 1.0
    top_p: float = 1.0


def write_rows(
    decoder: Decoder,
    rows: int,
    length: int,
    vocabulary: int,
    settings: TextSettings,
    *,
    seed: int,
    memory: int,
    tick: Callable[[int, int], None],
) -> np.ndarray:
    """Have a model write.

    Args:
        decoder: The model.
        rows: Number of rows.
        length: Tokens of a row, which is made of texts that are shorter, each from a random token on.
        vocabulary: Ids are below this.
        settings: How.
        seed: Determines what is drawn.
        memory: Bytes that the cache may take; so many rows are written at the same time.
        tick: Called with (steps done, steps).

    Returns:
        int64 ``[rows, length]``.
    """
    piece = min(length, settings.text, decoder.longest or length)
    pieces = rows * -(-length // piece)
    random = np.random.default_rng(seed)
    # A row hangs on its place and the seed, and not on which rows are written with it.
    ids = np.zeros((pieces, piece), np.int64)
    ids[:, 0] = random.integers(0, vocabulary, pieces)
    chances = random.random((pieces, piece))
    together = max(1, min(pieces, memory // max(1, piece * decoder.bytes_per_token)))
    starts = range(0, pieces, together)
    for number, start in enumerate(starts):
        part = slice(start, start + together)
        for place in range(1, piece):
            logits = decoder.logits(ids[part, :place])[:, :vocabulary]
            ids[part, place] = _next(logits, place, settings, chances[part, place])
            tick(number * piece + place + 1, len(starts) * piece)
    return ids.reshape(rows, -1)[:, :length]  # [pieces, piece] -> [rows, length]


def _next(logits: np.ndarray, place: int, settings: TextSettings, chance: np.ndarray) -> np.ndarray:
    """The tokens at a place of rows, int64 ``[B]``."""
    if place <= settings.greedy:
        return np.asarray(logits.argmax(-1), np.int64)
    return draw(logits, settings.temperature, settings.top_p, chance)


def draw(logits: np.ndarray, temperature: float, top_p: float, chance: np.ndarray) -> np.ndarray:
    """Draw a token for each row from the fewest that make up `top_p` (Holtzman et al. 2019, arXiv:1904.09751).

    Args:
        logits: ``[B, V]``.
        temperature: Logits are divided by it.
        top_p: The tokens' share of all chances; 1 takes all.
        chance: Uniform in [0, 1), float64 ``[B]``.

    Returns:
        int64 ``[B]``.
    """
    scaled = logits.astype(np.float32) / np.float32(temperature)
    chances = np.exp(scaled - scaled.max(-1, keepdims=True))
    if top_p < 1:
        falling = -np.sort(-chances, axis=-1)
        sums = np.cumsum(falling, axis=-1, dtype=np.float64)
        last = (sums < top_p * sums[:, -1:]).sum(-1)
        least = np.take_along_axis(falling, np.minimum(last, falling.shape[1] - 1)[:, None], -1)
        chances = np.where(chances >= least, chances, 0)
    sums = np.cumsum(chances, axis=-1, dtype=np.float64)
    # The first token whose sum is above; one without a share is never that.
    return np.asarray((sums <= (chance * sums[:, -1])[:, None]).sum(-1), np.int64)
