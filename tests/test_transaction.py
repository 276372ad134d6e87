"""What is refused, and what is left behind: nothing."""

import errno
import os
import resource
import stat
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import OutputError
from qcompiler.files import saver
from qcompiler.files.loader import load_model
from qcompiler.files.saver import (
    OutputTransaction,
    check_destination,
    data_path,
    save_model,
)
from tests.stored_models import (
    externalize,
    failing,
    free_model,
    linear,
    names_in,
    open_files,
    run,
    tensor,
    write,
)


@pytest.fixture
def model():
    return load_model(linear(64, 64))


def assert_refused(model, path, *words, **options):
    folder = path.parent if path.parent.is_dir() else path.parent.parent
    before = names_in(folder)
    with pytest.raises(OutputError) as caught:
        save_model(model, path, **{"force": False, "external": True, **options})
    message = str(caught.value)
    assert message.startswith(f"{path}")
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    assert names_in(folder) == before


def test_existing_output_needs_force(tmp_path, model):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    assert_refused(model, path, "exists already", "--force")
    assert path.read_bytes() == b"old"
    save_model(model, path, force=True, external=True)
    run(path)
    path.unlink()
    assert_refused(model, path, "m.onnx.data", "exists already", "--force")
    assert names_in(tmp_path) == ["m.onnx.data"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["in.onnx", "weights.data", "link.onnx", "hard.onnx", "in.onnx.data"])
def test_inputs_are_never_overwritten(tmp_path, name, force):
    source = externalize(linear(64, 64), tmp_path / "in.onnx")
    (tmp_path / "link.onnx").symlink_to("in.onnx")
    os.link(source, tmp_path / "hard.onnx")
    before = source.read_bytes(), (tmp_path / "weights.data").read_bytes()
    if name == "in.onnx.data":  # the output's data file would be the input's
        (tmp_path / "weights.data").rename(tmp_path / "out.onnx.data")
        (tmp_path / "weights.data").symlink_to("out.onnx.data")
        name = "out.onnx"
    loaded = load_model(source)
    assert_refused(loaded, tmp_path / name, "is the input itself", "choose another", force=force)
    with pytest.raises(OutputError, match="is the input itself"):
        check_destination(tmp_path / name, loaded, force=force)
    assert (source.read_bytes(), (tmp_path / "weights.data").read_bytes()) == before


def test_inputs_are_protected_when_no_weight_reads_them_any_more(tmp_path):
    source = write(linear(512, 256), tmp_path / "in.onnx")
    loaded = load_model(source)
    for v in loaded.graph.initializers.values():
        v.const_value = tensor(np.zeros(v.shape.numpy(), np.float32), v.name)
    assert_refused(loaded, source, "is the input itself", force=True)


def test_missing_and_impossible_folders(tmp_path, model):
    assert_refused(model, tmp_path / "none" / "m.onnx", "does not exist", "mkdir -p")
    (tmp_path / "file").write_text("")
    assert_refused(model, tmp_path / "file" / "m.onnx", "is a file, not a folder", "choose")
    (tmp_path / "folder").mkdir()
    assert_refused(model, tmp_path / "folder", "is a folder", "give the name of a file")
    assert_refused(model, tmp_path / ("x" * 300), "too long", "choose a shorter name")
    check_destination(tmp_path / "m.onnx", model, force=False)
    with pytest.raises(OutputError, match="mkdir -p"):
        check_destination(tmp_path / "none" / "m.onnx", model, force=False)


def test_folder_that_takes_no_files(model):
    """Nobody, root included, creates a file there."""
    with pytest.raises(OutputError, match=r"cannot be written|not writable"):
        save_model(model, Path("/proc/self/m.onnx"), force=False)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, ["No space left", "MB free", "free some space"]),
        (errno.EDQUOT, ["quota"]),
        (errno.EIO, ["Input/output error", "check the disk"]),
        (errno.EROFS, ["Read-only", "not read-only"]),
    ],
)
@pytest.mark.parametrize("call", ["pwrite", "fsync", "open"])
def test_errors_of_the_disk(tmp_path, monkeypatch, model, call, code, words):
    failing(monkeypatch, os, call, OSError(code, os.strerror(code)), after=1, times=1)
    assert_refused(model, tmp_path / "m.onnx", *words)


def test_a_limit_on_file_size(tmp_path, model):
    """A real limit of the operating system, reached in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        assert_refused(model, tmp_path / "m.onnx", "File too large", "ulimit -f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_interruptions(tmp_path, error):
    def fail():
        raise error

    good = tensor(np.zeros(100_000, np.float32), "a")
    bad = ir.LazyTensor(fail, ir.DataType.FLOAT, ir.Shape([100_000]), name="b")
    model = free_model([good, bad])
    with pytest.raises(error):
        save_model(model, tmp_path / "m.onnx", force=False, external=True)
    assert names_in(tmp_path) == []
    assert model.graph.initializers["a"].const_value is good
    assert model.graph.initializers["b"].const_value is bad


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_failed_rename_leaves_the_old_output(tmp_path, monkeypatch, model, error, after):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old model")
    data_path(path).write_bytes(b"old data")
    failing(monkeypatch, Path, "replace", error, after=after, times=1)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        save_model(model, path, force=True, external=True)
    assert (path.read_bytes(), data_path(path).read_bytes()) == (b"old model", b"old data")
    assert names_in(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    def evaluate():
        (tmp_path / "m.onnx").write_bytes(b"mine")
        return ir.Tensor(np.zeros(1000, np.float32))

    late = free_model([ir.LazyTensor(evaluate, ir.DataType.FLOAT, ir.Shape([1000]), name="w")])
    with pytest.raises(OutputError, match="exists already"):
        save_model(late, tmp_path / "m.onnx", force=False, external=True)
    assert names_in(tmp_path) == ["m.onnx"]


def test_a_model_can_be_tried_before_it_replaces_an_older_one(tmp_path, model):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with OutputTransaction(tmp_path, force=True) as transaction:
        saver.write_model(model, path, transaction, external=True)
        staged = transaction.seal()
        assert [file.name for file in staged] == ["m.onnx.data", "m.onnx"]
        run(transaction.staged(path))
        assert path.read_bytes() == b"old"
        transaction.create(tmp_path / "report.json").write(b"{}")
        transaction.commit()
    run(path)
    assert names_in(tmp_path) == ["m.onnx", "m.onnx.data", "report.json"]


def test_permissions_are_the_usual_ones(tmp_path, model):
    mask = os.umask(0o027)
    try:
        paths = save_model(model, tmp_path / "m.onnx", force=False, external=True)
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o640}


def test_no_descriptor_is_left_open(tmp_path, monkeypatch, model):
    before = open_files()
    save_model(model, tmp_path / "a.onnx", force=False, external=True)
    failing(monkeypatch, os, "fsync", OSError(errno.EIO, "broken"), after=1)
    with pytest.raises(OutputError):
        save_model(model, tmp_path / "b.onnx", force=False, external=True)
    assert open_files() == before
