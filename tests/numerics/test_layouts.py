"""The layouts in `numerics.packing` against ONNX Runtime: what its operators compute from our bytes."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.numerics.affine import WeightSpec, dequantize, min_max_grid, quantize
from qcompiler.numerics.formats import FORMATS
from qcompiler.numerics.packing import pack_codes, pack_matmul_nbits
from tests.builders import normal, run

BITS = pytest.mark.parametrize("bits", FORMATS)
SIZES = pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
FORMS = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def quantized_weight(bits, size, symmetric, rows, columns, pad=True):
    """Inputs of the operators by name, and the weight float32 [N, K] that they stand for."""
    spec = WeightSpec(bits, size, symmetric)
    weight = normal((rows, columns), bits * size + columns)
    grid = min_max_grid(weight, spec)
    codes, width = quantize(weight, grid, spec), FORMATS[bits].container
    # Without zero points the operators take the middle of the container for zero.
    shift = (1 << (width - 1)) - (1 << (bits - 1)) if symmetric else 0
    packed = pack_codes(codes + np.uint8(shift), width)
    arrays = {"B": pack_matmul_nbits(packed, width, columns, size, spec.format.mid) if pad else packed}
    arrays["scales"] = grid.scale
    if not symmetric:
        arrays["zero_points"] = pack_codes(grid.zero_point.astype(np.uint8), bits)
    return arrays, dequantize(codes, grid.scale, grid.zero_point, size)


def operator_model(op_type, inputs, arrays, feed, dtype, **attributes):
    node = helper.make_node(op_type, inputs, ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(feed, dtype, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=imports).SerializeToString()


@BITS
@SIZES
@FORMS
def test_matmul_nbits_computes_the_product_with_the_dequantized_weight(bits, size, symmetric):
    # K: whole blocks, one ragged block, ragged after whole blocks, odd; N: even, odd; with and without bias.
    cases = ((2 * size, 8, False), (2 * size, 8, True), (size - 3, 5, True), (3 * size + 8, 7, False), (77, 3, True))
    for columns, rows, with_bias in cases:
        arrays, weight = quantized_weight(bits, size, symmetric, rows, columns)
        bias = normal(rows, 5)
        if with_bias:
            arrays["bias"] = bias
        inputs = ["x", "B", "scales", "" if symmetric else "zero_points", "", "bias" if with_bias else ""]
        while not inputs[-1]:
            inputs.pop()
        width = FORMATS[bits].container
        attributes = {"K": columns, "N": rows, "bits": width, "block_size": size, "accuracy_level": 0}
        model = operator_model("MatMulNBits", inputs, arrays, "x", TensorProto.FLOAT, **attributes)
        x = normal((3, columns), 1)
        want = x.astype(np.float64) @ weight.T.astype(np.float64) + (bias if with_bias else 0)
        (got,) = run(model, {"x": x})
        assert got.shape == (3, rows)
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want), (columns, rows)


@BITS
@SIZES
@FORMS
@pytest.mark.parametrize("pad", [True, False], ids=["padded", "ragged"])
def test_gather_block_quantized_looks_up_dequantized_rows(bits, size, symmetric, pad):
    """Padded rows come back as wide as their blocks, the ragged end last.

    ONNX Runtime 1.31 takes rows without padding as well: the scales of the ragged block are the last ones, and a row
    comes back as wide as its bytes, so that only codes that do not fill the last byte leave something to cut off.
    """
    indices = np.array([[0, 6], [-1, 3]], np.int64)  # negative ones count from the end, as for Gather
    for columns in (2 * size, 2 * size + 8, 3 * size - 1):
        arrays, table = quantized_weight(bits, size, symmetric, 7, columns, pad)
        arrays["B"] = arrays["B"].reshape(7, -1)
        inputs = ["B", "i", "scales", *([] if symmetric else ["zero_points"])]
        width = FORMATS[bits].container
        attributes = {"bits": width, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
        model = operator_model("GatherBlockQuantized", inputs, arrays, "i", TensorProto.INT64, **attributes)
        (got,) = run(model, {"i": indices})
        assert got.shape == (2, 2, -(-columns // size) * size if pad else -(-columns * width // 8) * 8 // width)
        want = table[indices]
        assert np.abs(got[..., :columns] - want).max() <= 1e-6 * np.abs(table).max()


@BITS
def test_scales_may_be_negative(bits):
    """The full-range symmetric form gives groups whose extreme is positive a negative scale."""
    arrays, weight = quantized_weight(bits, 32, True, 4, 64)
    assert (arrays["scales"] < 0).any()
    attributes = {"K": 64, "N": 4, "bits": FORMATS[bits].container, "block_size": 32, "accuracy_level": 0}
    model = operator_model("MatMulNBits", ["x", "B", "scales"], arrays, "x", TensorProto.FLOAT, **attributes)
    (got,) = run(model, {"x": np.eye(64, dtype=np.float32)})
    assert np.abs(got - weight.T).max() <= 1e-6 * np.abs(weight).max()


@BITS
def test_int8_activations_of_level_4_stay_within_a_percent(bits):
    """Level 4 rounds each activation to 1/127 of its block's largest: about 0.6 % of a Gaussian's norm."""
    arrays, weight = quantized_weight(bits, 32, False, 16, 256)
    attributes = {"K": 256, "N": 16, "bits": FORMATS[bits].container, "block_size": 32, "accuracy_level": 4}
    names = ["x", "B", "scales", "zero_points"]
    model = operator_model("MatMulNBits", names, arrays, "x", TensorProto.FLOAT, **attributes)
    x = normal((5, 256), 2)
    (got,) = run(model, {"x": x})
    want = x @ weight.T
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)
