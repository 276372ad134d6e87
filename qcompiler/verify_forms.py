"""Running a compiled model whose inputs and outputs have other number formats than the float model's.

1. Inputs are fed as `calibration_inputs.fitted` makes them.
2. A quantized key-value cache (GroupQueryAttention with `k_quant_type`) is decoded on its way out, so that it can be
   compared with the float model's.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qcompiler.calibration_inputs import fitted
from qcompiler.numerics.packing import unpack_codes
from qcompiler.session import Feeds, OrtRunner
from qcompiler.verify_audit import read_constant

__all__ = ["CompiledRunner", "Decoder", "cache_decoders", "holds_float8"]

Decoder = Callable[[np.ndarray], np.ndarray]
# Of GroupQueryAttention: attribute, input with the scales, output with the cache.
_CACHES = (("k_quant_type", 12, 1), ("v_quant_type", 13, 2))


class CompiledRunner(OrtRunner):
    """A session on a compiled model that is fed, and answers, as the float model is and does."""

    def __init__(self, model: bytes | Path, decoders: Mapping[str, Decoder], **options: Any) -> None:
        """Load a model; `decoders` are by output, `options` those of OrtRunner."""
        super().__init__(model, **options)
        self._decoders = decoders
        self._specs = self.inputs

    def run(self, feeds: Mapping[str, np.ndarray], outputs: list[str] | None = None) -> Feeds:
        """Run once; see `OrtRunner.run`."""
        results = super().run(fitted(dict(feeds), self._specs), outputs)
        return {
            name: self._decoders[name](array) if name in self._decoders else array for name, array in results.items()
        }


def holds_float8(model: onnx.ModelProto) -> bool:
    """Whether the model has constants of 8-bit floats."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer)


def cache_decoders(model: onnx.ModelProto, folder: Path, where: str) -> dict[str, Decoder]:
    """What turns each quantized cache among a model's outputs into floats.

    Args:
        model: The compiled model, its external data not loaded.
        folder: Where external data lies.
        where: What messages begin with.
    """
    outputs = {value.name for value in model.graph.output}
    found: dict[str, Decoder] = {}
    for node in model.graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        attributes = {attribute.name: attribute for attribute in node.attribute}
        for kind, scale, cache in _CACHES:
            quantized = kind in attributes and attributes[kind].s != b"NONE"
            if quantized and len(node.output) > cache and node.output[cache] in outputs:
                bits = attributes["kv_cache_bit_width"].i
                array = read_constant(model, node.input[scale], folder, where)
                found[node.output[cache]] = _decoder(bits, array)
    return found


def _decoder(bits: int, scale: np.ndarray) -> Decoder:
    """For codes [B, H, T, D], int8, or uint8 with two codes a byte, and scales of H * D channels or of all."""

    def decode(codes: np.ndarray) -> np.ndarray:
        middle = 1 << (bits - 1)
        values = unpack_codes(codes, 4, 2 * codes.shape[3]) if bits == 4 else codes
        shape = (1, codes.shape[1], 1, values.shape[3]) if scale.size > 1 else ()
        decoded = values.astype(np.float32) - np.float32(middle if bits == 4 else 0)
        return np.asarray(decoded * scale.reshape(shape), np.float32)

    return decode
