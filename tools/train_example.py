#!/usr/bin/env python3
"""Train the small language model of `examples/austen` from public-domain text and export it to ONNX.

The text is the six completed novels of Jane Austen, read from the Debian package `r-cran-janeaustenr`, which is fetched
into a cache folder. A byte-level BPE tokenizer and a Llama-architecture model are trained on it from scratch, both with
a fixed seed and a fixed number of steps: the same library versions on the same machine give the same files.

    train_example.py --output examples/austen

Needs a Debian or Ubuntu system (apt-get, dpkg-deb) and the Python packages torch, transformers, tokenizers, onnx,
onnxscript, onnxruntime, numpy and rdata. Takes about a quarter of an hour on two cores.

OUTPUT afterwards holds:
    model.onnx        inputs input_ids, attention_mask int64 [batch, seq]; output logits float32 [batch, seq, vocab]
    tokenizer.json    byte-level BPE, for the `tokenizers` package
    calibration.txt   a passage of each novel that was trained on, one paragraph a line
    held_out.txt      a passage of each novel that neither the tokenizer nor the model has seen
"""

from __future__ import annotations

import argparse
import gzip
import logging
import math
import re
import subprocess
import time
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

LOG = logging.getLogger("train_example")
PACKAGE = "r-cran-janeaustenr"
SEPARATOR = "<|endoftext|>"
EDITORIAL_NOTE = "A NOTE ON THE TEXT"  # from here on Northanger Abbey is a modern publisher's, not the author's
HELD_OUT = (0.6, 7_000)  # of each novel: where the passage starts, as a fraction, and its length in characters
CALIBRATION = (0.3, 14_000)
LOCAL_PATH = re.compile(r"(^|[\s\"'(=:])(/|[A-Za-z]:\\)\w+[/\\]|\.py\b")


def fetch_novels(cache: Path) -> dict[str, str]:
    """Return the novels by name, as the package holds them, from `cache` or else from the Debian archive."""
    import rdata

    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob(f"{PACKAGE}_*.deb")):
        subprocess.run(["apt-get", "download", PACKAGE], cwd=cache, check=True)
    archive = max(cache.glob(f"{PACKAGE}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(archive), str(cache / PACKAGE)], check=True)
    folder = cache / PACKAGE / "usr/lib/R/site-library/janeaustenr/data"

    def convert(serialized: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rdata says that it has to guess the container
            return rdata.conversion.convert(rdata.parser.parse_data(serialized))

    # A lazy-load database: the index gives offset and length; an entry is 4 bytes of length, then a zlib stream.
    index = convert(gzip.decompress((folder / "Rdata.rdx").read_bytes()))["variables"]
    database = (folder / "Rdata.rdb").read_bytes()
    lines = {name: convert(zlib.decompress(database[at + 4 : at + size])) for name, (at, size) in index.items()}
    return {str(name): "\n".join(map(str, lines[name])) for name in sorted(lines)}


def paragraphs(novel: str) -> list[str]:
    """Unwrap a novel into paragraphs without headings, editors' notes and emphasis marks."""
    body = novel.split(EDITORIAL_NOTE)[0].replace("_", "")
    unwrapped = (" ".join(block.split()) for block in re.split(r"\n\s*\n", body))
    return [text for text in unwrapped if re.search(r"[a-z].*[.,;:!?\"'-]$", text) and not text.startswith(("*", "["))]


def take_passage(texts: list[str], where: tuple[float, int]) -> tuple[list[str], list[str]]:
    """Return the passage that `where` describes, in whole paragraphs, and the texts without it."""
    start = end = int(len(texts) * where[0])
    while sum(map(len, texts[start:end])) < where[1]:
        end += 1
    return texts[start:end], texts[:start] + texts[end:]


def split_novels(novels: dict[str, str]) -> tuple[list[str], str, str]:
    """Return the training text of each novel, and over all of them the calibration and the held-out text."""
    train, calibration, held_out = [], [], []
    for novel in novels.values():
        passage, rest = take_passage(paragraphs(novel), HELD_OUT)
        held_out += passage
        calibration += take_passage(rest, CALIBRATION)[0]
        train.append("\n".join(rest))
    return train, "\n".join(calibration) + "\n", "\n".join(held_out) + "\n"


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; id 0 is the separator between novels."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": [SEPARATOR], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options)
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    return tokenizer


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Return a freshly initialized model: grouped-query attention, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads}
    sizes = {"hidden_size": args.hidden, "intermediate_size": args.intermediate, "num_hidden_layers": args.layers}
    vocabulary = {"vocab_size": args.vocab_size, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    # The usual spread of 0.02 is for wide models; with it this one stays long at the frequencies of single tokens.
    others = {"initializer_range": 0.05, "max_position_embeddings": args.context}
    config = LlamaConfig(**heads, **sizes, **vocabulary, **others)
    return LlamaForCausalLM(config).float()


def train_model(model: LlamaForCausalLM, tokens: torch.Tensor, args: argparse.Namespace) -> None:
    """Train on random windows of `tokens` [count] with AdamW, linear warm-up and a cosine schedule down to zero."""
    import torch

    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    gains = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    warm_up = args.steps // 20

    def schedule(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (args.steps - warm_up)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    generator = torch.Generator().manual_seed(args.seed)
    window = torch.arange(args.context + 1)
    model.train()
    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        at = torch.randint(len(tokens) - args.context, (args.batch, 1), generator=generator)
        rows = tokens[at + window]  # [batch, context + 1]
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == args.steps:
            seconds = time.perf_counter() - start
            LOG.info("step %d of %d, loss %.3f nats, %.0f s", step, args.steps, loss.item(), seconds)


def strip_local_metadata(model: ir.Model) -> None:
    """Remove stack traces and whatever else names a local file from the metadata of `model`, in place."""
    nodes = list(model.graph.all_nodes())
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(out for node in nodes for out in node.outputs)]
    for holder in (model, model.graph, *nodes, *values):
        holder.doc_string = None
        for key, text in list(holder.metadata_props.items()):
            if "stack_trace" in key or LOCAL_PATH.search(text):
                del holder.metadata_props[key]


def export(model: LlamaForCausalLM, path: Path, context: int) -> None:
    """Write the model without key-value cache as one ONNX file with dynamic batch and sequence length."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    ids = torch.randint(0, model.config.vocab_size, (2, 16))
    axes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("seq", min=2, max=context)}
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
    shapes = {"input_ids": axes, "attention_mask": axes}
    how = {"dynamo": True, "opset_version": 21, "dynamic_shapes": shapes, "verbose": False}
    program = torch.onnx.export(Logits().eval(), (ids, torch.ones_like(ids)), **how, **names)
    strip_local_metadata(program.model)
    program.save(str(path), external_data=False)


def perplexity(path: Path, ids: list[int], context: int) -> float:
    """Return the perplexity per token of the ONNX model over consecutive whole windows of `context` tokens."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    total = count = 0
    for at in range(0, len(ids) - context + 1, context):
        row = np.asarray([ids[at : at + context]], np.int64)  # [1, context]
        logits = session.run(["logits"], {"input_ids": row, "attention_mask": np.ones_like(row)})[0][0, :-1]
        logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_probs[np.arange(len(log_probs)), row[0, 1:]].sum()
        count += len(log_probs)
    return math.exp(total / count)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("examples/austen"), help="folder for the results")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/austen", help="folder for the text")
    model = {"vocab-size": 2048, "hidden": 192, "intermediate": 448, "layers": 4, "heads": 6, "kv-heads": 2}
    for name, value in (model | {"context": 256, "batch": 4, "steps": 6000, "seed": 1775}).items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="highest, after warm-up; default %(default)s")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of matrices; default %(default)s")
    return parser.parse_args()


def main() -> None:
    """Fetch, split, train, export and measure."""
    import torch

    logging.basicConfig(format="%(message)s")
    LOG.setLevel(logging.INFO)
    args = parse_args()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    train, calibration, held_out = split_novels(fetch_novels(args.cache))
    (args.output / "calibration.txt").write_text(calibration, "utf-8")
    (args.output / "held_out.txt").write_text(held_out, "utf-8")
    tokenizer = train_tokenizer(train, args.vocab_size)
    tokenizer.save(str(args.output / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode(SEPARATOR.join(train)).ids)
    model = build_model(args)
    LOG.info("%d parameters, %d training tokens", sum(map(torch.numel, model.parameters())), len(tokens))
    train_model(model, tokens, args)
    export(model, args.output / "model.onnx", args.context)
    score = perplexity(args.output / "model.onnx", tokenizer.encode(held_out).ids, args.context)
    LOG.info("perplexity on held_out.txt %.2f per token", score)


if __name__ == "__main__":
    main()
