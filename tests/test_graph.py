"""Reading and replacing weights, and names that nobody else has."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.files.loader import load_model
from qcompiler.graph import (
    PASS_KEY,
    collect_names,
    constant_array,
    input_feature_axis,
    read_weight,
    unique_name,
    walk,
    write_weight,
)
from qcompiler.numerics.affine import WeightSpec, min_max_grid, quantize
from qcompiler.quantized import QuantizedTensor
from qcompiler.sites import find_sites
from tests.builders import normal, parse, run, the_site
from tests.stored_models import externalize, linear
from tests.test_sites import LINEAR, NESTED, SMALL
from tests.test_sites import linear as linear_case


@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weight_that_was_written_reads_as_its_values_and_the_model_runs(case, bits):
    text, weights, shape, out, _ = LINEAR[case]
    model = linear_case(text, weights, shape, out)
    site = the_site(model)
    weight = read_weight(site)
    spec = WeightSpec(bits, 32, False)
    grid = min_max_grid(weight, spec)
    codes = quantize(weight, grid, spec)
    tensor = write_weight(site, codes, grid, spec, "rtn")
    assert site.quantized is tensor
    assert site.node.metadata_props[PASS_KEY] == "rtn"
    assert list(tensor.shape) == list(weights["w"].shape)
    values = read_weight(site)
    group = np.arange(64) // 32
    assert np.array_equal(values, (codes - grid.zero_point[:, group]) * grid.scale[:, group])
    again = the_site(model)
    assert (again.rows, again.columns, again.layout) == (site.rows, site.columns, site.layout)
    x = normal([{"B": 2, "S": 3, "T": 5, "H": 2, "V": 3}.get(size) or int(size) for size in shape.split(",")], 1)
    axis = input_feature_axis(site)
    (y,) = run(model, {"x": x})
    want = np.moveaxis(np.moveaxis(x, axis, -1) @ values.T, -1, axis)
    assert np.allclose(y, want, rtol=1e-5, atol=1e-5)


def test_a_weight_in_a_file_is_mapped_and_not_read(tmp_path):
    path = externalize(linear(64, 32), tmp_path / "m.onnx")
    site = the_site(load_model(path))
    array = constant_array(site.weight)
    assert not array.flags.owndata
    assert not array.flags.writeable
    assert np.array_equal(read_weight(site), normal((64, 32), 0).T)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_constants_are_arrays_too(shape):
    tensor = ir.Tensor(np.zeros(shape, np.float32), name="w")
    value = ir.Value(name="w", const_value=tensor)
    assert constant_array(value).shape == shape


def test_names_are_numbered_from_one_where_they_are_taken():
    model = parse("g (float[8] x) => (float[8] y) { a = Neg(x) y = Add(a, w) }", {"w": normal(8, 1)})
    graph = model.graph
    assert [unique_name(graph, "fresh") for _ in range(3)] == ["fresh", "fresh_1", "fresh_2"]
    assert [unique_name(graph, name) for name in ("x", "a", "w", "y")] == ["x_1", "a_1", "w_1", "y_1"]


def test_no_body_gets_a_name_of_the_graph_around_it_or_of_another_body():
    """ONNX Runtime refuses a model whose body reuses a name that is visible in it."""
    model = parse(NESTED, {"w": SMALL["w"], "b.own": SMALL["v"]})
    graphs = [model.graph, *model.graph.subgraphs()]
    assert len(graphs) == 5
    collect_names(model.graph)
    assert len({unique_name(graph, "fresh") for graph in graphs}) == 5
    for graph in graphs:
        assert unique_name(graph, "own") not in ("own", "w", "x", "t")


def test_names_made_since_are_known_after_the_next_look_at_the_model():
    model = parse("g (float[8] x) => (float[8] y) { y = Neg(x) }")
    assert unique_name(model.graph, "late") == "late"
    model.graph[0].outputs[0].name = "z"
    find_sites(model)
    assert unique_name(model.graph, "late") == "late"
    assert unique_name(model.graph, "z") == "z_1"


def test_walking_meets_bodies_where_they_are():
    model = parse(NESTED, {"w": SMALL["w"], "b.own": SMALL["v"]})
    seen = [(node.name or node.op_type, nested) for node, nested in walk(model.graph)]
    assert seen == [("outer", ""), ("mid", "outer"), ("deep", "outer"), ("other", "outer"), ("Relu", "outer")]


def test_a_site_knows_its_scale_type_and_whether_it_is_quantized():
    model = linear_case("[fc] y = MatMul(x, w)", {"w": normal((64, 24), 0)})
    site = the_site(model)
    assert site.quantized is None
    assert site.scale_dtype == "float32"
    spec = WeightSpec(4, 64, True)
    grid = min_max_grid(read_weight(site), spec)
    write_weight(site, quantize(read_weight(site), grid, spec), grid, spec, "rtn")
    assert isinstance(the_site(model).quantized, QuantizedTensor)
    assert the_site(model).dtype == ir.DataType.FLOAT
