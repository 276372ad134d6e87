import io
import json
import os
import resource
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import ModelError
from qcompiler.files import inline_weights
from qcompiler.files.loader import load_model, resolve_model_path, source_of
from tests.stored_models import (
    branches,
    external,
    externalize,
    linear,
    make_model,
    open_files,
    run,
    tensors,
    value,
    weight,
    write,
)


def arrays(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def assert_same_weights(model, proto):
    expected = arrays(proto)
    found = tensors(model)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if array.dtype == object:  # strings, which onnx_ir gives as bytes
            array = np.array([text.encode() for text in array])
        np.testing.assert_array_equal(found[name], array)


def loop_model():
    """Adds w [8] to x three times in a Loop."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["v", "w"], ["v_next"])],
        "body",
        [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("v")],
        [value("go_on", [], TensorProto.BOOL), value("v_next")],
    )
    node = helper.make_node("Loop", ["n", "", "x"], ["y"], name="loop", body=body)
    return make_model([node], [value("x"), value("n", [], TensorProto.INT64)], [value("y")], [weight("w", (8,))])


def scan_model():
    """Running sum over the rows of x [2, 8]."""
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "row"], ["s_next"]), helper.make_node("Identity", ["s_next"], ["sum"])],
        "body",
        [value("s", (8,)), value("row", (8,))],
        [value("s_next", (8,)), value("sum", (8,))],
    )
    node = helper.make_node("Scan", ["w", "x"], ["last", "y"], name="scan", body=body, num_scan_inputs=1)
    return make_model([node], [value("x")], [value("y")], [weight("w", (8,))])


# What is read, and how.


def test_reads_a_file_with_weights_inside(tmp_path):
    proto = linear()
    model = load_model(write(proto, tmp_path / "m.onnx"))
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]
    assert_same_weights(model, proto)
    assert source_of(model).path == tmp_path / "m.onnx"
    assert source_of(model).data_files == ()


def test_large_inline_weights_stay_in_the_file(tmp_path):
    proto = linear(512, 256)
    model = load_model(str(write(proto, tmp_path / "m.onnx")))
    kept = model.graph.initializers["w"].const_value
    assert isinstance(kept, ir.ExternalTensor)
    assert (kept.location, kept.length) == ("m.onnx", 512 * 256 * 4)
    assert not isinstance(model.graph.initializers["b"].const_value, ir.ExternalTensor)
    assert_same_weights(model, proto)
    assert source_of(model).data_files == ()


@pytest.mark.parametrize("smallest", [1, 64, 100])
def test_detaching_weights_changes_nothing_else(tmp_path, monkeypatch, smallest):
    """A parse of the whole file is the oracle."""
    monkeypatch.setattr(inline_weights, "DETACH_BYTES", smallest)
    proto = linear()
    rng = np.random.default_rng(0)
    for dtype in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT16):
        typed = helper.make_tensor(f"typed{dtype}", dtype, [5, 9], rng.integers(0, 50, 45).tolist())
        proto.graph.initializer.append(typed)
    proto.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [2], ["a" * 300, "b"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((0, 3), np.float32), "none"))
    proto.graph.initializer[0].doc_string = "kept"
    proto.doc_string, proto.producer_name = "also kept" * 40, "test"
    model = load_model(write(proto, tmp_path / "m.onnx"))
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert model.graph.initializers["w"].const_value.doc_string == "kept"
    assert (model.doc_string, model.producer_name) == (proto.doc_string, "test")
    assert_same_weights(model, proto)


def test_inline_weights_take_no_memory(tmp_path):
    """50 MB of weights in one file: loading it allocates next to nothing."""
    path = tmp_path / "m.onnx"
    code = """
import sys
from tests.stored_models import AnonymousPeak
from qcompiler.files.loader import load_model
load_model(sys.argv[2])
with AnonymousPeak() as peak:
    model = load_model(sys.argv[1])
print(peak.growth)
"""
    write(linear(3200, 4096), path)
    small = write(linear(), tmp_path / "small.onnx")
    result = subprocess.run([sys.executable, "-c", code, path, small], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 8e6


def test_external_data_is_mapped(tmp_path):
    proto = linear()
    path = externalize(proto, tmp_path / "m.onnx")
    model = load_model(path)
    kept = model.graph.initializers["w"].const_value
    assert isinstance(kept, ir.ExternalTensor)
    assert (str(kept.location), kept.base_dir) == ("weights.data", str(tmp_path))
    assert_same_weights(model, proto)
    assert source_of(model).data_files == (tmp_path / "weights.data",)
    assert source_of(model).files == (path, tmp_path / "weights.data")


def test_external_data_beyond_two_gigabytes(tmp_path):
    offset = 3 << 30
    array = np.arange(32, dtype=np.float32)
    with open(tmp_path / "big.data", "wb") as file:
        file.seek(offset)
        file.write(array.tobytes())
    proto = linear()
    proto.graph.initializer[0].CopyFrom(external("w", [8, 4], "big.data", offset, 128))
    proto.graph.initializer.append(external("unused", [3 << 20, 256], "big.data", 0))
    model = load_model(write(proto, tmp_path / "m.onnx"))
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), array.reshape(8, 4))
    assert model.graph.initializers["unused"].const_value.nbytes == offset
    assert model.graph.initializers["unused"].const_value.length == offset


def test_data_in_a_folder_below(tmp_path):
    (tmp_path / "sub").mkdir()
    proto = linear()
    model = load_model(externalize(proto, tmp_path / "m.onnx", "sub/weights.data"))
    assert_same_weights(model, proto)


def test_download_cache_of_links(tmp_path):
    """As a model hub stores them: both the model and its data are links into one folder of blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    proto = linear()
    externalize(proto, tmp_path / "blobs" / "1234")
    (tmp_path / "snapshot" / "m.onnx").symlink_to("../blobs/1234")
    (tmp_path / "snapshot" / "weights.data").symlink_to("../blobs/weights.data")
    model = load_model(tmp_path / "snapshot" / "m.onnx")
    assert_same_weights(model, proto)
    run(tmp_path / "snapshot" / "m.onnx")  # the runtime follows them too


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_linked_data_in_the_folder(tmp_path, link):
    proto = linear()
    path = externalize(proto, tmp_path / "m.onnx")
    (tmp_path / "weights.data").rename(tmp_path / "other.data")
    link(tmp_path / "other.data", tmp_path / "weights.data")
    assert_same_weights(load_model(path), proto)


def test_relative_paths(tmp_path, monkeypatch):
    proto = linear(512, 256)
    externalize(proto, tmp_path / "m.onnx")
    write(proto, tmp_path / "inline.onnx")
    monkeypatch.chdir(tmp_path)
    assert_same_weights(load_model("m.onnx"), proto)
    assert_same_weights(load_model("inline.onnx"), proto)


def test_messages_from_memory(tmp_path):
    proto = linear()
    before = proto.SerializeToString()
    assert_same_weights(load_model(proto), proto)
    assert source_of(load_model(proto)).files == ()
    kept = onnx.load(externalize(proto, tmp_path / "m.onnx"), load_external_data=False)
    kept_before = kept.SerializeToString()
    assert_same_weights(load_model(kept, base_dir=tmp_path), proto)
    assert source_of(load_model(kept, base_dir=tmp_path)).files == (tmp_path / "weights.data",)
    assert proto.SerializeToString() == before
    assert kept.SerializeToString() == kept_before
    with pytest.raises(ModelError, match="base_dir"):
        load_model(kept)


def test_no_file_stays_open(tmp_path):
    path = externalize(linear(512, 256), tmp_path / "m.onnx")
    before = open_files()
    models = [load_model(path) for _ in range(5)]
    with pytest.raises(ModelError):
        load_model(tmp_path / "none.onnx")
    assert len(models) == 5
    assert open_files() == before


def test_reading_weights_keeps_no_file_open(tmp_path):
    """More weights than a process may have files open."""
    proto = linear()
    for number in range(300):
        proto.graph.initializer.append(weight(f"extra{number}", (8, 4)))
    path = externalize(proto, tmp_path / "m.onnx")
    model = load_model(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 20, hard))
    try:
        total = sum(float(v.const_value.numpy().sum()) for v in model.graph.initializers.values())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.isfinite(total)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.UINT4, TensorProto.INT4])
@pytest.mark.parametrize("offset", [0, 1, 64])
def test_every_way_to_read_a_mapped_weight(tmp_path, dtype, offset):
    """A tensor inside the message is the oracle; offsets need no alignment."""
    numbers = np.random.default_rng(0).integers(0, 8, 15)
    inside = ir.serde.deserialize_tensor(helper.make_tensor("w", dtype, [3, 5], numbers.tolist()))
    (tmp_path / "w.data").write_bytes(b"\xff" * offset + inside.tobytes())
    proto = linear()
    proto.graph.initializer[0].CopyFrom(external("w", [3, 5], "w.data", offset, dtype=dtype))
    mapped = load_model(proto, base_dir=tmp_path).graph.initializers["w"].const_value
    assert isinstance(mapped, ir.ExternalTensor)
    np.testing.assert_array_equal(mapped.numpy(), inside.numpy())
    np.testing.assert_array_equal(np.asarray(mapped), inside.numpy())
    np.testing.assert_array_equal(np.array(mapped, dtype=np.float32), inside.numpy().astype(np.float32))
    assert mapped.tobytes() == inside.tobytes()
    buffer = io.BytesIO()
    mapped.tofile(buffer)
    assert buffer.getvalue() == inside.tobytes()


# Forms that are odd but fine.


@pytest.mark.parametrize("opsets", [(("", 20), ("ai.onnx", 21)), (("", 21), ("", 13)), (("ai.onnx", 21),)])
def test_one_import_an_operator_set(tmp_path, opsets):
    proto = linear(opsets=opsets)
    proto.graph.node[0].domain = "ai.onnx"
    model = load_model(write(proto, tmp_path / "m.onnx"))
    assert dict(model.opset_imports) == {"": 21}
    assert {node.domain for node in model.graph} == {""}


def test_implied_import_is_spelled_out(tmp_path):
    node = helper.make_node("FusedGemm", ["x", "w"], ["y"], domain="com.microsoft")
    model = load_model(make_model([node], [value("x")], [value("y", (2, 4))], [weight()]))
    assert dict(model.opset_imports) == {"": 21, "com.microsoft": 1}


def test_nodes_out_of_order_are_sorted(tmp_path):
    proto = linear()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    model = load_model(write(proto, tmp_path / "m.onnx"))
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]


def test_a_body_that_reads_a_later_value_is_sorted():
    proto = branches()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert [node.op_type for node in load_model(proto).graph] == ["Relu", "If"]


def test_sorted_nodes_keep_their_order():
    nodes = [helper.make_node("Relu", ["x"], [f"v{i}"]) for i in range(5)]
    model = load_model(make_model(nodes, [value("x")], [value(f"v{i}") for i in range(5)]))
    assert [node.outputs[0].name for node in model.graph] == [f"v{i}" for i in range(5)]


def test_odd_names(tmp_path):
    odd = ["/model/layers.0/x y", "größe/重み", "a:b;c\\d", "'quoted'", "tab\tin it"]
    nodes = [helper.make_node("Add", [a, b], [c], name=c) for a, b, c in zip(odd, odd[1:], odd[2:], strict=False)][:1]
    proto = make_model(nodes, [value(odd[0])], [value(odd[2])], [weight(odd[1], (8,))])
    model = load_model(write(proto, tmp_path / "odd näme.onnx"))
    assert model.graph[0].outputs[0].name == odd[2]
    assert_same_weights(model, proto)


def test_missing_optional_inputs_and_outputs():
    nodes = [
        helper.make_node("Clip", ["x", "", "top"], ["c"]),
        helper.make_node("Dropout", ["c"], ["y", ""]),
    ]
    model = load_model(make_model(nodes, [value("x")], [value("y")], [weight("top", ())]))
    assert model.graph[0].inputs[1] is None


@pytest.mark.parametrize("make", [branches, loop_model, scan_model])
def test_bodies(tmp_path, make):
    path = write(make(), tmp_path / "m.onnx")
    model = load_model(path)
    assert "w" in tensors(model)
    before, after = run(path), run(ir.serde.serialize_model(model))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sibling_bodies_may_use_the_same_names():
    proto = branches()
    node = proto.graph.node[1]
    for attribute in node.attribute:
        text = attribute.g
        text.node[0].output[0] = text.output[0].name = "same"
    assert len(load_model(proto).graph) == 2


def test_initializers_that_are_inputs(tmp_path):
    proto = linear(ir_version=3, opsets=(("", 7),))
    for tensor in proto.graph.initializer:
        proto.graph.input.append(value(tensor.name, tensor.dims))
    model = load_model(write(proto, tmp_path / "m.onnx"))
    assert model.ir_version == 3
    assert [v.name for v in model.graph.inputs] == ["x", "w", "b"]
    assert model.graph.inputs[1].is_initializer()
    assert_same_weights(model, proto)


def test_functions_stay():
    body = [helper.make_node("Relu", ["a"], ["b"])]
    function = helper.make_function("local", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    node = helper.make_node("Twice", ["x"], ["y"], domain="local")
    proto = make_model([node], [value("x")], [value("y")], opsets=(("", 21), ("local", 1)), functions=[function])
    assert [key[1] for key in load_model(proto).functions] == ["Twice"]


# Folders.


def test_folder_means_the_decoder_it_names(tmp_path):
    write(linear(), tmp_path / "decoder.onnx")
    write(linear(), tmp_path / "vision.onnx")
    config = {"model": {"decoder": {"filename": "decoder.onnx"}, "vision": {"filename": "vision.onnx"}}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    assert resolve_model_path(tmp_path) == tmp_path / "decoder.onnx"
    assert load_model(tmp_path).graph[0].name == "matmul"


def test_folder_with_one_model(tmp_path):
    write(linear(), tmp_path / "m.onnx")
    assert resolve_model_path(str(tmp_path)) == tmp_path / "m.onnx"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", ["genai_config.json", "is not JSON"]),
        ('{"model": {}}', ["genai_config.json", "model.decoder.filename"]),
        ('{"model": {"decoder": {"filename": "gone.onnx"}}}', ["gone.onnx", "genai_config.json", "check the path"]),
        (None, ["a.onnx, b.onnx", "give the path"]),
    ],
)
def test_folders_that_do_not_say(tmp_path, config, words):
    write(linear(), tmp_path / "a.onnx")
    write(linear(), tmp_path / "b.onnx")
    if config is not None:
        (tmp_path / "genai_config.json").write_text(config)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert all(word in str(caught.value) for word in words)


# What is refused: each message names the file, the thing in it, the figures and a remedy.


def changed(change):
    proto = linear()
    change(proto)
    return proto


def _duplicate_output(proto):
    proto.graph.node[1].output[0] = "h"


def _cycle(proto):
    proto.graph.node[0].input[0] = "y"


def _self_cycle(proto):
    proto.graph.node[0].input[0] = "h"


def _cycle_through_body(proto):
    proto.CopyFrom(branches())
    proto.graph.node[0].input[0] = "y"


def _dangling(proto):
    proto.graph.node[0].input[0] = "nowhere"


def _dangling_in_body(proto):
    proto.CopyFrom(branches())
    proto.graph.node[1].attribute[0].g.node[0].input[0] = "nowhere"


def _dangling_output(proto):
    proto.graph.output[0].name = "nowhere"


def _outer_value_returned(proto):
    proto.CopyFrom(branches())
    proto.graph.node[1].attribute[0].g.output[0].name = "t"


def _shadow(proto):
    proto.CopyFrom(branches())
    body = proto.graph.node[1].attribute[0].g
    body.node[0].output[0] = body.output[0].name = "t"


def _recursion(proto):
    calls = [helper.make_node("B", ["a"], ["b"], domain="local")], [helper.make_node("A", ["a"], ["b"], domain="local")]
    for name, body in zip("AB", calls, strict=True):
        opsets = [helper.make_opsetid("local", 1)]
        proto.functions.append(helper.make_function("local", name, ["a"], ["b"], body, opsets))


def _function_twice(proto):
    body = [helper.make_node("Relu", ["a"], ["b"])]
    for _ in range(2):
        proto.functions.append(helper.make_function("local", "F", ["a"], ["b"], body, [helper.make_opsetid("", 21)]))


def _function_dangling(proto):
    body = [helper.make_node("Relu", ["nowhere"], ["b"], name="lost")]
    proto.functions.append(helper.make_function("local", "F", ["a"], ["b"], body, [helper.make_opsetid("", 21)]))


def _sparse(proto):
    sparse = proto.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(weight("s", (1,)))


def _map_output(proto):
    proto.graph.output[0].type.map_type.key_type = TensorProto.INT64


def _not_text(proto):
    broken = proto.SerializeToString().replace(b"matmul", b"mat\xfful")
    proto.ParseFromString(broken)


def _short_attribute(proto):
    node = helper.make_node("Constant", [], ["c"], name="const", value=weight("t", (3,)))
    node.attribute[0].t.raw_data = b"1234"
    proto.graph.node.insert(0, node)


def _field(path, setting):
    def change(proto):
        target = proto
        for step in path[:-1]:
            target = target[step] if isinstance(step, int) else getattr(target, step)
        setattr(target, path[-1], setting)

    return change


def _dims(*dims):
    def change(proto):
        del proto.graph.initializer[0].dims[:]
        proto.graph.initializer[0].dims.extend(dims)

    return change


def _typed(proto):
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].float_data.extend([0.0] * 31)


REFUSED = {
    "no graph": (lambda p: p.ClearField("graph"), ["no graph", "export"]),
    "no ir version": (lambda p: p.ClearField("ir_version"), ["no IR version", "export"]),
    "ir version too new": (_field(["ir_version"], 14), ["IR version 14", "up to 13", "ir_version = 13"]),
    "no opset": (lambda p: p.ClearField("opset_import"), ["no operator set", "export it again"]),
    "opset too new": (_field(["opset_import", 0, "version"], 27), ["opset 27", "up to 26", "version_converter"]),
    "opset zero": (_field(["opset_import", 0, "version"], 0), ["opset 0", "export it again"]),
    "no outputs": (lambda p: p.graph.ClearField("output"), ["no outputs", "export it again"]),
    "duplicate output": (_duplicate_output, ["node 'add' (Add)", "'h'", "defined already", "rename"]),
    "duplicate input": (lambda p: p.graph.input.append(value("x")), ["two inputs named 'x'", "rename"]),
    "duplicate weight": (lambda p: p.graph.initializer.append(weight("w")), ["two initializers named 'w'", "again"]),
    "nameless weight": (_field(["graph", "initializer", 0, "name"], ""), ["without a name", "export"]),
    "weight that is computed": (lambda p: p.graph.initializer.append(weight("h")), ["node 'matmul'", "'h'", "rename"]),
    "duplicate node": (_field(["graph", "node", 1, "name"], "matmul"), ["two nodes named 'matmul'", "rename"]),
    "no operator": (_field(["graph", "node", 0, "op_type"], ""), ["node 'matmul'", "no operator", "export"]),
    "cycle": (_cycle, ["cycle", "'matmul' (MatMul) -> node 'add' (Add)", "export"]),
    "self cycle": (_self_cycle, ["cycle", "'matmul'", "export"]),
    "cycle through a body": (_cycle_through_body, ["cycle", "'relu'", "'if'", "export"]),
    "dangling": (_dangling, ["node 'matmul' (MatMul)", "'nowhere'", "export"]),
    "dangling in a body": (_dangling_in_body, ["'nowhere'", "nothing computes", "export"]),
    "dangling output": (_dangling_output, ["returns 'nowhere'", "export"]),
    "outer value returned": (_outer_value_returned, ["returns 't'", "Identity"]),
    "shadow": (_shadow, ["'t'", "defined already", "rename"]),
    "recursion": (_recursion, ["'A' -> 'B' -> 'A'", "recursion", "Loop"]),
    "function twice": (_function_twice, ["function 'F'", "twice", "export"]),
    "function dangling": (_function_dangling, ["node 'lost'", "'nowhere'", "export"]),
    "not text": (_not_text, ["not UTF-8", "export"]),
    "attribute without a type": (
        lambda p: p.graph.node[0].attribute.add(name="odd"),
        ["attribute 'odd' of node 'matmul'", "no type", "export"],
    ),
    "line break in a name": (_field(["graph", "output", 0, "name"], "a\n\x1b[31mb"), ["'a\\n\\x1b[31mb'", "export"]),
    "sparse": (_sparse, ["'s'", "sparse", "store it"]),
    "map": (_map_output, ["'y' is a map", "ZipMap", "without"]),
    "negative dimension": (_dims(-8, 4), ["tensor 'w'", "[-8, 4]", "export"]),
    "raw data too short": (_dims(8, 5), ["tensor 'w'", "128 bytes", "[8, 5]", "needs 160", "again"]),
    "raw data too long": (_dims(8, 3), ["tensor 'w'", "128 bytes", "needs 96", "again"]),
    "typed data too short": (_typed, ["tensor 'w'", "31 entries", "needs 32", "again"]),
    "no data": (lambda p: p.graph.initializer[0].ClearField("raw_data"), ["0 bytes", "needs 128", "again"]),
    "unknown dtype": (_field(["graph", "initializer", 0, "data_type"], 99), ["'w'", "data type 99", "export"]),
    "undefined dtype": (_field(["graph", "initializer", 0, "data_type"], 0), ["'w'", "data type 0", "export"]),
    "short attribute": (_short_attribute, ["attribute 'value' of node 'const'", "4 bytes", "needs 12", "again"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path, case):
    change, words = REFUSED[case]
    path = write(changed(change), tmp_path / "bad.onnx")
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_a_long_cycle_is_shortened():
    nodes = [helper.make_node("Relu", [f"v{(i + 1) % 50}"], [f"v{i}"], name=f"n{i}") for i in range(50)]
    with pytest.raises(ModelError, match=r"cycle: .* -> 46 more -> ") as caught:
        load_model(make_model(nodes, [value("x")], [value("v0")]))
    assert len(str(caught.value)) < 400


def _external_case(tmp_path, tensor, data=b"\0" * 128):
    proto = linear()
    proto.graph.initializer[0].CopyFrom(tensor)
    if data is not None:
        (tmp_path / "w.data").write_bytes(data)
    return write(proto, tmp_path / "bad.onnx")


EXTERNAL = {
    "missing": (("gone.data", 0, 128), ["'w'", "'gone.data'", "missing", "put the data file"]),
    "short": (("w.data", 64, 128), ["tensor 'w'", "64 to 192", "'w.data'", "ends at 128", "again"]),
    "short without a length": (("w.data", 4, None), ["4 to 132", "ends at 128", "again"]),
    "length of another shape": (("w.data", 0, 64), ["tensor 'w'", "64 bytes", "needs 128", "again"]),
    "offset no number": (("w.data", "two", 128), ["tensor 'w'", "no number", "again"]),
    "offset negative": (("w.data", -4, 128), ["tensor 'w'", "no number", "again"]),
    "no location": (("", 0, 128), ["'w'", "names no file", "again"]),
    "above": (("../w.data", 0, 128), ["'w'", "'../w.data'", "outside the model's folder", "move"]),
    "above in a roundabout way": (("sub/../../w.data", 0, 128), ["outside the model's folder", "move"]),
    "absolute": (("/etc/passwd", 0, 128), ["'w'", "absolute path", "save the model again"]),
    "absolute on Windows": (("C:\\w.data", 0, 128), ["'w'", "absolute path", "save the model again"]),
    "a folder": ((".", 0, 128), ["'w'", "not a file", "put the data file"]),
}


@pytest.mark.parametrize("case", EXTERNAL)
def test_refuses_external_data(tmp_path, case):
    (location, offset, length), words = EXTERNAL[case]
    path = _external_case(tmp_path, external("w", [8, 4], location, offset, length))
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_refuses_a_link_out_of_the_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 128)
    (tmp_path / "model" / "link.data").symlink_to(tmp_path / "secret")
    path = _external_case(tmp_path / "model", external("w", [8, 4], "link.data", 0, 128))
    with pytest.raises(ModelError, match=r"link that leaves the model's folder.*put a copy"):
        load_model(path)


def test_refuses_a_pointer_for_data(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 128\n"
    path = _external_case(tmp_path, external("w", [8, 4], "w.data", 0, 128), pointer)
    with pytest.raises(ModelError, match="git lfs pull"):
        load_model(path)


NO_MODELS = {
    "empty": (b"", ["is empty (0 bytes)", "again"]),
    "text": (b"this is no model\n" * 5, ["is text", "give an .onnx file"]),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", ["git-lfs", "git lfs pull"]),
    "zip": (b"PK\x03\x04" + b"\0" * 600, ["zip archive", "export it"]),
    "ort format": (b"\x1c\0\0\0ORTM" + b"\0" * 600, ["ORT format", "give the .onnx file"]),
    "zeros": (b"\0" * 1000, ["not an ONNX model", "byte 0", "again"]),
    "noise": (np.random.default_rng(0).bytes(5000), ["not an ONNX model", "again"]),
    "endless number": (b"\xff" * 1000, ["not an ONNX model", "again"]),
    "another message": (b"\x0a\x03abc", ["no graph", "again"]),
}


@pytest.mark.parametrize("case", NO_MODELS)
def test_refuses_what_is_no_model(tmp_path, case):
    content, words = NO_MODELS[case]
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("smallest", [1, 1 << 16])
def test_refuses_every_truncation(tmp_path, monkeypatch, smallest):
    """Cut anywhere, a file is either refused, or still says all that matters."""
    monkeypatch.setattr(inline_weights, "DETACH_BYTES", smallest)
    whole = linear().SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError) as caught:
            load_model(path)
        assert "again" in str(caught.value)


@pytest.mark.parametrize("make", [linear, branches, loop_model])
def test_damage_never_surprises(tmp_path, monkeypatch, make):
    """Whatever bytes change, the model is loaded or refused in one printable line."""
    monkeypatch.setattr(inline_weights, "DETACH_BYTES", 64)
    whole = make().SerializeToString()
    path = tmp_path / "damaged.onnx"
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(400):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole) - 4, 2):
            content[place : place + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3)))
        path.write_bytes(content)
        try:
            load_model(path)
        except ModelError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(message.isprintable() for message in refused)


def test_truncated_file_gives_its_figures(tmp_path):
    whole = linear(512, 256).SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=rf"cut short.*the file at {len(whole) // 2}; download or export it again"):
        load_model(path)


def test_refuses_what_is_not_there_or_no_file(tmp_path):
    with pytest.raises(ModelError, match=r"none\.onnx: the model does not exist; check the path"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="neither a file nor a folder"):
        load_model("/dev/null")
    with pytest.raises(ModelError, match=r"x" * 300):
        load_model(tmp_path / ("x" * 300))
