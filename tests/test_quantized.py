"""A quantized weight is a float tensor to everybody who does not look inside."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from qcompiler.numerics.affine import WeightSpec, dequantize, min_max_grid, quantize
from qcompiler.numerics.formats import FORMATS
from qcompiler.quantized import QuantizedTensor, from_stored, stored_shape, to_stored
from tests.builders import normal

LAYOUTS = {"NK": (6, 40), "KN": (40, 6), "1KN": (1, 40, 6), "N:40,1": (6, 40, 1), "N:8,5,1": (6, 8, 5, 1)}


def build(layout="NK", spec=None, dtype=ir.DataType.FLOAT, seed=0):
    spec = spec or WeightSpec(4, 16, False)
    weight = normal((6, 40), seed)
    grid = min_max_grid(weight, spec)
    codes = quantize(weight, grid, spec)
    return QuantizedTensor(codes, grid, spec, layout=layout, dtype=dtype, name="w"), codes, grid


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_turned_there_and_back(layout):
    weight = normal((6, 40), 1)
    stored = to_stored(weight, layout)
    assert stored.shape == stored_shape(layout, 6, 40) == LAYOUTS[layout]
    assert np.shares_memory(stored, weight)
    assert np.array_equal(from_stored(stored, layout), weight)
    by_hand = weight.T if "KN" in layout else weight
    assert np.array_equal(stored.reshape(by_hand.shape), by_hand)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_reads_as_the_dequantized_weight_of_its_node(layout, bits, symmetric):
    spec = WeightSpec(bits, 16, symmetric)
    tensor, codes, grid = build(layout, spec)
    values = dequantize(codes, grid.scale, grid.zero_point, 16)
    assert (tensor.rows, tensor.columns) == (6, 40)
    assert tuple(tensor.shape) == LAYOUTS[layout]
    assert tensor.dtype == ir.DataType.FLOAT
    assert np.array_equal(tensor.codes(), codes)
    assert np.array_equal(tensor.dequantized(), values)
    assert np.array_equal(tensor.numpy(), to_stored(values, layout))
    assert tensor.numpy().flags.c_contiguous
    assert tensor.tobytes() == np.ascontiguousarray(to_stored(values, layout)).tobytes()
    assert (tensor.zero_point is None) == symmetric


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_has_the_dtype_of_the_weight_that_it_replaces(dtype):
    spec = WeightSpec(4, 16, False, True, dtype)
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    tensor, _, _ = build(spec=spec, dtype=ir.DataType[dtype.upper()])
    assert tensor.numpy().dtype == kind
    assert tensor.scale.dtype == kind
    assert np.array_equal(tensor.numpy(), tensor.dequantized().astype(kind))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_serializes_as_a_float_tensor(layout):
    tensor, _, _ = build(layout)
    proto = ir.serde.serialize_tensor(tensor)
    assert proto.name == "w"
    assert np.array_equal(numpy_helper.to_array(proto), tensor.numpy())


def test_values_are_made_anew_and_not_kept():
    tensor, _, _ = build()
    assert tensor.numpy() is not tensor.numpy()


@pytest.mark.parametrize(
    ("bits", "symmetric", "scale_dtype", "expected"),
    [
        (4, True, "float32", 6 * (20 + 3 * 4)),  # 40 codes, 3 scales of groups of 16
        (3, True, "float32", 6 * (20 + 3 * 4)),  # the same: codes of 3 bits are stored in 4
        (3, False, "float32", 6 * (20 + 3 * 4 + 2)),
        (4, False, "float32", 6 * (20 + 3 * 4 + 2)),  # 3 zero points in 12 bits
        (2, False, "float16", 6 * (10 + 3 * 2 + 1)),
        (8, False, "bfloat16", 6 * (40 + 3 * 2 + 3)),
    ],
)
def test_it_counts_the_bytes_that_it_stands_for(bits, symmetric, scale_dtype, expected):
    tensor, _, _ = build(spec=WeightSpec(bits, 16, symmetric, True, scale_dtype))
    assert tensor.stored_bytes == expected
    assert tensor.nbytes == 6 * 40 * 4
