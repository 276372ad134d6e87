"""What users get wrong: one line that says what, where and the remedy; an exit code; nothing written.

Each case is a function that puts files below a folder and returns the arguments of `qcompile`; `out/` is there for the
result.
"""

import errno
import os
import resource
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from qcompiler.cli import qcompile
from tests.stored_models import external, externalize, make_model, value, weight, write

FAILED, USAGE = 1, 2


def two_layers(**options):
    """x [batch, 64] -> 64 -> 32: two sites."""
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "down"], ["y"], name="second"),
    ]
    weights = [weight("up", (64, 64)), weight("down", (64, 32), seed=1)]
    return make_model(nodes, [value("x", ("batch", 64))], [value("y", ("batch", 32))], weights, **options)


def two_inputs():
    nodes = [
        helper.make_node("Add", ["x", "z"], ["s"], name="sum"),
        helper.make_node("MatMul", ["s", "up"], ["y"], name="first"),
    ]
    inputs = [value("x", ("batch", 64)), value("z", ("batch", 64))]
    return make_model(nodes, inputs, [value("y", ("batch", 64))], [weight("up", (64, 64))])


def token_model():
    """input_ids [batch, seq] -> a table of 512 rows -> logits."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["h"], name="embed"),
        helper.make_node("MatMul", ["h", "head"], ["logits"], name="head"),
    ]
    weights = [weight("table", (512, 64)), weight("head", (64, 512), seed=1)]
    ids = value("input_ids", ("batch", "seq"), TensorProto.INT64)
    return make_model(nodes, [ids], [value("logits", ("batch", "seq", 512))], weights)


def changed(change, model=two_layers):
    proto = model()
    change(proto)
    return proto


def compiled(folder, model=None, *arguments, output="out/q.onnx"):
    """Arguments that compile a message (by default a good one) or the file `model`."""
    path = model if isinstance(model, Path) else write(model or two_layers(), folder / "m.onnx")
    return [path, "--scheme", "w4a16", "-o", folder / output, *arguments]


def file_of(content):
    def prepare(folder):
        (folder / "m.onnx").write_bytes(content)
        return compiled(folder, folder / "m.onnx")

    return prepare


def message(change, model=two_layers):
    return lambda folder: compiled(folder, changed(change, model))


def options(*arguments, model=two_layers):
    return lambda folder: compiled(folder, model(), *arguments)


def data(name, arrays, model=two_layers, *arguments):
    """Calibration data in an .npz, or, where it is a text, in a file of that text."""

    def prepare(folder):
        path = folder / name
        if isinstance(arrays, str):
            path.write_text(arrays)
        else:
            np.savez(path, **arrays)
        return compiled(folder, model(), "--calibration", path, *arguments)

    return prepare


def outside(location, data_file=None, size=64 * 64 * 4, length=64 * 64 * 4):
    """The weight `up` is external data at `location`."""

    def prepare(folder):
        if data_file is not None:
            (folder / data_file).parent.mkdir(exist_ok=True)
            (folder / data_file).write_bytes(b"\0" * size)
        proto = two_layers()
        proto.graph.initializer[0].CopyFrom(external("up", [64, 64], location, 0, length))
        (folder / "model").mkdir(exist_ok=True)
        return compiled(folder, write(proto, folder / "model" / "m.onnx"))

    return prepare


def linked(folder):
    arguments = outside("w.data", "secret")(folder)
    (folder / "model" / "w.data").symlink_to(folder / "secret")
    return arguments


def truncated(folder):
    content = two_layers().SerializeToString()
    return file_of(content[: len(content) // 2])(folder)


def poisoned(name, place, number):
    """A weight with one bad value."""

    def change(proto):
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array[place] = number
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return message(change)


def _cycle(proto):
    proto.graph.node[0].input[0] = "r"


def _dangling(proto):
    proto.graph.node[2].input[0] = "nowhere"


def _twice(proto):
    proto.graph.node[1].output[0] = "h"


def _opset(proto):
    proto.opset_import[0].version = 99


def _ir_version(proto):
    proto.ir_version = 99


def _shape(proto):
    proto.graph.initializer[0].dims[0] = 65


def existing(folder):
    (folder / "out" / "q.onnx").write_bytes(b"precious")
    return compiled(folder)


def existing_data(folder):
    (folder / "out" / "q.onnx.data").write_bytes(b"precious")
    return compiled(folder)


def onto_input(folder):
    return compiled(folder, None, "--force", output="m.onnx")


def onto_input_by_another_name(folder):
    arguments = compiled(folder, None, "--force", output="link.onnx")
    (folder / "link.onnx").symlink_to("m.onnx")
    return arguments


def onto_data(folder):
    return compiled(folder, externalize(two_layers(), folder / "m.onnx"), "--force", output="weights.data")


def under_a_file(folder):
    (folder / "file").write_text("")
    return compiled(folder, output="file/q.onnx")


def into_nothing(folder):
    return compiled(folder, output="none/q.onnx")


def onto_folder(folder):
    return compiled(folder, output="out")


def where_nobody_writes(folder):
    return compiled(folder, output="/proc/self/q.onnx")


def folder_without_model(folder):
    (folder / "model").mkdir()
    (folder / "model" / "tokenizer.json").write_text("{}")
    return compiled(folder, folder / "model")


def folder_with_wrong_name(folder):
    (folder / "model").mkdir()
    write(two_layers(), folder / "model" / "m.onnx")
    (folder / "model" / "genai_config.json").write_text('{"model": {"decoder": {"filename": "gone.onnx"}}}')
    return compiled(folder, folder / "model")


def failing_with(code, call="pwrite"):
    """A function of the operating system reports an error."""

    @contextmanager
    def surroundings(monkeypatch):
        def fail(*_, **__):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, call, fail)
        yield

    return surroundings


@contextmanager
def read_only(monkeypatch):
    """Nothing can be made beside the output; elsewhere, temporary files included, it can."""
    mkdir = os.mkdir

    def make(path, *args, **kwargs):
        if Path(path).parent.name == "out":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", make)
    yield


@contextmanager
def small_files(_):
    """No file may grow beyond 4 kB: the operating system itself refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def as_usual(_):
    yield


@dataclass(frozen=True)
class Case:
    """A mistake: how to make it, the exit code, what the line must say, and what the machine is like."""

    prepare: Callable[[Path], list]
    code: int
    words: tuple[str, ...]
    surroundings: Callable = as_usual


ROWS = np.zeros((8, 64), np.float32)
CASES = {
    # The model file.
    "missing file": Case(lambda f: compiled(f, f / "none.onnx"), FAILED, ("none.onnx", "does not exist", "check")),
    "empty file": Case(file_of(b""), FAILED, ("m.onnx", "0 bytes", "again")),
    "text file": Case(file_of(b"Not a model.\n" * 9), FAILED, ("m.onnx", "text", "give an .onnx file")),
    "truncated file": Case(truncated, FAILED, ("m.onnx", "cut short", "at byte", "again")),
    "git-lfs pointer": Case(
        file_of(b"version https://git-lfs.github.com/spec/v1\n"), FAILED, ("m.onnx", "git lfs pull")
    ),
    "another protobuf": Case(file_of(b"\x0a\x03abc"), FAILED, ("m.onnx", "no graph", "export")),
    "folder without a model": Case(folder_without_model, FAILED, ("model", "genai_config.json", "give the path")),
    "folder that names no file": Case(folder_with_wrong_name, FAILED, ("gone.onnx", "genai_config.json", "check")),
    # The model in it.
    "opset too new": Case(message(_opset), FAILED, ("m.onnx", "opset 99", "up to 26", "convert")),
    "ir version too new": Case(message(_ir_version), FAILED, ("m.onnx", "IR version 99", "up to 13", "set ir_version")),
    "cycle": Case(message(_cycle), FAILED, ("m.onnx", "cycle", "'first'", "'relu'", "export")),
    "dangling name": Case(message(_dangling), FAILED, ("m.onnx", "'second'", "'nowhere'", "export")),
    "value defined twice": Case(message(_twice), FAILED, ("m.onnx", "'relu'", "'h'", "rename")),
    "weight of the wrong size": Case(message(_shape), FAILED, ("'up'", "16384 bytes", "needs 16640", "again")),
    "NaN weight": Case(poisoned("up", (3, 5), np.nan), FAILED, ("'first'", "1 values", "NaN", "--ignore")),
    "infinite weight": Case(poisoned("down", (3, 5), np.inf), FAILED, ("'second'", "1 values", "infinite", "--ignore")),
    # External data.
    "no external data": Case(outside("w.data"), FAILED, ("m.onnx", "'up'", "'w.data'", "missing", "put")),
    "short external data": Case(
        outside("w.data", "model/w.data", 9000), FAILED, ("'up'", "16384", "'w.data'", "9000", "again")
    ),
    "external data above": Case(outside("../w.data", "w.data"), FAILED, ("'up'", "'../w.data'", "outside", "move")),
    "absolute external data": Case(outside("/etc/hostname"), FAILED, ("'up'", "'/etc/hostname'", "absolute", "save")),
    "external data by a link": Case(linked, FAILED, ("'up'", "'w.data'", "link", "put a copy")),
    # Options.
    "unknown scheme": Case(options("--scheme", "int5"), USAGE, ("'int5'", "expected", "w4a16")),
    "unknown group size": Case(options("--scheme", "w4a16-g48"), USAGE, ("48", "known sizes", "32")),
    "unknown algorithm": Case(options("--algorithm", "magic"), USAGE, ("magic", "gptq", "rtn")),
    "unknown option of an algorithm": Case(
        options("--algorithm", "gptq{magic=1}"), USAGE, ("magic", "gptq", "percdamp")
    ),
    "--set without a scheme": Case(options("--set", "first"), USAGE, ("--set first", "PATTERN=SCHEME")),
    "--set with a bad pattern": Case(options("--set", "re:(=w8a16"), USAGE, ("re:(", "escape")),
    "--ignore with a bad pattern": Case(options("--ignore", "re:*"), USAGE, ("re:*", "escape")),
    "--set of nothing": Case(options("--set", "frist=w8a16"), USAGE, ("'frist'", "no site", "--sites")),
    "--ignore of nothing": Case(options("--ignore", "frist"), USAGE, ("'frist'", "no site", "--sites")),
    "--samples 0": Case(options("--samples", "0"), USAGE, ("--samples 0", "at least 1")),
    "--max-memory nonsense": Case(options("--max-memory", "lots"), USAGE, ("--max-memory lots", "2GB")),
    "unknown provider": Case(options("--provider", "Magic"), FAILED, ("Magic", "CPUExecutionProvider")),
    "nothing to quantize": Case(
        options("--require-quantized", "--only", "first", "--ignore", "first"),
        FAILED,
        ("nothing was quantized", "--ignore"),
    ),
    # Calibration data.
    "no calibration file": Case(options("--calibration", "none.npz"), FAILED, ("none.npz", "does not exist", "give")),
    "empty calibration": Case(data("d.npz", {"x": ROWS[:0]}), FAILED, ("d.npz", "empty", "give")),
    "wrong width": Case(data("d.npz", {"x": ROWS[:, :60]}), FAILED, ("d.npz", "'x'", "64", "60", "resize")),
    "wrong rank": Case(data("d.npz", {"x": ROWS[0]}), FAILED, ("d.npz", "'x'", "rank", "axis")),
    "wrong dtype": Case(data("d.npz", {"x": ROWS.astype("U3")}), FAILED, ("d.npz", "'x'", "float32", "convert")),
    "NaN in calibration": Case(data("d.npz", {"x": ROWS * np.nan}), FAILED, ("d.npz", "'x'", "NaN", "remove")),
    "an input is missing": Case(data("d.npz", {"x": ROWS}, two_inputs), FAILED, ("d.npz", "z", "give")),
    "an input too many": Case(data("d.npz", {"x": ROWS, "w": ROWS}), FAILED, ("d.npz", "w", "leave it out")),
    "no tokenizer": Case(data("d.txt", "Some words.\n", token_model), FAILED, ("d.txt", "--tokenizer")),
    "missing tokenizer": Case(
        data("d.txt", "Some words.\n", token_model, "--tokenizer", "none.json"), FAILED, ("none.json", "tokenizer")
    ),
    "token outside the vocabulary": Case(data("d.jsonl", "[1, 512]\n", token_model), FAILED, ("512", "tokenizer")),
    "text for a model without tokens": Case(data("d.jsonl", "[1, 2]\n"), FAILED, ("d.jsonl", "x", "give")),
    # The output.
    "existing output": Case(existing, FAILED, ("q.onnx", "exists already", "--force")),
    "existing data file": Case(existing_data, FAILED, ("q.onnx.data", "exists already", "--force")),
    "output is the input": Case(onto_input, FAILED, ("m.onnx", "the input itself", "choose")),
    "output is a link to the input": Case(
        onto_input_by_another_name, FAILED, ("link.onnx", "the input itself", "choose")
    ),
    "output is the input's data": Case(onto_data, FAILED, ("weights.data", "the input itself", "choose")),
    "output under a file": Case(under_a_file, FAILED, ("q.onnx", "a file, not a folder", "choose")),
    "output folder missing": Case(into_nothing, FAILED, ("q.onnx", "does not exist", "mkdir -p")),
    "output is a folder": Case(onto_folder, FAILED, ("out", "is a folder", "give")),
    "output where nobody writes": Case(where_nobody_writes, FAILED, ("/proc/self/q.onnx", "writ", "choose")),
    "read-only disk": Case(options(), FAILED, ("q.onnx", "Read-only", "choose"), read_only),
    "full disk": Case(options(), FAILED, ("q.onnx", "No space", "MB free", "free some"), failing_with(errno.ENOSPC)),
    "full disk at the last moment": Case(
        options(), FAILED, ("q.onnx", "No space", "free some"), failing_with(errno.ENOSPC, "fsync")
    ),
    "file size limit": Case(options(), FAILED, ("q.onnx", "File too large", "ulimit -f"), small_files),
}


def contents(folder):
    """Every path below a folder with what it holds."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", CASES)
def test_bad_input(tmp_path, monkeypatch, name):
    case = CASES[name]
    (tmp_path / "out").mkdir()
    arguments = [str(argument) for argument in case.prepare(tmp_path)]
    before = contents(tmp_path)
    with monkeypatch.context() as patch, case.surroundings(patch):
        result = CliRunner().invoke(qcompile, arguments)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.exit_code == case.code, result.output
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert [word for word in case.words if word not in lines[0]] == [], lines[0]
    assert contents(tmp_path) == before


def test_the_good_input_is_good(tmp_path):
    """Without a mistake the same call succeeds: the cases above fail for their own reasons."""
    (tmp_path / "out").mkdir()
    for model in (two_layers(), two_inputs(), token_model()):
        arguments = [str(argument) for argument in compiled(tmp_path, model, "--force")]
        result = CliRunner().invoke(qcompile, arguments)
        assert result.exit_code == 0, result.output
        assert (tmp_path / "out" / "q.onnx").stat().st_size > 0
