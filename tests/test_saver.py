import errno
import json
import os
import weakref

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qcompiler.errors import ModelError, OutputError
from qcompiler.files import saver
from qcompiler.files.data_file import tensor_bytes
from qcompiler.files.loader import load_model
from qcompiler.files.saver import (
    OutputTransaction,
    check_destination,
    file_bytes,
    save_folder,
    save_model,
    serialize_model,
)
from qcompiler.files.versions import required_ir_version
from qcompiler.numerics.affine import WeightSpec, min_max_grid, quantize
from qcompiler.quantized import QuantizedTensor
from tests.stored_models import (
    AnonymousPeak,
    branches,
    externalize,
    failing,
    free_model,
    linear,
    make_model,
    names_in,
    run,
    tensor,
    tensors,
    value,
    weight,
    write,
)


def entries(path):
    """Name -> (offset, length) of external tensors, and the names of those inside the file."""
    proto = onnx.load(path, load_external_data=False)
    outside, inside = {}, []
    for item in proto.graph.initializer:
        found = {entry.key: entry.value for entry in item.external_data}
        if found:
            assert found["location"] == path.name + ".data"
            outside[item.name] = (int(found["offset"]), int(found["length"]))
        else:
            inside.append(item.name)
    return outside, inside


# What is written.


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("make", [linear, branches, lambda: linear(512, 256)])
def test_round_trip(tmp_path, make, external):
    source = write(make(), tmp_path / "in.onnx")
    model = load_model(source)
    kept = {name: v.const_value for graph in model.graphs() for name, v in graph.initializers.items()}
    before = tensors(model)
    paths = save_model(model, tmp_path / "out.onnx", force=False, external=external)
    assert paths[0] == tmp_path / "out.onnx"
    assert {v.const_value for graph in model.graphs() for v in graph.initializers.values()} == set(kept.values())
    after = tensors(load_model(paths[0]))
    assert after.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    for a, b in zip(run(source), run(paths[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    onnx.checker.check_model(paths[0], full_check=True)
    assert names_in(tmp_path) == sorted(["in.onnx", *(path.name for path in paths)])


def test_small_models_are_one_file(tmp_path):
    model = load_model(linear(64, 64))
    assert save_model(model, tmp_path / "m.onnx", force=False) == [tmp_path / "m.onnx"]


def test_large_models_are_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "EXTERNAL_BYTES", 1 << 14)
    model = load_model(linear(64, 64))
    assert len(save_model(model, tmp_path / "a.onnx", force=False)) == 2 - (64 * 65 * 4 <= 1 << 14)
    assert save_model(model, tmp_path / "b.onnx", force=False, external=False) == [tmp_path / "b.onnx"]


def test_a_model_that_came_with_a_data_file_gets_one(tmp_path):
    path = externalize(linear(64, 64), tmp_path / "in.onnx")
    paths = save_model(load_model(path), tmp_path / "out.onnx", force=False)
    assert paths == [tmp_path / "out.onnx", tmp_path / "out.onnx.data"]
    assert file_bytes(paths) == paths[0].stat().st_size + paths[1].stat().st_size


def test_weights_of_a_large_file_become_part_of_a_small_one(tmp_path):
    """Weights left in the input file are no reason for a data file."""
    path = write(linear(512, 256), tmp_path / "in.onnx")
    assert len(save_model(load_model(path), tmp_path / "out.onnx", force=False)) == 1
    path.unlink()
    run(tmp_path / "out.onnx")


def test_more_than_a_message_holds_goes_outside(tmp_path, monkeypatch):
    model = load_model(linear(64, 64))
    monkeypatch.setattr(saver, "_MESSAGE_BYTES", 10000)
    with pytest.raises(OutputError, match=r"do not fit into one file; allow external data"):
        save_model(model, tmp_path / "m.onnx", force=False, external=False)
    assert names_in(tmp_path) == []


def test_small_tensors_stay_inside(tmp_path):
    sizes = {"a": 1024, "b": 1025, "c": 0, "d": 5000}
    model = free_model([tensor(np.full(size, 1, np.uint8), name) for name, size in sizes.items()])
    save_model(model, tmp_path / "m.onnx", force=False, external=True)
    outside, inside = entries(tmp_path / "m.onnx")
    assert {name: length for name, (_, length) in outside.items()} == {"b": 1025, "d": 5000}
    assert inside == ["a", "c"]


def test_no_data_file_without_a_tensor_for_it(tmp_path):
    assert save_model(load_model(linear()), tmp_path / "m.onnx", force=False, external=True) == [tmp_path / "m.onnx"]


def test_offsets_are_aligned(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [70001, 1500, (1 << 20) + 7, 3000, 65536, (1 << 20) - 1, 1 << 20, 1027]
    model = free_model([tensor(rng.integers(0, 255, size, np.uint8), f"t{i}") for i, size in enumerate(sizes)])
    save_model(model, tmp_path / "m.onnx", force=False, external=True)
    outside, _ = entries(tmp_path / "m.onnx")
    assert len(outside) == len(sizes)
    for offset, length in outside.values():
        assert offset % (4096 if length >= 1 << 20 else 64) == 0
    after = tensors(load_model(tmp_path / "m.onnx"))
    for name, array in tensors(model).items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize("hidden", [256, 576, 960])
def test_alignment_costs_next_to_nothing(tmp_path, hidden):
    """Shapes of a small decoder at 4 bits in groups of 64: codes, float16 scales, zero points."""
    made = []
    for layer in range(8):
        for rows, columns in (
            (hidden, hidden),
            (hidden // 3, hidden),
            (hidden * 8 // 3, hidden),
            (hidden, hidden * 8 // 3),
        ):
            rng = np.random.default_rng(len(made))
            groups = -(-columns // 64)
            for kind, shape in (("q", (rows, columns // 2)), ("s", (rows, groups * 2)), ("z", (rows, -(-groups // 2)))):
                made.append(tensor(rng.integers(0, 255, shape, np.uint8), f"{kind}{layer}.{len(made)}"))
    paths = save_model(free_model(made), tmp_path / "m.onnx", force=False, external=True)
    outside, _ = entries(paths[0])
    payload = sum(length for _, length in outside.values())
    assert paths[1].stat().st_size <= 1.003 * payload


def test_bytes_are_stored_once(tmp_path):
    """The codes of a tied table, as MatMulNBits and as GatherBlockQuantized read them, and an equal copy."""
    packed = np.random.default_rng(0).integers(0, 255, (64, 128), np.uint8)
    views = {
        "matmul": packed.reshape(64, 8, 16),
        "gather": packed,
        "copy": packed.copy(),
        "signed": packed.view(np.int8),
    }
    model = free_model([tensor(array, name) for name, array in views.items()])
    paths = save_model(model, tmp_path / "m.onnx", force=False, external=True)
    outside, _ = entries(paths[0])
    assert set(outside.values()) == {(0, packed.nbytes)}
    assert paths[1].stat().st_size == packed.nbytes
    after = tensors(load_model(paths[0]))
    for name, array in views.items():
        np.testing.assert_array_equal(after[name], array)


def test_nearly_equal_bytes_are_not(tmp_path):
    first = np.zeros(1 << 21, np.uint8)
    second = first.copy()
    second[(1 << 21) - 2] = 1  # a byte that no sample looks at
    model = free_model([tensor(first, "a"), tensor(second, "b"), tensor(first[:-1].copy(), "c")])
    paths = save_model(model, tmp_path / "m.onnx", force=False, external=True)
    assert len(set(entries(paths[0])[0].values())) == 3
    after = tensors(load_model(paths[0]))
    assert after["b"][-2] == 1
    assert not after["a"].any()


def test_equal_external_data_is_stored_once(tmp_path):
    proto = linear(64, 64)
    proto.graph.initializer.append(weight("w2", (64, 64)))
    path = externalize(proto, tmp_path / "in.onnx")
    paths = save_model(load_model(path), tmp_path / "out.onnx", force=False)
    assert entries(paths[0])[0]["w2"] == entries(paths[0])[0]["w"]


def test_the_same_model_gives_the_same_bytes(tmp_path):
    source = write(linear(512, 256), tmp_path / "in.onnx")
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        model = load_model(source)
        for key in ("zeta", "alpha") if name == "a" else ("alpha", "zeta"):
            model.metadata_props[key] = key
        paths = save_model(model, tmp_path / name / "m.onnx", force=False, external=True)
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]


DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8e4m3fn": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
    "uint16": np.uint16,
    "int64": np.int64,
    "bool": np.bool_,
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
    "int2": ml_dtypes.int2,
    "uint2": ml_dtypes.uint2,
    "float4e2m1": ml_dtypes.float4_e2m1fn,
    "complex64": np.complex64,
}


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(tmp_path, dtype, external):
    """Odd counts included: below 8 bits the last byte is shared."""
    made = []
    for count in (0, 1, 3, 4097, 8191):
        array = np.random.default_rng(count).integers(0, 2, count).astype(DTYPES[dtype])
        made.append(tensor(array, f"t{count}"))
    made.append(tensor(np.array(1).astype(DTYPES[dtype]), "scalar"))
    model = free_model(made)
    paths = save_model(model, tmp_path / "m.onnx", force=False, external=external)
    after = load_model(paths[0])
    for one in made:
        read = after.graph.initializers[one.name].const_value
        assert (read.dtype, read.shape) == (one.dtype, one.shape)
        assert tensor_bytes(read).tobytes() == one.tobytes()
        if one.dtype.bitwidth != 2:  # which some versions of onnx_ir do not read from files
            np.testing.assert_array_equal(read.numpy(), one.numpy())


def test_other_kinds_of_tensors(tmp_path):
    columns_first = np.asfortranarray(np.random.default_rng(0).standard_normal((60, 70)).astype(np.float32))
    packed = ir.PackedTensor(np.arange(100, dtype=np.uint8), ir.DataType.UINT4, shape=[200], name="packed")
    strings = ir.StringTensor([b"a" * 3000, b"b"], shape=ir.Shape([2]), name="strings")
    made = [
        tensor(columns_first, "columns_first"),
        tensor(columns_first[::2, 1::3], "strided"),
        packed,
        strings,
    ]
    paths = save_model(free_model(made), tmp_path / "m.onnx", force=False, external=True)
    after = tensors(load_model(paths[0]))
    for one in made:
        np.testing.assert_array_equal(after[one.name], one.numpy())


def test_quantized_weights_are_written_as_the_floats_they_stand_for(tmp_path):
    spec = WeightSpec(4, 32, symmetric=False)
    floats = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    grid = min_max_grid(floats, spec)
    quantized = QuantizedTensor(
        quantize(floats, grid, spec), grid, spec, layout="KN", dtype=ir.DataType.FLOAT, name="q"
    )
    paths = save_model(free_model([quantized]), tmp_path / "m.onnx", force=False, external=True)
    np.testing.assert_array_equal(tensors(load_model(paths[0]))["q"], quantized.dequantized().T)


def test_tensors_are_made_one_at_a_time_and_once(tmp_path):
    alive = []
    made = []

    def make(number):
        def evaluate():
            made.append(number)
            assert sum(reference() is not None for reference in alive) <= 1
            array = np.full((300, 300), number, np.float32)
            alive.append(weakref.ref(array))
            return ir.Tensor(array)

        return ir.LazyTensor(evaluate, ir.DataType.FLOAT, ir.Shape([300, 300]), name=f"lazy{number}")

    save_model(free_model([make(i) for i in range(6)]), tmp_path / "m.onnx", force=False, external=True)
    assert sorted(made) == list(range(6))
    assert not any(reference() is not None for reference in alive)


def test_memory_stays_flat(tmp_path):
    """600 MB of weights that are made when asked for: an allowance of one tensor and its copy."""

    def make(number):
        def evaluate():
            return ir.Tensor(np.arange(number, number + 5_000_000, dtype=np.float32))

        return ir.LazyTensor(evaluate, ir.DataType.FLOAT, ir.Shape([5_000_000]), name=f"lazy{number}")

    model = free_model([make(i) for i in range(30)])
    with AnonymousPeak() as peak:
        paths = save_model(model, tmp_path / "m.onnx", force=False)
    assert file_bytes(paths) > 600e6
    assert peak.growth < 60e6
    paths[1].unlink()


def test_bodies_may_be_stored_outside(tmp_path):
    model = load_model(branches())
    body = model.graph[1].attributes["then_branch"].as_graph()
    body.initializers["w"].const_value = tensor(np.tile(np.arange(8, dtype=np.float32), (300, 1)), "w")
    body.initializers["w"].shape = ir.Shape([300, 8])
    for v in (*model.graph.inputs[:1], *model.graph.outputs, *body.outputs, model.graph[0].outputs[0]):
        v.shape = ir.Shape([300, 8])
    for v in model.graph[1].attributes["else_branch"].as_graph().outputs:
        v.shape = ir.Shape([300, 8])
    paths = save_model(model, tmp_path / "m.onnx", force=False, external=True)
    assert len(paths) == 2
    x = np.ones((300, 8), np.float32)
    (result,) = run(paths[0], x=x, flag=np.array(True))
    np.testing.assert_array_equal(result, x - np.arange(8, dtype=np.float32))


def test_constants_of_nodes_come_along(tmp_path):
    """A Constant whose value lies in the input's data file holds it itself in the output."""
    proto = make_model(
        [
            helper.make_node("Constant", [], ["w"], value=weight("w", (8, 300))),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        [value("x")],
        [value("y", (2, 300))],
    )
    raw = proto.graph.node[0].attribute[0].t.raw_data
    (tmp_path / "in").mkdir()
    onnx.save(proto, tmp_path / "in" / "m.onnx", save_as_external_data=True, convert_attribute=True, location="c.data")
    model = load_model(tmp_path / "in" / "m.onnx")
    kept = model.graph[0].attributes["value"]
    assert isinstance(kept.value, ir.ExternalTensor)
    (path,) = save_model(model, tmp_path / "m.onnx", force=False)
    assert model.graph[0].attributes["value"] is kept
    assert onnx.load(path, load_external_data=False).graph.node[0].attribute[0].t.raw_data == raw
    run(path)


def test_serializing_evaluates_nothing():
    def fail():
        raise AssertionError("evaluated")

    model = free_model([ir.LazyTensor(fail, ir.DataType.FLOAT, ir.Shape([9]), name="lazy")])
    header = TensorProto(name="lazy", data_type=TensorProto.FLOAT, dims=[9])
    proto = serialize_model(model, {model.graph.initializers["lazy"]: header})
    assert proto.graph.initializer[0] == header


# IR versions.


@pytest.mark.parametrize(
    ("dtype", "needed"),
    [
        ("float32", 8),
        ("bfloat16", 8),
        ("float8e4m3fn", 9),
        ("int4", 10),
        ("uint4", 10),
        ("float4e2m1", 11),
        ("int2", 13),
        ("uint2", 13),
    ],
)
def test_ir_version_rises_to_what_dtypes_need(tmp_path, dtype, needed):
    model = free_model([tensor(np.zeros(4, DTYPES[dtype]), "t")], ir_version=8)
    assert required_ir_version(model) == needed
    save_model(model, tmp_path / "m.onnx", force=False)
    assert onnx.load(tmp_path / "m.onnx").ir_version == needed
    assert model.ir_version == 8


def test_ir_version_sees_attributes_values_and_initializers():
    node = helper.make_node("Constant", [], ["y"], value=helper.make_tensor("t", TensorProto.INT4, [2], [1, 2]))
    proto = make_model([node], [], [value("y", (2,), TensorProto.INT4)], ir_version=9)
    assert required_ir_version(load_model(proto)) == 10
    old = linear(ir_version=3, opsets=(("", 7),))
    assert required_ir_version(load_model(old)) == 4  # its weights are no inputs
    for one in old.graph.initializer:
        old.graph.input.append(value(one.name, one.dims))
    assert required_ir_version(load_model(old)) == 3


# Folders.


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "model"
    (source / "extra").mkdir(parents=True)
    (source / ".cache").mkdir()
    (source / ".cache" / "junk").write_text("")
    externalize(linear(64, 64), source / "decoder.onnx", "decoder.onnx_data")
    (source / "tokenizer.json").write_text('{"ä": 1}', encoding="utf-8")
    (source / "extra" / "adapter.bin").write_bytes(bytes(range(256)))
    config = {"model": {"type": "llama", "decoder": {"filename": "decoder.onnx", "inputs": {}}}, "search": {"top_k": 1}}
    (source / "genai_config.json").write_text(json.dumps(config))
    return source


def test_a_folder_gives_a_folder(tmp_path, folder):
    target = tmp_path / "out"
    model = load_model(folder)
    check_destination(target, model, force=False, folder=True)
    paths = save_folder(model, folder, target, force=False)
    assert paths[:2] == [target / "decoder.onnx", target / "decoder.onnx.data"]
    assert names_in(target) == [
        "decoder.onnx",
        "decoder.onnx.data",
        "extra",
        "extra/adapter.bin",
        "genai_config.json",
        "tokenizer.json",
    ]
    for name in ("extra/adapter.bin", "genai_config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (folder / name).read_bytes()
    for a, b in zip(run(folder / "decoder.onnx"), run(target / "decoder.onnx"), strict=True):
        np.testing.assert_array_equal(a, b)
    load_model(target)


def test_a_model_in_a_folder_of_the_folder(tmp_path, folder):
    (folder / "extra" / "decoder.onnx").write_bytes((folder / "decoder.onnx").read_bytes())
    (folder / "decoder.onnx").unlink()
    (folder / "decoder.onnx_data").rename(folder / "extra" / "decoder.onnx_data")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "extra/decoder.onnx"
    (folder / "genai_config.json").write_text(json.dumps(config))
    paths = save_folder(load_model(folder), folder, tmp_path / "out", force=False)
    assert paths[0] == tmp_path / "out" / "extra" / "decoder.onnx"
    assert names_in(tmp_path / "out" / "extra") == ["adapter.bin", "decoder.onnx", "decoder.onnx.data"]
    run(load_model(tmp_path / "out") and paths[0])


def test_an_existing_folder_needs_force(tmp_path, folder):
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    model = load_model(folder)
    save_folder(model, folder, target, force=False)
    assert (target / "notes.txt").read_text() == "mine"
    before = names_in(target)
    with pytest.raises(OutputError, match=r"exists already; add --force"):
        save_folder(model, folder, target, force=False)
    with pytest.raises(OutputError, match=r"exists already; add --force"):
        check_destination(target, model, force=False, folder=True)
    assert names_in(target) == before
    save_folder(model, folder, target, force=True)
    assert names_in(target) == before


@pytest.mark.parametrize("force", [False, True])
def test_the_input_folder_is_not_overwritten(folder, force):
    before = names_in(folder)
    with pytest.raises(OutputError, match="is the input itself"):
        save_folder(load_model(folder), folder, folder, force=force)
    assert names_in(folder) == before


def test_a_folder_within_the_input(folder):
    save_folder(load_model(folder), folder, folder / "int4", force=False)
    assert names_in(folder / "int4")[0] == "decoder.onnx"
    assert not (folder / "int4" / "int4").exists()


def test_a_folder_that_fails_is_not_there(tmp_path, folder, monkeypatch):
    failing(monkeypatch, os, "pwrite", OSError(errno.ENOSPC, "No space left on device"), after=3)
    before = names_in(tmp_path)
    with pytest.raises(OutputError, match="free some space"):
        save_folder(load_model(folder), folder, tmp_path / "out", force=False)
    assert names_in(tmp_path) == before
    with pytest.raises(OutputError, match="mkdir -p"):
        save_folder(load_model(folder), folder, tmp_path / "none" / "out", force=False)


def test_companions_name_a_renamed_model(tmp_path, folder):
    target = tmp_path / "out"
    with OutputTransaction(target) as transaction:
        saver.copy_companions(folder, target, "decoder_int4.onnx", transaction=transaction)
        transaction.commit()
    config = json.loads((target / "genai_config.json").read_text())
    assert config["model"]["decoder"] == {"filename": "decoder_int4.onnx", "inputs": {}}
    assert list(config) == ["model", "search"]


def test_companions_that_cannot_be_read(tmp_path, folder):
    (folder / "broken").symlink_to("nowhere")
    with pytest.raises(ModelError, match="broken: cannot be read"):
        save_folder(load_model(folder), folder, tmp_path / "out", force=False)
    assert not (tmp_path / "out").exists()
