"""What each operator of `schemas` means, in numpy: slow, plain, float64 inside.

Nothing fast follows from here; kernels and bodies are compared with it.
"""

from collections.abc import Sequence

import numpy as np

from qcompiler.kernels.schemas import operator
from qcompiler.numerics.packing import unpack_stream

__all__ = ["decoded_weight", "quantized_rows", "run"]


def run(name: str, inputs: Sequence[np.ndarray], *, accuracy_level: int = 0) -> np.ndarray:
    """The product.

    Args:
        name: Of the operator.
        inputs: All of its inputs, in order.
        accuracy_level: 4 rounds activations to 8 bits, for each row and group.

    Returns:
        Y ``[.., N]`` in the dtype of A.
    """
    activations, bias = inputs[0], inputs[-1].astype(np.float64)
    weight = decoded_weight(name, inputs)
    rows = activations.astype(np.float64)
    if name == "MatMulSigns":
        rows = np.where(rows >= 0, 1.0, -1.0) * np.abs(rows).mean(-1, keepdims=True)
    elif accuracy_level == 4:
        rows = quantized_rows(rows, inputs[1].shape[2] * 8 // operator(name).bits)
    return np.asarray((rows @ weight.T + bias).astype(activations.dtype))


def decoded_weight(name: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The weight float64 ``[N, K]`` that the inputs of an operator stand for."""
    contract = operator(name)
    columns, stream = inputs[0].shape[-1], inputs[1]
    codes = unpack_stream(stream, contract.bits, stream[0].size * 8 // contract.bits)
    scales = _scales(name, inputs).astype(np.float64)  # [N, G, 1]
    if "codebook" in name.lower():
        codebook, starts = inputs[2], inputs[3]
        values = codebook[codes + starts[..., 0]].astype(np.float64)  # [N, codes, d]
    elif name == "MatMulSigns":
        values = 2.0 * codes - 1
    else:
        values = codes.reshape(*scales.shape[:2], -1) - inputs[-2].astype(np.float64)
    groups = values.reshape(*scales.shape[:2], -1) * scales
    return np.asarray(groups.reshape(len(scales), -1)[:, :columns])


def quantized_rows(rows: np.ndarray, group_size: int) -> np.ndarray:
    """Activations ``[.., K]`` rounded to 8 bits, symmetric, one scale for each row and group of columns."""
    padded = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % group_size)])
    groups = padded.reshape(*rows.shape[:-1], -1, group_size)
    scale = np.abs(groups).max(-1, keepdims=True) / 127
    scale[scale == 0] = 1
    rounded = np.rint(groups / scale) * scale
    return np.asarray(rounded.reshape(*rows.shape[:-1], -1)[..., : rows.shape[-1]])


def _scales(name: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
    names = [each.name for each in operator(name).inputs]
    return inputs[names.index("scales")]
