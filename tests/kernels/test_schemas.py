"""Bodies on a stock ONNX Runtime against the numpy reference, and the reference against plain loops."""

import numpy as np
import onnx
import pytest

from qcompiler.errors import KernelError
from qcompiler.kernels import reference
from qcompiler.kernels.schemas import DOMAIN, OPERATORS, function_proto, operator
from qcompiler.numerics.packing import pack_stream, unpack_stream
from qcompiler.session import OrtRunner
from tests.kernel_cases import cases, make_inputs, model_of

NAMES = pytest.mark.parametrize("name", OPERATORS)


def relative(found, expected):
    size = np.abs(expected.astype(np.float64)).max() or 1.0
    return np.abs(found.astype(np.float64) - expected.astype(np.float64)).max() / size


def run_body(name, inputs):
    with OrtRunner(model_of(name, inputs).SerializeToString(), threads=1) as runner:
        return runner.run({"A": inputs[0]})["Y"].copy()


@pytest.mark.parametrize(("name", "options"), list(cases()), ids=lambda value: str(value) if isinstance(value, str) else
                         "-".join(map(str, value.values())))  # fmt: skip
def test_bodies_compute_what_the_reference_says(name, options):
    for seed, rows in enumerate(((1,), (2, 3), (65,))):
        inputs = make_inputs(name, rows, seed=seed, **options)
        found, expected = run_body(name, inputs), reference.run(name, inputs)
        assert found.shape == expected.shape == (*rows, options["N"])
        assert relative(found, expected) <= 1e-5


@NAMES
def test_bodies_take_float16(name):
    inputs = make_inputs(name, (3,), dtype="float16")
    found, expected = run_body(name, inputs), reference.run(name, inputs)
    assert found.dtype == expected.dtype == np.float16
    assert relative(found, expected) <= 5e-3  # sums of 136 products in float16


@NAMES
@pytest.mark.parametrize("opset", [18, 21, 23])
def test_models_with_bodies_are_valid(name, opset):
    model = model_of(name, make_inputs(name), opset=opset)
    onnx.checker.check_model(model, full_check=True)
    (function,) = model.functions
    assert (function.domain, function.name) == (DOMAIN, name)
    assert [*function.input] == [each.name for each in OPERATORS[name].inputs]
    computing = [node for node in function.node if node.op_type != "Constant"]
    assert len(computing) <= 22  # bodies are expanded at each of hundreds of nodes


def test_what_there_is_no_body_for():
    with pytest.raises(KernelError, match=r"ai.qcompiler has no operator MatMul5Bits; it has MatMul1Bit, MatMul2Bits"):
        operator("MatMul5Bits")
    with pytest.raises(KernelError, match="the body of MatMul4Bits needs opset 18, and the model has 17"):
        function_proto("MatMul4Bits", 17)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "group_size"), [(64, 64), (136, 32), (7, 16), (1, 8), (300, 128)])
def test_streams_hold_codes_bit_by_bit(bits, columns, group_size):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, columns)).astype(np.uint8)
    stream = pack_stream(codes, bits, group_size)
    groups = -(-columns // group_size)
    assert stream.shape == (3, groups, group_size * bits // 8)
    for row, column in np.ndindex(codes.shape):
        group, place = divmod(column, group_size)
        found = 0
        for bit in range(bits):
            byte, at = divmod(place * bits + bit, 8)
            found |= (int(stream[row, group, byte]) >> at & 1) << bit
        assert found == codes[row, column]
    assert np.array_equal(unpack_stream(stream, bits, columns), codes)
    assert not unpack_stream(stream, bits, groups * group_size)[:, columns:].any()


@NAMES
def test_the_reference_is_a_loop_over_columns(name):
    """Column by column, from the words of `schemas`."""
    entry = 2 if "Codebook" in name else 1
    inputs = make_inputs(name, (2,), N=3, K=40, group_size=16, entry=entry)
    bits, (a, *rest) = OPERATORS[name].bits, inputs
    codes = unpack_stream(rest[0], bits, 48 // entry)
    named = dict(zip([each.name for each in OPERATORS[name].inputs], inputs, strict=True))
    expected = np.zeros((2, 3))
    for m, n, k in np.ndindex(2, 3, 40):
        scale, x = float(named["scales"][n, k // 16, 0]), float(a[m, k])
        code = int(codes[n, k // entry])
        if "Codebook" in name:
            value = float(named["codebook"][int(named["starts"][n, 0, 0]) + code, k % entry])
        elif name == "MatMulSigns":
            value = 1.0 if code else -1.0
            x = (1.0 if x >= 0 else -1.0) * float(np.abs(a[m].astype(np.float64)).mean())
        else:
            value = code - float(named["zero_points"][n, k // 16, 0])
        expected[m, n] += x * value * scale
    expected += np.broadcast_to(named["bias"], 3)
    assert relative(reference.run(name, inputs), expected) <= 1e-6


def test_rounded_activations():
    rows = np.array([[1.0, -127.0, 0.4, 0.0, 0.0, 0.0, 2.54, 1.27]])
    found = reference.quantized_rows(rows, 4)
    np.testing.assert_allclose(found, [[1.0, -127.0, 0.0, 0.0, 0.0, 0.0, 2.54, 1.28]], atol=1e-12)
    found = reference.quantized_rows(rows, 3)  # a ragged last group
    assert found.shape == rows.shape
    np.testing.assert_allclose(found[0, 6:], [2.54, 1.28], atol=1e-12)
