"""Which opset is chosen, and what is left as it was; `test_opset_rules` has the operators."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.errors import PassError, SchemeError
from qcompiler.files.loader import load_model
from qcompiler.files.saver import save_model
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from tests.builders import apply, context, linear_model, normal, parse, quantized, run, text_of, value_names
from tests.stored_models import externalize

OLD = """g (float[2,6,64] x) => (float[2,24] y) <float[2,24] h> {
    [mean] m = ReduceMean <axes = [1], keepdims = 0> (x)
    [fc] h = MatMul (m, w)
    [soft] y = Softmax (h)
}"""


def old_model(opset=12, **options):
    return parse(OLD, {"w": normal((64, 24), 0)}, opset=opset, ir_version=7, **options)


def raised(model, **options):
    return apply("raise_opset", model, context(**options))


def test_the_graph_before_and_after():
    model, feeds = old_model(), {"x": normal((2, 6, 64), 1)}
    expected = run(model, feeds)[0]
    result = raised(model, opset=21)
    assert text_of(model) == ["m = ReduceMean(x, mean_axes)", "h = MatMul(m, w)", "y = Softmax(h)"]
    assert result.modified
    (record,) = result.records
    assert (record.site, record.action) == ("model", "rewritten")
    assert record.reason == "opset 12 raised to 21 (--opset), rewritten: 1 ReduceMean, 1 Softmax"
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "options", "opset"),
    [
        ("w8a16-channel-sym", {}, 13),
        ("w8a16-channel-asym", {"dtype": "float16"}, 19),
        ("w8a16-g32", {}, 21),
        ("w4a16-channel", {}, 21),
        ("w4a16-g64", {}, 21),
        ("w2a16-g64", {}, 25),
        ("w2a16-g64", {"N": 22}, 21),  # held in four bits
    ],
)
def test_the_lowest_opset_that_has_the_form_is_taken(scheme, options, opset):
    wanted = {"scheme": scheme, "output_format": "qdq"}
    for prepare in (lambda model: quantized(model, context(**wanted)), lambda model: assigned(model, wanted)):
        model = prepare(linear_model(opset=12, **options))
        assert raised(model, **wanted).modified
        assert model.opset_imports[""] == opset


def assigned(model, wanted):
    apply("assign_scheme", model, context(**wanted))
    return model


def test_a_lookup_table_is_decoded_by_plain_arithmetic():
    wanted = {"scheme": "w8a16-channel", "output_format": "qdq"}
    model = parse("g (int64[S] i) => (float[S,64] y) { y = Gather (w, i) }", {"w": normal((512, 64), 0)}, opset=12)
    (record,) = raised(quantized(model, context(**wanted)), **wanted).records
    assert record.reason == "opset 12 raised to 13 ('w' as w8a16-g64-asym needs 13), rewritten: nothing"


@pytest.mark.parametrize(
    ("opset", "wanted"),
    [
        (12, {"scheme": "w4a16"}),  # MatMulNBits is not of the standard domain
        (21, {"scheme": "w4a16", "output_format": "qdq"}),
        (24, {"scheme": "w4a16", "output_format": "qdq"}),
        (17, {"scheme": "w4a16", "opset": 17}),
    ],
)
def test_nothing_happens_without_need(opset, wanted):
    model = quantized(old_model(opset) if opset < 13 else linear_model(opset=opset), context(**wanted))
    before = ir.serde.serialize_model(model)
    result = raised(model, **wanted)
    assert not result.modified
    assert result.records == ()
    assert ir.serde.serialize_model(model) == before


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"opset": 12}, "--opset 12 is below the model's opset 17, and an opset can only be raised; leave --opset out"),
        ({"opset": 27}, "--opset 27 is more than ONNX Runtime knows; give 26 at most"),
        (
            {"opset": 20, "output_format": "qdq"},
            "--opset 20 is too low: 'fc' as w4a16-g64-asym needs 21; give at least 21, or leave --opset out",
        ),
    ],
)
def test_an_opset_that_cannot_be_had_is_refused(wanted, message):
    model = quantized(linear_model(opset=17), context(scheme="w4a16", **wanted))
    with pytest.raises(SchemeError) as caught:
        raised(model, **wanted)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "opset", "target", "message"),
    [
        (
            "g (float[2,3] x, float[2] s) => (float[] y) { [up] y = Upsample (x, s) }",
            9,
            21,
            "raise_opset: 'up' (Upsample) cannot be raised from opset 9 to 21: its scales, which decide how the "
            "nearest value is found, are not constant; export the model for opset 21, or leave --opset out",
        ),
        (
            "g (float[1,2,8,8] x) => (float[] y) { [norm] y = GlobalLpPool (x) }",
            21,
            23,
            "raise_opset: 'norm' (GlobalLpPool) cannot be raised from opset 21 to 23: ONNX Runtime has no kernel for "
            "it there; export the model for opset 23, or leave --opset out",
        ),
    ],
)
def test_a_node_that_cannot_be_raised_is_named(text, opset, target, message):
    with pytest.raises(PassError) as caught:
        raised(parse(text, opset=opset), opset=target)
    assert str(caught.value) == message


def test_local_functions_have_to_be_inlined_before():
    function = onnx.helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [onnx.helper.make_node("Add", ["a", "a"], ["b"])],
        [onnx.helper.make_opsetid("", 12)],
    )
    model = parse("g (float[2] x) => (float[2] y) { y = local.Twice (x) }", opset=12, functions=[function])
    with pytest.raises(PassError, match="run canonicalize before"):
        raised(model, opset=21)


def test_bodies_are_raised_and_keep_names_apart():
    text = """g (float[2,6] x, bool c) => (float[] y) { [if] y = If (c) <
        then_branch = t () => (float[] a) { [s] a = ReduceSum <axes = [1]> (x) },
        else_branch = e () => (float[] b) { [s] b = ReduceSum <axes = [0]> (x) }> }"""
    for flag in (True, False):
        model, feeds = parse(text, opset=12), {"x": normal((2, 6), 0), "c": np.array(flag)}
        expected = run(model, feeds)[0]
        raised(model, opset=18)
        np.testing.assert_array_equal(run(model, feeds)[0], expected)
    assert {"s_axes", "s_axes_1"} <= set(value_names(model))


def test_other_domains_and_operators_outside_the_standard_are_left_alone():
    text = "g (float[2,8] x) => (float[2,8] y) { h = SimplifiedLayerNormalization (x, s) y = com.microsoft.Gelu (h) }"
    model, feeds = parse(text, {"s": normal(8, 0)}, opset=12), {"x": normal((2, 8), 1)}
    expected = run(model, feeds)[0]
    raised(model, opset=21)
    np.testing.assert_array_equal(run(model, feeds)[0], expected)


def test_a_model_without_standard_operators_gets_the_opset():
    model = parse("g (float[2,8] x) => (float[2,8] y) { y = com.microsoft.Gelu (x) }")
    del model.opset_imports[""]
    assert raised(model, opset=21).modified
    assert model.opset_imports[""] == 21


def test_metadata_names_and_external_weights_stay(tmp_path):
    path = externalize(ir.serde.serialize_model(old_model()), tmp_path / "old.onnx")
    model = load_model(path)
    model.metadata_props["author"] = "me"
    model.graph.node("mean").metadata_props["scope"] = "pool"
    data = (tmp_path / "weights.data").rename(tmp_path / "away")
    raised(model, opset=21)  # without the weights
    data.rename(tmp_path / "weights.data")
    assert model.metadata_props == {"author": "me"}
    assert model.graph.node("mean").metadata_props["scope"] == "pool"
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["x", "y"]
    assert [node.name for node in model.graph] == ["mean", "fc", "soft"]
    save_model(model, tmp_path / "new.onnx", force=False)
    proto = onnx.load(tmp_path / "new.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == 7


@pytest.mark.parametrize(
    ("scheme", "dtype", "target", "opset"),
    [
        ("w8a8", "float32", "cpu", 13),
        ("w8a8-dynamic", "float32", "cpu", 13),
        ("w8a8", "float16", "cpu", 19),
        ("w8a16int", "float32", "portable", 21),
    ],
)
def test_what_quantized_activations_need_whatever_the_output_form(scheme, dtype, target, opset):
    model = linear_model(opset=11, dtype=dtype)
    ctx = context(scheme=scheme, target=target)
    apply("assign_scheme", model, ctx)
    assert apply("raise_opset", model, ctx).modified
    assert model.opset_imports[""] == opset


def test_a_site_that_keeps_its_kernel_needs_no_opset_beside_one_that_is_quantized_in_the_graph():
    plan = SchemePlan(Scheme.parse("w4a8"), overrides=((Pattern("two"), Scheme.parse("w8a8-dynamic")),))
    model = parse(
        "g (float[2,64] x) => (float[2,64] y) { [one] h = MatMul (x, w) [two] y = MatMul (h, v) }",
        {"w": normal((64, 64), 0), "v": normal((64, 64), 1)},
        opset=12,
    )
    ctx = context(plan=plan)
    apply("assign_scheme", model, ctx)
    apply("raise_opset", model, ctx)
    assert model.opset_imports[""] == 13  # not the 21 of 4-bit types
