"""What may be float16 is what ONNX's schemas say, and for ONNX Runtime's operators what its own say."""

import onnx_ir as ir
import pytest

from qcompiler.float_types import _RUNTIME, _STATISTICS, halves, infer_dtypes
from tests.builders import normal, parse

CASES = {
    "all": ("y = Add(x, x)", 21, [True, True], [True]),
    "sizes of Resize are float32": ("y = Resize(x, roi, scales)", 21, [True, True, False], [True]),
    "statistics are float32": ("y, mean = LayerNormalization(x, x)", 21, [True, True], [True, False]),
    "scales, from 19 on": ("y = DequantizeLinear(c, s)", 19, [False, True], [True]),
    "scales, before": ("y = DequantizeLinear(c, s)", 13, [False, False], [False]),
    "only float32": ("y, s1, z = DynamicQuantizeLinear(x)", 21, [False], [False, False, False]),
    "any number of inputs": ("y = Concat <axis = 0> (x, x, x)", 21, [True] * 3, [True]),
    "bodies": ("y = If (p) <then_branch = a () => (float[2] s) { s = Neg(x) }, "
               "else_branch = b () => (float[2] t) { t = Exp(x) }>", 21, [True], [True]),
    "ONNX Runtime's": ("y = com.microsoft.MatMulNBits(x, c, s)", 21, [True] * 3, [True]),
    "ONNX Runtime's, float32 only": ("y = com.microsoft.DynamicQuantizeLSTM(x, c)", 21, [False] * 2, [False]),
    "unknown": ("y = some.domain.Thing(x)", 21, [False], [False]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_may_be_float16(case):
    text, opset, inputs, outputs = CASES[case]
    model = parse(
        f"g (bool p, float[2] x, float[2] roi, float[2] scales, uint8[2] c, float s) => (float[2] y) {{ {text} }}"
    )
    assert halves(model.graph[0], opset) == (inputs, outputs)


@pytest.mark.parametrize("name", [name for name in _RUNTIME if name != "FusedMatMul"])
def test_the_table_is_that_of_onnx_runtime(name):
    """FusedMatMul's and the others' schemas are read from ONNX Runtime itself."""
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    schema = next(s for s in state.get_all_operator_schema() if s.name == name)
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def narrow(parameters):
        floats = ["tensor(float)" in allowed.get(p.typeStr, [p.typeStr]) for p in parameters]
        halved = ["tensor(float16)" in allowed.get(p.typeStr, [p.typeStr]) for p in parameters]
        return [i for i, (wide, half) in enumerate(zip(floats, halved, strict=True)) if wide and not half]

    assert tuple(narrow(schema.inputs)) == _RUNTIME[name]
    assert tuple(narrow(schema.outputs)) == _STATISTICS.get(name, ())


def test_types_follow_from_what_nodes_read():
    text = """g (float[2,4] x, int64[2] i, bool p) => (float[2,4] y) {
        a = MatMul(x, w)
        b = Cast <to = 7> (a)
        c = Shape(a)
        d = ConstantOfShape(c)
        e = Greater(a, x)
        f = com.microsoft.MatMulNBits(x, w)
        g1 = Gather(w, i)
        h = If (p) <then_branch = yes () => (float[2,4] s) { t = Neg(a) s = Neg(t) },
            else_branch = no () => (float[2,4] u) { u = Exp(a) }>
        y = Add(a, d)
    }"""
    model = parse(text, {"w": normal((4, 4), 0)})
    infer_dtypes(model)
    found = {output.name: output.dtype for node in model.graph.all_nodes() for output in node.outputs}
    kinds = ir.DataType
    assert found == {
        "a": kinds.FLOAT, "b": kinds.INT64, "c": kinds.INT64, "d": kinds.FLOAT, "e": kinds.BOOL, "f": kinds.FLOAT,
        "g1": kinds.FLOAT, "h": kinds.FLOAT, "t": kinds.FLOAT, "s": kinds.FLOAT, "u": kinds.FLOAT, "y": kinds.FLOAT,
    }  # fmt: skip
