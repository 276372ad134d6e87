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
from qcompiler.graph import SCHEME_KEY, Site
from qcompiler.legality import check_legal
from qcompiler.passes.base import PassContext
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.sites import find_sites


def normal(shape, seed, dtype="float32", scale=1.0):
    """Standard normal values of a seed."""
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def parse(text, weights=None, *, opset=21, ir_version=10, functions=()):
    """A model from the text of its graph, for example ``g (float[B,8] x) => (float[B,4] y) { [fc] y = MatMul(x, w) }``.

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


def _layer(i):
    """Text of a decoder layer that reads and writes the residual stream: attention, then a gated MLP."""
    return f"""
        n{i} = LayerNormalization <axis = -1> (h{i}, gain, shift)
        [l{i}_q] q{i} = MatMul(n{i}, wq{i})
        [l{i}_k] k{i} = MatMul(n{i}, wk{i})
        [l{i}_v] v{i} = MatMul(n{i}, wv{i})
        kt{i} = Transpose <perm = [0, 2, 1]> (k{i})
        scores{i} = MatMul(q{i}, kt{i})
        scaled{i} = Mul(scores{i}, root)
        masked{i} = Add(scaled{i}, hidden)
        p{i} = Softmax <axis = -1> (masked{i})
        a{i} = MatMul(p{i}, v{i})
        [l{i}_o] o{i} = MatMul(a{i}, wo{i})
        m{i} = Add(h{i}, o{i})
        nm{i} = LayerNormalization <axis = -1> (m{i}, gain, shift)
        [l{i}_gate] g{i} = MatMul(nm{i}, wg{i})
        [l{i}_up] u{i} = MatMul(nm{i}, wu{i})
        s{i} = Sigmoid(g{i})
        gs{i} = Mul(g{i}, s{i})
        t{i} = Mul(gs{i}, u{i})
        [l{i}_down] d{i} = MatMul(t{i}, wd{i})
        h{i + 1} = Add(m{i}, d{i})"""


def loud_model(scheme, loud=40.0, dtype="float32"):
    """A normalization of x [B, S, 32] with three loud channels, and two linear layers with a scheme behind it."""
    kind = {"float32": "float", "float16": "float16"}[dtype]
    gamma = 1 + normal(32, 1, scale=0.1)
    gamma[[3, 11, 30]] *= loud
    text = f"""g ({kind}[B,S,32] x) => ({kind}[B,S,24] y, {kind}[B,S,9] z) {{
        [norm] n = LayerNormalization(x, gamma, beta) [a] y = MatMul(n, wa) [b] z = MatMul(n, wb) }}"""
    weights = {"gamma": gamma, "beta": 0.1 * gamma * normal(32, 2), "wa": normal((32, 24), 3), "wb": normal((32, 9), 4)}
    return assigned(parse(text, {name: array.astype(dtype) for name, array in weights.items()}), scheme)


def loud_batches(count=4, seed=0):
    """Feeds for `loud_model`."""
    return [{"x": normal((2, 9, 32), seed + i)} for i in range(count)]


# Sites of `decoder` in the groups in which they can be quantized.
def decoder_groups(layers=2):
    groups = []
    for i in range(layers):
        for names in ("q k v", "o", "gate up", "down"):
            groups.append([f"l{i}_{name}" for name in names.split()])
    return [*groups, ["head"]]


def decoder(layers=2, hidden=32, inner=48, vocabulary=512, seed=0):
    """A decoder on token ids [B, S] with an attention mask [B, S]; 512 x 32 is the smallest table that is a site."""
    text = f"""g (int64[B,S] input_ids, int64[B,S] attention_mask) => (float[B,S,{vocabulary}] logits) {{
        [embed] h0 = Gather(table, input_ids)
        seen = Cast <to = 1> (attention_mask)
        seen1 = Unsqueeze(seen, axis1)
        unseen = Sub(seen1, one)
        hidden = Mul(unseen, large)
        {"".join(_layer(i) for i in range(layers))}
        [head] logits = MatMul(h{layers}, wh)
    }}"""
    weights = {
        "table": normal((vocabulary, hidden), seed),
        "wh": normal((hidden, vocabulary), seed + 1, scale=hidden**-0.5),
        "axis1": np.array([1], np.int64),
        "one": np.array(1, np.float32),
        "large": np.array(1e4, np.float32),
        "root": np.array(hidden**-0.5, np.float32),
        "gain": 1 + normal(hidden, seed + 2, scale=0.3),
        "shift": normal(hidden, seed + 3, scale=0.1),
    }
    for i in range(layers):
        for j, name in enumerate(("wq", "wk", "wv", "wo", "wg", "wu")):
            shape = (hidden, inner if name in ("wg", "wu") else hidden)
            weights[f"{name}{i}"] = normal(shape, seed + 10 * i + j + 4, scale=hidden**-0.5)
        weights[f"wd{i}"] = normal((inner, hidden), seed + 10 * i + 14, scale=inner**-0.5)
    return parse(text, weights)


def token_batches(count=3, rows=2, length=7, vocabulary=512, seed=0, padded=True):
    """Feeds for `decoder`; each row ends in padding, up to three tokens of it."""
    generator = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        mask = np.ones((rows, length), np.int64)
        if padded:
            for row, pad in enumerate(generator.integers(0, 4, rows)):
                mask[row, length - pad :] = 0
        batches.append({"input_ids": generator.integers(0, vocabulary, (rows, length)), "attention_mask": mask})
    return batches


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


def with_outputs(model, names):
    """Bytes of the model with more outputs, whose types ONNX Runtime finds out."""
    proto = ir.serde.serialize_model(model)
    present = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return proto.SerializeToString()


def values_of(model, name, batches):
    """The rows of a value over all batches, float64 [T, K]; channels run along its last axis."""
    found = [run(with_outputs(model, [name]), feeds, outputs=[name])[0] for feeds in batches]
    return np.concatenate([array.reshape(-1, array.shape[-1]) for array in found]).astype(np.float64)


def correlated(columns, seed=0, loud=5.0, tokens=300):
    """The sum of x x^T, float64 [K, K], of tokens that vary in 12 directions above all, with a few loud channels."""
    x = normal((tokens, 12), seed + 100, "float64") @ normal((12, columns), seed, "float64")
    x += 0.3 * normal((tokens, columns), seed + 200, "float64")
    x[:, ::11] *= loud
    return x.T @ x


def context(config=None, batches=None, threads=1, progress_to=None, **options):
    """A PassContext; `options` are fields of CompileConfig, `scheme` sets its plan's default."""
    if config is None:
        if "scheme" in options:
            options["plan"] = SchemePlan(Scheme.parse(options.pop("scheme")))
        config = CompileConfig(**options)
    data = SimpleNamespace(batches=batches, held_out=batches) if batches is not None else None
    return PassContext(config, threads, data, progress_to)


def assigned(model, scheme, names=None):
    """The model with a scheme on its linear and convolution sites, or those named, as `assign_scheme` writes it."""
    for site in find_sites(model)[0]:
        if site.role in ("linear", "conv") and (names is None or site.name in names):
            site.node.metadata_props[SCHEME_KEY] = str(Scheme.parse(scheme).resolve("cpu"))
    return model


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
