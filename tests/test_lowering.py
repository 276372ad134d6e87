"""Constants, nodes and their replacement, as all lowering passes do it."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph import PASS_KEY, SCHEME_KEY, SITE_KEY
from qcompiler.lowering import add_constant, append_nodes, block_constants, make_node, replace_nodes
from qcompiler.numerics.packing import unpack_codes
from tests.builders import context, linear_model, normal, parse, quantized, run, text_of, the_site


def test_constants_are_registered_under_free_names():
    model = linear_model(8, 4)
    array = normal((2, 3), 1)
    values = [add_constant(model.graph, name, array) for name in ("w", "k", "k")]
    assert [value.name for value in values] == ["w_1", "k", "k_1"]
    assert all(model.graph.initializers[value.name] is value for value in values)
    for value in values:
        assert np.array_equal(value.const_value.numpy(), array)
        assert value.const_value.name == value.name
        assert str(value.shape) == "[2,3]"
        assert value.dtype == value.const_value.dtype


@pytest.mark.parametrize(("bits", "width"), [(2, 2), (3, 4), (4, 4), (8, 8)])
@pytest.mark.parametrize(
    ("K", "scheme", "size", "blocks"),
    [(64, "g32", 32, 2), (40, "g32", 32, 2), (300, "g256", 256, 2), (40, "channel", 64, 1), (300, "channel", 64, 5)],
)
@pytest.mark.parametrize("form", ["sym", "asym"])
def test_block_constants_hold_the_codes_scales_and_zero_points_of_each_block(
    bits, width, K, scheme, size, blocks, form
):
    model = linear_model(K, 6)
    quantized(model, context(scheme=f"w{bits}a16-{scheme}-{form}"))
    site = the_site(model)
    tensor = site.quantized
    codes, scales, zeros = block_constants(site)
    blob = codes.const_value.numpy()
    assert blob.shape == (6, blocks, size * width // 8)
    unpacked = unpack_codes(blob, width, size).reshape(6, -1)
    # Without zero points the middle of the container means zero.
    shift = 4 if bits == 3 and form == "sym" else 0
    assert np.array_equal(unpacked[:, :K], tensor.codes() + shift)
    assert (unpacked[:, K:] == tensor.spec.format.mid + shift).all()
    group = np.arange(blocks) * size // tensor.spec.group_size
    assert np.array_equal(scales.const_value.numpy(), tensor.scale[:, group])
    if form == "sym":
        assert zeros is None
    else:
        packed = zeros.const_value.numpy()
        assert packed.shape == (6, -(-blocks * width // 8))
        assert np.array_equal(unpack_codes(packed, width, blocks), tensor.zero_point[:, group])


def test_constants_are_made_once_and_codes_of_both_shapes_are_one_memory():
    model = linear_model(64, 6)
    quantized(model, context(scheme="w4a16-g32-asym"))
    site = the_site(model)
    first, again, flat = block_constants(site), block_constants(site), block_constants(site, flat=True)
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert flat[1] is first[1]
    assert flat[2] is first[2]
    assert flat[0].const_value.numpy().shape == (6, 32)
    assert np.shares_memory(flat[0].const_value.numpy(), first[0].const_value.numpy())
    assert np.shares_memory(first[0].const_value.numpy(), site.quantized.packed)
    assert [value.name for value in (*first, flat[0])] == ["w_codes", "w_scales", "w_zero_points", "w_table"]


def test_a_made_node_carries_its_origins_metadata_and_the_name_of_its_pass():
    model = linear_model(8, 4)
    (origin,) = model.graph
    origin.metadata_props.update({"scope": "a.b", SCHEME_KEY: "w4a16", SITE_KEY: "fc", PASS_KEY: "rtn"})
    x = model.graph.inputs[0]
    node = make_node(model.graph, "Slice", [x, None, x, None, None], {"axis": 1}, origin, "my_pass", "my.domain")
    assert (node.domain, node.op_type, node.name) == ("my.domain", "Slice", "fc_Slice")
    assert dict(node.metadata_props) == {"scope": "a.b", PASS_KEY: "my_pass"}
    assert list(node.inputs) == [x, None, x]  # absent inputs at the end are left off
    assert node.attributes["axis"].as_int() == 1
    assert [output.name for output in node.outputs] == ["fc_Slice_output"]
    other = make_node(model.graph, "Slice", [x], {}, origin, "my_pass")
    assert (other.name, other.outputs[0].name) == ("fc_Slice_1", "fc_Slice_1_output")
    origin.name = None
    assert make_node(model.graph, "Slice", [x], {}, origin, "my_pass").name == "MatMul_Slice"


def test_replaced_nodes_leave_their_name_type_shape_and_readers_behind():
    text = """g (float[2,8] x) => (float[2,8] y, float[2,8] z) { [n] y = Neg(x) a = Relu(y) z = Add(a, y) }"""
    model = parse(text)
    x = normal((2, 8), 1)
    graph = model.graph
    old = graph[0]
    first = make_node(graph, "Exp", [graph.inputs[0]], {}, old, "p")
    second = make_node(graph, "Neg", [first.outputs[0]], {}, old, "p")
    replace_nodes(graph, [old], [first, second], second.outputs[0])
    assert text_of(model) == ["n_Exp_output = Exp(x)", "y = Neg(n_Exp_output)", "a = Relu(y)", "z = Add(a, y)"]
    assert [output.name for output in graph.outputs] == ["y", "z"]
    assert graph.outputs[0] is second.outputs[0]
    assert str(second.outputs[0].shape) == "[2,8]"
    y, z = run(model, {"x": x})
    assert np.allclose(y, -np.exp(x))
    assert np.allclose(z, np.maximum(y, 0) + y)


def test_several_nodes_are_replaced_by_the_result_of_the_first():
    model = parse("g (float[2,8] x) => (float[2,8] y) { a = Neg(x) y = Exp(a) }")
    graph = model.graph
    inner, outer = graph
    node = make_node(graph, "Relu", [graph.inputs[0]], {}, inner, "p")
    replace_nodes(graph, [outer, inner], [node], node.outputs[0])
    assert text_of(model) == ["y = Relu(x)"]
    assert node.outputs[0].is_graph_output()


def test_appended_nodes_take_name_type_shape_and_readers():
    model = parse(
        "g (float[2,8] x) => (float[2,8] h, float[2,8] y) { [fc] h = MatMul(x, w) y = Neg(h) z = Add(h, h) }",
        {"w": normal((8, 8), 1)},
    )
    product, graph = model.graph[0], model.graph
    shape = product.outputs[0].shape
    scale = add_constant(graph, "two", np.float32(2))
    first = make_node(graph, "Mul", [product.outputs[0], scale], {}, product, "my_pass")
    second = make_node(graph, "Add", [first.outputs[0], product.outputs[0]], {}, product, "my_pass")
    append_nodes(graph, product, [first, second])
    assert text_of(model) == [
        "h_before_Mul = MatMul(x, w)",
        "fc_Mul_output = Mul(h_before_Mul, two)",
        "h = Add(fc_Mul_output, h_before_Mul)",
        "y = Neg(h)",
        "z = Add(h, h)",
    ]
    assert model.graph.outputs[0] is second.outputs[0]
    assert (second.outputs[0].dtype, second.outputs[0].shape) == (ir.DataType.FLOAT, shape)
    x = normal((2, 8), 2)
    h, y = run(model, {"x": x})
    np.testing.assert_allclose(h, 3 * x @ model.graph.initializers["w"].const_value.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y, -h)
