"""Small models as files, for the tests of loading and saving."""

import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qcompiler.files.loader import load_model


def value(name, shape=(2, 8), dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def make_model(nodes, inputs, outputs, initializers=(), *, opsets=(("", 21),), ir_version=10, functions=()):
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(initializers))
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets]
    return helper.make_model(graph, ir_version=ir_version, opset_imports=imports, functions=list(functions))


def weight(name="w", shape=(8, 4), seed=0, dtype="float32"):
    array = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return numpy_helper.from_array(array, name)


def linear(rows=8, columns=4, **options):
    """x [2, rows] @ w [rows, columns] + b [columns] = y."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="matmul"),
        helper.make_node("Add", ["h", "b"], ["y"], name="add"),
    ]
    initializers = [weight("w", (rows, columns)), weight("b", (columns,), seed=1)]
    return make_model(nodes, [value("x", (2, rows))], [value("y", (2, columns))], initializers, **options)


def branches(initializer=None):
    """An If whose branches read a value of the graph around them; `initializer` is a weight w [8] of the first."""
    nodes = [helper.make_node("Add" if initializer is not None else "Sub", ["t", "w"], ["a"], name="inner")]
    first = helper.make_graph(
        nodes, "first", [], [value("a")], [weight("w", (8,)) if initializer is None else initializer]
    )
    second = helper.make_graph([helper.make_node("Neg", ["t"], ["b"])], "second", [], [value("b")])
    nodes = [
        helper.make_node("Relu", ["x"], ["t"], name="relu"),
        helper.make_node("If", ["flag"], ["y"], name="if", then_branch=first, else_branch=second),
    ]
    return make_model(nodes, [value("x"), value("flag", [], TensorProto.BOOL)], [value("y")])


def external(name, shape, location, offset=0, length=None, dtype=TensorProto.FLOAT):
    """A tensor that says where its bytes are; nothing is written."""
    tensor = TensorProto(name=name, dims=shape, data_type=dtype, data_location=TensorProto.EXTERNAL)
    entries = {"location": location, "offset": offset, "length": length}
    for key, entry in entries.items():
        if entry is not None:
            tensor.external_data.add(key=key, value=str(entry))
    return tensor


def externalize(model, path, location="weights.data"):
    """Write a model whose initializers are in a file of their own; returns the path."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    data = bytearray()
    for tensor in model.graph.initializer:
        raw = numpy_helper.to_array(tensor).tobytes()
        tensor.CopyFrom(external(tensor.name, tensor.dims, location, len(data), len(raw), tensor.data_type))
        data += raw
    path.write_bytes(model.SerializeToString())
    (path.parent / location).write_bytes(data)
    return path


def write(model, path):
    path.write_bytes(model.SerializeToString())
    return path


def run(path, **feeds):
    """What ONNX Runtime computes, graph optimizations off."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(path) if isinstance(path, Path) else path.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    if not feeds:
        rng = np.random.default_rng(7)
        for need in session.get_inputs():
            if need.type == "tensor(bool)":
                feeds[need.name] = np.array(True)
            elif need.type == "tensor(int64)":
                feeds[need.name] = np.full(need.shape, 3, np.int64)
            else:
                feeds[need.name] = rng.standard_normal(need.shape).astype(np.float32)
    return session.run(None, feeds)


def tensors(model):
    """Name -> array of every initializer of an onnx_ir model, bodies included."""
    found = {}
    for graph in model.graphs():
        found.update((name, np.array(v.const_value.numpy())) for name, v in graph.initializers.items())
    return found


def names_in(folder):
    """Every file below a folder, hidden ones included."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))


def initializer_value(name, tensor):
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def failing(monkeypatch, owner, name, error, after=0, times=1000):
    """Let calls of a function fail, `times` times after the first `after` ones."""
    calls = []
    function = getattr(owner, name)

    def call(*args, **options):
        calls.append(args)
        if after < len(calls) <= after + times:
            raise error
        return function(*args, **options)

    monkeypatch.setattr(owner, name, call)


def free_model(initializers, **options):
    """A model that computes nothing of interest and carries these onnx_ir tensors."""
    model = load_model(make_model([helper.make_node("Relu", ["x"], ["y"])], [value("x")], [value("y")], **options))
    for tensor in initializers:
        model.graph.register_initializer(initializer_value(tensor.name, tensor))
    return model


def tensor(array, name, dtype=None):
    return ir.Tensor(array, dtype=dtype, name=name)


def open_files():
    """Number of open descriptors, those aside that only a garbage cycle holds."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


class AnonymousPeak:
    """Highest anonymous resident memory above that at the start, sampled every few milliseconds."""

    def __enter__(self):
        self._start = self._peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.is_set():
            self._peak = max(self._peak, anonymous_bytes())
            time.sleep(0.002)

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, anonymous_bytes())

    @property
    def growth(self):
        return self._peak - self._start
