"""Small models from text, what runs them, and what a pass needs to run on them."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import helper, numpy_helper

from qcompiler import passes
from qcompiler.config import CompileConfig
from qcompiler.graph import Site
from qcompiler.legality import check_legal
from qcompiler.passes.base import PassContext
from qcompiler.scheme import Scheme, SchemePlan
from qcompiler.sites import find_sites


def normal(shape, seed, dtype="float32", scale=1.0):
    """Standard normal values of a seed."""
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def parse(text, weights=None, *, opset=21, ir_version=10, functions=()):
    """A model from the text of its graph, for example ``g (float[B,8] x) => (float[B,4] y) { [name] y = MatMul(x, w) }``.

    `weights` are the initializers; a name with a dot ("then.w") belongs to the body whose graph is called "then".
    """
    graph = onnx.parser.parse_graph(text)
    for name, array in (weights or {}).items():
        body, dot, inner = name.partition(".")
        _find_graph(graph, body if dot else "").initializer.append(numpy_helper.from_array(array, inner or name))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    imports += [helper.make_opsetid(function.domain, 1) for function in functions]
    proto = helper.make_model(graph, ir_version=ir_version, opset_imports=imports, functions=list(functions))
    return ir.serde.deserialize_model(proto)


def _find_graph(graph, name):
    if not name or graph.name == name:
        return graph
    bodies = (a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    return next(found for body in bodies if (found := _find_graph(body, name)) is not None)


def linear_model(K=64, N=24, *, dtype="float32", op="MatMul", seed=0, bias=False, rows="B", **options):
    """x [B, K] times a weight [K, N], or [N, K] for op="Gemm" with transB, plus a bias [N] if one is wanted."""
    kind = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}[dtype]
    head = f"g ({kind}[{rows},{K}] x) => ({kind}[{rows},{N}] y)"
    weights = {"w": normal((K, N), seed, dtype)}
    if bias:
        weights["b"] = normal(N, seed + 1, dtype)
    if op == "Gemm":
        weights["w"] = np.ascontiguousarray(weights["w"].T)
        body = f"[fc] y = Gemm <transB = 1> (x, w{', b' if bias else ''})"
    elif bias:
        body = "[fc] h = MatMul(x, w) [add] y = Add(h, b)"
    else:
        body = "[fc] y = MatMul(x, w)"
    return parse(f"{head} {{ {body} }}", weights, **options)


def serialized(model):
    return ir.serde.serialize_model(model).SerializeToString()


def run(model, feeds, *, outputs=None, optimize=False):
    """Outputs of ONNX Runtime on the CPU, graph optimizations off unless asked for."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else serialized(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(outputs, feeds)


def text_of(graph):
    """The nodes of a graph, one a line, without their attributes: ``y = MatMul(x, w)``."""
    graph = graph.graph if isinstance(graph, ir.Model) else graph

    def names(values):
        return ", ".join("" if value is None else value.name for value in values)

    return [f"{names(node.outputs)} = {node.op_type}({names(node.inputs)})" for node in graph]


def value_names(model):
    """Names of all values of all graphs, each as often as it is defined."""
    found = []
    for graph in model.graphs():
        found += {value.name for value in (*graph.inputs, *graph.initializers.values())}
        found += [output.name for node in graph for output in node.outputs if output.name]
    return found


def context(config=None, batches=None, threads=1, **options):
    """A PassContext; `options` are fields of CompileConfig, `scheme` sets its plan's default."""
    if config is None:
        if "scheme" in options:
            options["plan"] = SchemePlan(Scheme.parse(options.pop("scheme")))
        config = CompileConfig(**options)
    data = SimpleNamespace(batches=batches) if batches is not None else None
    return PassContext(config, threads, data)


def apply(name, model, ctx=None, /, **options):
    """Run a pass by name, check that the model is legal after it, and return its result."""
    step = passes.load(name)(ctx or context(), {key: str(value) for key, value in options.items()})
    result = step(model)
    check_legal(model, step.stage, step.name)
    assert result.model is model
    names = value_names(model)
    assert len(names) == len(set(names)), "a value name is used twice"
    return result


def quantized(model, ctx=None, algorithm="rtn", **options):
    """The model with every site that the plan wants quantized, not yet lowered."""
    ctx = ctx or context()
    apply("canonicalize", model, ctx)
    apply("assign_scheme", model, ctx)
    apply(algorithm, model, ctx, **options)
    return model


def site_named(model, name):
    """The site called `name`."""
    (site,) = (site for site in find_sites(model)[0] if site.name == name)
    return site


def the_site(model) -> Site:
    """The only site."""
    (site,) = find_sites(model)[0]
    return site


def only(result, action):
    """Site names of the records with an action."""
    return [record.site for record in result.records if record.action == action]


@dataclass(frozen=True)
class Ticks:
    """Collects progress reports."""

    seen: list = field(default_factory=list)

    def __call__(self, label, done, total):
        self.seen.append((label, done, total))
