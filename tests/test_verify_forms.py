"""A quantized cache is decoded as the operator means it, whatever its scales' shape and place."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import ModelError
from qcompiler.verify_forms import cache_decoders, holds_float8
from tests.stored_models import externalize, make_model, value

HEADS, SIZE = 2, 8


def attention(scale, bits=8, **attributes):
    """A GroupQueryAttention whose keys are codes; the model is looked at, not run."""
    inputs = ["q", "k", "v", "past_k", "past_v", "len", "total", *[""] * 5, "k_scale", "v_scale"]
    node = helper.make_node(
        "GroupQueryAttention", inputs, ["y", "present_k", "present_v"], domain="com.microsoft", num_heads=2,
        kv_num_heads=2, kv_cache_bit_width=bits, **attributes,
    )  # fmt: skip
    outputs = [value("y", [1, 1, 16]), value("present_k", [1, HEADS, 3, SIZE], TensorProto.INT8)]
    constants = [] if scale is None else [numpy_helper.from_array(scale, "k_scale")]
    return make_model([node], [value("q", [1, 1, 16])], outputs, constants, opsets=(("", 21), ("com.microsoft", 1)))


@pytest.mark.parametrize("shape", [(1, HEADS, 1, SIZE), (HEADS, SIZE), (HEADS * SIZE,), (1,), ()])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_become_the_values_of_a_loop(tmp_path, shape, bits):
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.5, 2, shape).astype(np.float32)
    (decode,) = cache_decoders(attention(scale, bits, k_quant_type="PER_CHANNEL"), tmp_path, "m").values()
    dtype, width = (np.int8, SIZE) if bits == 8 else (np.uint8, SIZE // 2)
    codes = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, (1, HEADS, 3, width)).astype(dtype)
    found = decode(codes)
    flat = np.broadcast_to(scale.reshape(-1), HEADS * SIZE)
    for head in range(HEADS):
        for token in range(3):
            for channel in range(SIZE):
                code = int(codes[0, head, token, channel if bits == 8 else channel // 2])
                code = code if bits == 8 else ((code >> 4) if channel % 2 else (code & 15)) - 8
                assert found[0, head, token, channel] == np.float32(code) * flat[head * SIZE + channel]


@pytest.mark.parametrize("attributes", [{}, {"k_quant_type": "NONE", "v_quant_type": "NONE"}])
def test_a_float_cache_and_one_that_is_no_output_need_no_decoder(tmp_path, attributes):
    assert cache_decoders(attention(None, **attributes), tmp_path, "m") == {}
    scale = np.ones(1, np.float32)
    assert list(cache_decoders(attention(scale, k_quant_type="PER_TENSOR"), tmp_path, "m")) == ["present_k"]


def test_scales_in_external_data_and_scales_that_are_computed(tmp_path):
    scale = np.arange(1, HEADS * SIZE + 1, dtype=np.float32)
    externalize(attention(scale, k_quant_type="PER_CHANNEL"), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    (decode,) = cache_decoders(model, tmp_path, "m").values()
    assert np.array_equal(decode(np.ones((1, HEADS, 1, SIZE), np.int8)).reshape(-1), scale)
    with pytest.raises(ModelError, match="m: 'k_scale' is no constant"):
        cache_decoders(attention(None, k_quant_type="PER_CHANNEL"), tmp_path, "m")


def test_8_bit_floats_are_noticed():
    assert not holds_float8(attention(np.ones(1, np.float32)))
    model = attention(None)
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, [1], [1.0]))
    assert holds_float8(model)
