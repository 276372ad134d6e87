"""What kernels for CUDA are launched with, made of an operator's inputs: the launcher passes the same."""

import numpy as np

from qcompiler.kernels.schemas import OPERATORS


def kind_of(name):
    return "signs" if name == "MatMulSigns" else "codebook" if "Codebook" in name else "uniform"


def arguments(name, inputs):
    """Arrays and numbers by the names of `qcompiler.kernels.triton.matmul.ARGUMENTS`, and the result's array."""
    by_name = dict(zip([each.name for each in OPERATORS[name].inputs], inputs, strict=True))
    activations, codes, bias = inputs[0], inputs[1], inputs[-1]
    N, groups, stored = codes.shape
    table, zeros = by_name.get("codebook"), by_name.get("zero_points")
    entry = 1 if table is None else table.shape[1]
    nothing = {"float": np.zeros(1, activations.dtype), "byte": np.zeros(1, np.uint8), "int": np.zeros(1, np.int32)}
    are_codes = zeros is not None and zeros.dtype == np.uint8
    starts = by_name.get("starts", nothing["int"])
    floats = table if table is not None else zeros if zeros is not None and not are_codes else nothing["float"]
    count = activations[..., 0].size
    return {
        "a": activations.reshape(count, -1),
        "b": codes,
        "scales": by_name["scales"],
        "values": floats,
        "zero_codes": zeros if are_codes else nothing["byte"],
        "starts": starts,
        "bias": bias,
        "y": np.full((count, N), np.nan, activations.dtype),
        "M": count,
        "N": N,
        "K": activations.shape[-1],
        "groups": groups,
        "octets": stored // OPERATORS[name].bits,
        "entries": 0 if table is None else len(table),
        "zeros_are_codes": int(are_codes),
        "zero_step": int(zeros is not None and zeros.size != 1),
        "start_step": int(starts.size != 1),
        "bias_step": int(bias.size != 1),
    }, entry
