"""TorchGraph: constants and what stands in their place, what is freed, bodies, segments, and what is refused."""

import subprocess
import sys
import weakref

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import KernelError
from qcompiler.segments import plan_segments, segment_model
from qcompiler.session import OrtRunner
from qcompiler.sites import find_sites
from tests.builders import apply, context, decoder, normal, parse, quantized, token_batches
from tests.torch_graph.common import assert_same, relative_error, run_ort, run_torch, to_numpy, to_torch, torch_graph

pytestmark = pytest.mark.torch

MLP = """g (float[B,4] x) => (float[B,2] y) {
    [up] h = MatMul(x, w)
    a = Relu(h)
    [down] y = MatMul(a, v)
}"""
BRANCHES = """g (bool flag, float[B,4] x) => (float[B,4] z) {
    r = Mul(x, w)
    z = If (flag) <
        then_branch = yes () => (float[B,4] t) { i = Mul(r, own) t = Add(i, w) },
        else_branch = no () => (float[B,4] e) { e = Neg(r) }
    >
}"""
LOOP = """g (int64 n, float[4] x) => (float[4] last, float[K,4] all) {
    yes = Constant <value = bool {1}> ()
    last, all = Loop (n, yes, x) <
        body = step (int64 i, bool going, float[4] before) => (bool go, float[4] after, float[4] shown) {
            go = Identity(going)
            scaled = Mul(before, w)
            after = Add(scaled, x)
            shown = Neg(after)
        }
    >
}"""


def mlp():
    return parse(MLP, {"w": normal((4, 3), 0), "v": normal((3, 2), 1)})


def test_a_decoder_computes_what_onnxruntime_computes():
    model = decoder()
    (feeds,) = token_batches(1)
    assert relative_error(run_torch(model, feeds)["logits"], run_ort(model, feeds)["logits"]) < 1e-5


def test_a_segment_computes_what_onnxruntime_computes():
    from qcompiler.torch_graph import TorchGraph

    model = decoder()
    (boundary,) = token_batches(1)
    sites = [site for site in find_sites(model)[0] if site.role != "embedding"]
    for segment in plan_segments(model, sites):
        if not segment.outputs:
            continue
        inputs = {name: boundary[name] for name in segment.inputs}
        proto, fed = segment_model(model, segment, {name: array.dtype for name, array in inputs.items()})
        with OrtRunner(proto, threads=1, optimize=False, constants=fed) as runner:
            expected = {name: np.array(value) for name, value in runner.run(inputs).items()}
        graph = TorchGraph(segment.nodes, model.opset_imports, segment.outputs)
        assert set(graph.inputs) <= set(segment.inputs)
        feeds = {name: to_torch(array) for name, array in inputs.items() if name in graph.inputs}
        for name, tensor in graph.run(feeds).items():
            np.testing.assert_allclose(to_numpy(tensor), expected[name], rtol=1e-5, atol=1e-5)
        boundary = {name: boundary[name] for name in segment.carried} | expected


def test_overrides_take_the_place_of_constants_and_get_gradients():
    import torch

    model = mlp()
    graph = torch_graph(model)
    x, w = normal((5, 4), 2), normal((4, 3), 3)
    learned = to_torch(w).requires_grad_()
    result = graph.run({"x": to_torch(x)}, {"w": learned})["y"]
    v = normal((3, 2), 1)
    np.testing.assert_allclose(to_numpy(result), np.maximum(x @ w, 0) @ v, rtol=1e-5, atol=1e-6)
    result.sum().backward()
    np.testing.assert_allclose(to_numpy(learned.grad), x.T @ ((x @ w > 0) * v.sum(1)), rtol=1e-5, atol=1e-5)
    assert not graph.run({"x": torch.ones(1, 4)})["y"].requires_grad


def test_an_overridden_constant_is_not_read():
    model = mlp()
    graph = torch_graph(model)

    def fail():
        raise AssertionError("read")

    model.graph.initializers["w"].const_value = ir.LazyTensor(fail, ir.DataType.FLOAT, ir.Shape((4, 3)), name="w")
    w = normal((4, 3), 5)
    graph.run({"x": to_torch(normal((2, 4), 2))}, {"w": to_torch(w)})
    with pytest.raises(AssertionError, match="read"):
        graph.run({"x": to_torch(normal((2, 4), 2))})


def test_what_only_an_overridden_value_needs_does_not_run():
    graph = torch_graph(mlp())
    a = normal((2, 3), 4)
    result = graph.run({}, {"a": to_torch(a)})["y"]  # no x: nothing before a runs
    np.testing.assert_allclose(to_numpy(result), a @ normal((3, 2), 1), rtol=1e-5, atol=1e-6)


def test_a_constant_that_a_pass_replaces_is_read_again():
    model = mlp()
    graph = torch_graph(model)
    feeds = {"x": to_torch(normal((2, 4), 2))}
    before = graph.run(feeds)["y"]
    assert graph.run(feeds)["y"].equal(before)
    model.graph.initializers["w"].const_value = ir.Tensor(normal((4, 3), 7), name="w")
    np.testing.assert_array_equal(to_numpy(graph.run(feeds)["y"]), run_torch(model, {"x": normal((2, 4), 2)})["y"])
    assert not graph.run(feeds)["y"].equal(before)


def test_quantized_weights_are_read_as_the_floats_they_mean():
    model = parse("g (float[B,64] x) => (float[B,24] y) { [fc] y = MatMul(x, w) }", {"w": normal((64, 24), 0)})
    quantized(model)
    assert_same(model, {"x": normal((3, 64), 1)})


@pytest.mark.parametrize("symmetry", ["sym", "asym"])
@pytest.mark.parametrize(
    ("form", "bits", "operators"),
    [
        ("fuse_matmul_nbits", 2, ["MatMulNBits"]),
        ("fuse_matmul_nbits", 4, ["MatMulNBits"]),
        ("fuse_matmul_nbits", 8, ["MatMulNBits"]),
        ("export_qdq", 4, ["DequantizeLinear", "MatMul"]),
        ("export_qdq", 8, ["DequantizeLinear", "MatMul"]),
    ],
)
def test_compiled_models_compute_what_onnxruntime_computes(form, bits, operators, symmetry):
    model = parse("g (float[B,64] x) => (float[B,24] y) { [fc] y = MatMul(x, w) }", {"w": normal((64, 24), 0)})
    ctx = context(scheme=f"w{bits}a16-g32-{symmetry}")
    quantized(model, ctx)
    apply(form, model, ctx)
    assert [node.op_type for node in model.graph] == operators
    model.graph.node(0).attributes.pop("accuracy_level", None)  # lets ONNX Runtime round activations to 8 bits
    feeds = {"x": normal((3, 64), 1)}
    assert relative_error(run_torch(model, feeds)["y"], run_ort(model, feeds)["y"]) < 1e-5


def test_constants_share_the_memory_of_arrays_that_may_not_be_written():
    from qcompiler.torch_graph.dtypes import from_numpy

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    array.flags.writeable = False
    tensor = from_numpy(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert tensor.tolist() == array.tolist()
    empty = array[:0]
    assert not empty.flags.writeable
    assert from_numpy(empty).shape == (0, 3)
    turned = from_numpy(array.T)  # torch could use it as it lies, but nothing else here keeps strides
    assert turned.tolist() == array.T.tolist()


def test_tensors_are_freed_after_their_last_reader(monkeypatch):
    from qcompiler.torch_graph import executor

    model = parse("g (float[2] x) => (float[2] y) { a = Neg(x) b = Exp(a) c = Neg(b) d = Exp(c) y = Add(d, x) }")
    graph = torch_graph(model)
    made, alive = [], []
    compute = executor.TorchGraph._compute

    def watched(self, *args):
        alive.append(sum(reference() is not None for reference in made))
        results = compute(self, *args)
        made.extend(weakref.ref(result) for result in results)
        return results

    monkeypatch.setattr(executor.TorchGraph, "_compute", watched)
    graph.run({"x": to_torch(normal(2, 0))})
    assert alive == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("flag", [True, False])
def test_branches_read_what_is_around_them(flag):
    model = parse(BRANCHES, {"w": normal(4, 0), "yes.own": normal(4, 1)})
    feeds = {"flag": np.array(flag), "x": normal((3, 4), 2)}
    assert_same(model, feeds)
    own = to_torch(normal(4, 3)).requires_grad_()
    x = to_torch(feeds["x"]).requires_grad_()
    given = {"flag": to_torch(feeds["flag"]), "x": x}
    result = torch_graph(model).run(given, {"own": own, "w": to_torch(normal(4, 4))})["z"]
    result.sum().backward()
    w = normal(4, 4)
    expected = feeds["x"] * w * normal(4, 3) + w if flag else -feeds["x"] * w
    np.testing.assert_allclose(to_numpy(result), expected, rtol=1e-5, atol=1e-6)
    assert x.grad is not None
    assert (own.grad is not None) == flag


@pytest.mark.parametrize("trips", [0, 1, 3])
def test_loops_carry_values_and_collect_them(trips):
    model = parse(LOOP, {"w": normal(4, 0)})
    assert_same(model, {"n": np.array(trips), "x": normal(4, 1)})
    x = to_torch(normal(4, 1)).requires_grad_()
    results = torch_graph(model).run({"n": to_torch(np.array(trips)), "x": x})
    results["last"].sum().backward()
    expected = sum(normal(4, 0) ** power for power in range(trips + 1))
    np.testing.assert_allclose(to_numpy(x.grad), expected, rtol=1e-5, atol=1e-6)


def test_rows_without_a_key_have_no_gradient():
    """The guard that exporters put around Softmax; a NaN in its gradient would reach everything."""
    import torch

    model = parse(
        "g (float[2,3] x, float[2,3] mask) => (float[2,3] y) {"
        " s = Add(x, mask) p = Softmax(s) bad = IsNaN(p) y = Where(bad, zero, p) }",
        {"zero": np.zeros((), np.float32)},
    )
    mask = np.array([[0, 0, -np.inf], [-np.inf] * 3], np.float32)
    feeds = {"x": normal((2, 3), 0), "mask": mask}
    assert_same(model, feeds)
    x = to_torch(feeds["x"]).requires_grad_()
    result = torch_graph(model).run({"x": x, "mask": to_torch(mask)})["y"]
    (result * torch.arange(3)).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad[0, :2].abs().min() > 0
    assert not x.grad[1].any()


def test_outputs_may_be_inputs_and_constants():
    model = parse("g (float[2] x) => (float[2] x, float[2] w) { unused = Neg(x) }", {"w": normal(2, 0)})
    results = run_torch(model, {"x": normal(2, 1)})
    assert results["x"].tolist() == normal(2, 1).tolist()
    assert results["w"].tolist() == normal(2, 0).tolist()


def test_every_unsupported_node_is_named_with_what_there_is():
    from qcompiler.torch_graph import TorchGraph, unsupported

    model = parse(
        "g (float[2] x) => (float[2] y) { [first] a = NoSuchOperator(x) [second] b = my.domain.Thing(a)"
        " [third] y = BatchNormalization <training_mode = 1> (b, x, x, x, x) }"
    )
    nodes, imports = list(model.graph), {"": 21}
    problems = unsupported(nodes, imports)
    with pytest.raises(KernelError) as caught:
        TorchGraph(nodes, imports, ["y"])
    assert str(caught.value) == "\n".join(problems)
    first, second, third = problems
    assert first.startswith("ai.onnx.NoSuchOperator 'first' at version 21: the operator is not among those implemented")
    assert "Abs, Acos" in first
    assert second.startswith("my.domain.Thing 'second' at version 1: ")
    assert "domains: ai.onnx, com.microsoft" in second
    assert third.endswith("training_mode=1 is not implemented, only 0")


def test_a_node_within_a_body_is_named_too():
    from qcompiler.torch_graph import unsupported

    model = parse(BRANCHES.replace("Neg", "NoSuchOperator"), {"w": normal(4, 0), "yes.own": normal(4, 1)})
    (problem,) = unsupported(list(model.graph), model.opset_imports)
    assert problem.startswith("ai.onnx.NoSuchOperator 'e' at version 21")


def test_types_that_pytorch_cannot_hold_are_refused():
    from qcompiler.torch_graph import unsupported

    model = parse("g (string[2] x) => (string[2] y) { y = Identity(x) }")
    (problem,) = unsupported(list(model.graph), model.opset_imports)
    assert problem == "ai.onnx.Identity 'y' at version 21: 'x' is of type STRING, which PyTorch cannot hold"


def test_names_that_are_missing_or_unknown_are_errors():
    graph = torch_graph(mlp())
    x = to_torch(normal((1, 4), 0))
    with pytest.raises(KernelError, match=r"inputs are missing: x; given: w"):
        graph.run({}, {"w": to_torch(normal((4, 3), 0))})
    with pytest.raises(KernelError, match=r"no value of the graph is called nothing; inputs: x"):
        graph.run({"x": x, "nothing": x})


def test_a_node_that_fails_is_named_with_the_shapes_of_its_inputs():
    with pytest.raises(KernelError, match=r"ai\.onnx\.MatMul 'up' failed on inputs float32\[2, 5\], float32\[4, 3\]: "):
        run_torch(mlp(), {"x": normal((2, 5), 0)})


def test_the_compiler_is_imported_without_torch():
    code = "import sys, qcompiler, qcompiler.driver; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_without_torch_the_error_says_what_to_install():
    code = """
import sys
sys.modules["torch"] = None
from qcompiler.errors import KernelError
try:
    import qcompiler.torch_graph
except KernelError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert "pip install 'onnx-qcompiler[torch]'" in done.stdout
