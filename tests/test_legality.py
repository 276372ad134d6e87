"""Illegal models are noticed, and the pass that made them is named."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import PassError
from qcompiler.graph import PASS_KEY
from qcompiler.legality import check_legal, lowered_nodes
from qcompiler.passes.base import Stage
from tests.builders import apply, context, decoder, linear_model, normal, parse, quantized, token_batches

BRANCHES = """g (bool p, float[2,8] x) => (float[2,8] y) {
    a = Neg(x)
    y = If (p) <then_branch = yes () => (float[2,8] s) { h = MatMul(a, own) s = Add(h, w) },
        else_branch = no () => (float[2,8] t) { t = Neg(x) }>
}"""


def branches():
    return parse(BRANCHES, {"yes.own": normal((8, 8), 1), "w": normal(8, 2)})


def illegal(model, stage, message):
    with pytest.raises(PassError) as caught:
        check_legal(model, stage, "my_pass")
    assert str(caught.value).startswith("my_pass: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("build", [linear_model, branches, lambda: decoder(1)])
def test_a_float_model_is_legal_at_every_stage(build, stage):
    check_legal(build(), stage, "my_pass")


def test_values_that_nothing_computes_before_they_are_read():
    model = parse("g (float[8] x) => (float[8] y) { [one] a = Neg(x) [two] y = Relu(a) }")
    first, second = model.graph
    second.replace_input_with(0, ir.Value(name="lost"))
    illegal(model, Stage.PLAN, "'two' (Relu) reads 'lost', which nothing computes before it")
    second.replace_input_with(0, first.outputs[0])
    model.graph.remove(first)
    model.graph.append(first)
    illegal(model, Stage.PLAN, "'two' (Relu) reads 'a', which nothing computes before it")


def test_an_initializer_that_was_removed_is_missed():
    model = linear_model()
    model.graph.initializers.pop("w")
    illegal(model, Stage.PLAN, "'fc' (MatMul) reads 'w', which nothing computes")


def test_bodies_are_checked_with_what_is_around_them():
    model = branches()
    (body,) = (graph for graph in model.graphs() if graph.name == "yes")
    body.initializers.pop("own")
    illegal(model, Stage.PLAN, "(MatMul) reads 'own'")
    model = branches()
    first, second = model.graph
    model.graph.remove(first, safe=False)
    model.graph.append(first)
    illegal(model, Stage.PLAN, "(MatMul) reads 'a'")
    assert second.op_type == "If"


def test_names_are_unique_in_a_graph_and_between_it_and_its_bodies():
    model = parse("g (float[8] x) => (float[8] y) { a = Neg(x) b = Exp(x) y = Add(a, b) }")
    model.graph[1].outputs[0].name = "a"
    illegal(model, Stage.PLAN, "two values are called 'a'")
    model.graph[1].outputs[0].name = "x"
    illegal(model, Stage.PLAN, "two values are called 'x'")
    model = branches()
    (body,) = (graph for graph in model.graphs() if graph.name == "yes")
    body[0].outputs[0].name = "a"
    illegal(model, Stage.PLAN, "two values are called 'a'")


def test_an_output_that_nothing_computes():
    model = linear_model()
    model.graph.outputs[0] = ir.Value(name="z")
    illegal(model, Stage.PLAN, "nothing computes the output 'z'")


@pytest.mark.parametrize("stage", [Stage.CANONICALIZE, Stage.PLAN, Stage.TRANSFORM, Stage.QUANTIZE])
def test_lowered_operators_do_not_come_before_their_stage(stage):
    model = quantized(linear_model())
    check_legal(model, stage, "my_pass")
    apply("fuse_matmul_nbits", model)
    illegal(model, stage, "made a MatMulNBits ('fc_MatMulNBits') before the LOWER stage")
    check_legal(model, Stage.LOWER, "my_pass")
    # Unless the model came with it, from an earlier compilation or from elsewhere.
    check_legal(model, stage, "my_pass", lowered_nodes(model))
    model.graph[0].metadata_props.pop(PASS_KEY)
    check_legal(model, stage, "my_pass")


def test_no_quantized_weight_is_left_at_the_end_bodies_included():
    model = quantized(linear_model())
    check_legal(model, Stage.LOWER, "my_pass")
    illegal(model, Stage.CLEANUP, "the quantized weight 'w' was never lowered")
    text = BRANCHES.replace("float[2,8]", "float[2,64]")
    model = parse(text, {"yes.own": normal((64, 64), 1), "w": normal(64, 2)})
    quantized(model)
    illegal(model, Stage.CLEANUP, "the quantized weight 'own' was never lowered")


def test_a_compiled_model_can_be_compiled_again():
    """Its marks are those of the pass that made a node, which an earlier compilation has left there."""
    from qcompiler import pipeline
    from qcompiler.instruments import Legality, MemoryMeter
    from qcompiler.pass_manager import PassManager
    from qcompiler.scheme import Scheme
    from qcompiler.scheme_plan import Pattern, SchemePlan

    model = decoder(1)
    for ignored in (("re:l0",), ()):
        plan = SchemePlan(Scheme(4), ignore=tuple(map(Pattern, ignored)))
        ctx = context(plan=plan, algorithms=("rtn",))
        with MemoryMeter() as meter:
            reports = PassManager(pipeline.build(ctx.config, ctx), [Legality()]).run(model, meter)
        assert any(report.name == "fuse_matmul_nbits" and report.modified for report in reports)
    assert sum(node.op_type == "MatMulNBits" for node in model.graph) == 8
    assert sum(node.op_type == "MatMul" for node in model.graph) == 2  # of two activations
    from tests.builders import run

    assert np.isfinite(run(model, token_batches(1)[0])[0]).all()


def test_a_decoded_activation_is_not_a_weight_that_was_spelled_out():
    from tests.integer_models import ROWS, batches
    from tests.integer_models import graph as small

    model, data = small("h = MatMul(x, m0) n = Neg(h) y = MatMul(n, m1)", ROWS), batches(ROWS)
    ctx = context(scheme="w8a8", batches=data)
    quantized(model, ctx)
    apply("insert_qdq", model, ctx)
    assert any(node.op_type == "DequantizeLinear" for node in model.graph)
    assert lowered_nodes(model) == set()
    check_legal(model, Stage.QUANTIZE, "my_pass")
    apply("export_qdq", model, ctx)
    assert {node.inputs[0].name for node in lowered_nodes(model)} == {"m0_codes", "m1_codes"}
    illegal(model, Stage.QUANTIZE, "made a DequantizeLinear")
