"""The built library: every kernel against the numpy reference, on every instruction set that the processor has."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler import kernels
from qcompiler.errors import KernelError
from qcompiler.kernels import build, headers, reference
from qcompiler.kernels import library as libraries
from qcompiler.kernels.schemas import OPERATORS
from qcompiler.numerics.packing import pack_stream
from qcompiler.session import OrtRunner
from qcompiler.sites import find_sites
from tests.kernel_cases import make_inputs, model_of

ROOT = Path(__file__).parent.parent.parent
LEVELS = ("generic", "avx2", "avx512", "amx")


def run(name, inputs, library, body=True, **attributes):
    model = model_of(name, inputs, body=body, **attributes)
    with OrtRunner(model.SerializeToString(), threads=1, custom_ops=library) as runner:
        return runner.run({"A": inputs[0]})["Y"].copy()


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_compute_what_the_reference_says(library, level, monkeypatch):
    best = LEVELS.index(libraries.instruction_set(library))
    monkeypatch.setenv("QCOMPILER_CPU", level)
    command = [sys.executable, "-m", "tests.kernel_sweep", str(library)]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert found["instruction set"] == LEVELS[min(best, LEVELS.index(level))]
    expected = {
        f"{name} {level}" for name, each in OPERATORS.items() for level in ((0, 4) if each.attributes else (0,))
    }
    assert set(found["worst"]) == expected
    for key, (same, exact) in found["worst"].items():
        # A rounded activation between two codes may go to either.
        assert same <= (1e-5 if key.endswith(" 0") else 2e-3), key
        assert exact <= (1e-5 if key.endswith(" 0") else 2e-2), key


@pytest.mark.parametrize("name", OPERATORS)
def test_float16_activations(library, name):
    inputs = make_inputs(name, (5,), dtype="float16")
    found, expected = run(name, inputs, library), reference.run(name, inputs)
    assert found.dtype == np.float16
    # Computed in float32 and rounded once.
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=2e-3, atol=2e-3)


def test_float16_numbers_of_every_kind(library):
    """Decoded by the kernel and encoded again: zeros, denormal numbers, the largest, infinities."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = every[np.isfinite(every.astype(np.float32))].reshape(-1, 1)
    inputs = make_inputs("MatMul4Bits", (len(values),), N=1, K=16, group_size=16, dtype="float16", seed=1)
    inputs[0] = np.pad(values, ((0, 0), (0, 15)))
    codes = np.zeros((1, 16), np.uint8)
    codes[0, 0] = 9
    inputs[1:] = [pack_stream(codes, 4, 16), np.ones((1, 1, 1), np.float16), np.full((1, 1, 1), 8, np.uint8),
                  np.zeros(1, np.float16)]  # fmt: skip
    found = run("MatMul4Bits", inputs, library)
    np.testing.assert_array_equal(found, values)


def test_signatures_are_those_of_the_contracts(library):
    expected = set()
    for name, each in OPERATORS.items():
        for floats in each.inputs[0].types:
            options = [[floats if kind == "T" else kind for kind in operand.types] for operand in each.inputs[1:]]
            for types in itertools.product(*options):
                expected.add(f"{name}({', '.join((floats, *types))}) -> {floats}")
    assert set(libraries.signatures(library)) == expected


def test_kernels_run_in_the_place_of_bodies(library):
    """The body computes exactly; at level 4 the kernel rounds activations."""
    inputs = make_inputs("MatMul4Bits", (3,), N=40, K=256, group_size=64)
    with OrtRunner(model_of("MatMul4Bits", inputs, accuracy_level=4).SerializeToString(), threads=1) as runner:
        body = runner.run({"A": inputs[0]})["Y"].copy()
    kernel = run("MatMul4Bits", inputs, library, accuracy_level=4)
    exact = reference.run("MatMul4Bits", inputs)
    np.testing.assert_allclose(body, exact, rtol=1e-4, atol=1e-3)
    assert 1e-4 < np.abs(kernel - exact).max() / np.abs(exact).max() < 2e-2


def test_results_do_not_depend_on_threads(library):
    for name, rows in itertools.product(("MatMul3Bits", "MatMulCodebook16", "MatMulSigns"), (1, 40)):
        inputs = make_inputs(name, (rows,), N=300, K=512, group_size=64)
        found = []
        for threads in (1, 2):
            with OrtRunner(model_of(name, inputs).SerializeToString(), threads=threads, custom_ops=library) as runner:
                found.append(runner.run({"A": inputs[0]})["Y"].copy())
        assert np.array_equal(*found)


def test_no_rows_at_all(library):
    inputs = make_inputs("MatMul3Bits", (0, 4))
    assert run("MatMul3Bits", inputs, library).shape == (0, 4, 24)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"B": (24, 60)}, r"codes \[24, 60\] are not \[N, G, bytes\]"),
        ({"B": (24, 5, 13)}, "13 bytes are no whole group of 3-bit codes"),
        ({"B": (24, 4, 12)}, "4 groups of 32 columns do not make up K = 136"),
        ({"scales": (24, 4, 1)}, "scales are not one for each group"),
        ({"zero_points": (24, 1, 1)}, "zero_points are neither one nor one for each group"),
        ({"bias": (23,)}, r"bias is neither \[N\] nor \[1\]"),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_number(library, change, problem):
    inputs = make_inputs("MatMul3Bits")
    names = [each.name for each in OPERATORS["MatMul3Bits"].inputs]
    for name, shape in change.items():
        inputs[names.index(name)] = np.ones(shape, inputs[names.index(name)].dtype)
    with pytest.raises(KernelError, match=f"MatMul3Bits '.*': {problem}"):
        run("MatMul3Bits", inputs, library, body=False)


def test_a_table_that_is_not_there_is_an_error(library):
    inputs = make_inputs("MatMulCodebook16")
    inputs[3] = np.full((1, 1, 1), 17, np.int32)  # starts
    with pytest.raises(KernelError, match="a table begins at entry 17 of 32"):
        run("MatMulCodebook16", inputs, library)


def test_one_line_registers_the_library(library, monkeypatch):
    monkeypatch.setenv(libraries.VARIABLE, str(library))
    inputs = make_inputs("MatMul3Bits")
    options = onnxruntime.SessionOptions()
    kernels.register(options)
    model = model_of("MatMul3Bits", inputs, body=False)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"A": inputs[0]})
    np.testing.assert_allclose(found, reference.run("MatMul3Bits", inputs), rtol=1e-4, atol=1e-4)


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.delenv(libraries.VARIABLE, raising=False)
    monkeypatch.setattr(libraries, "PLACE", tmp_path / "nothing.so")
    with pytest.raises(KernelError, match="has not been built; python -m qcompiler"):
        kernels.register(onnxruntime.SessionOptions())
    with pytest.raises(KernelError, match="has not been built"):
        libraries.instruction_set()
    monkeypatch.setenv(libraries.VARIABLE, str(tmp_path / "other.so"))
    with pytest.raises(KernelError, match="there is no such file"):
        libraries.library_path()
    (tmp_path / "other.so").write_bytes(b"no library")
    with pytest.raises(KernelError, match="cannot be loaded"):
        kernels.register(onnxruntime.SessionOptions())


def test_a_library_for_a_newer_runtime_is_refused(library, monkeypatch):
    class Old:
        __version__ = "1.2.0"

    monkeypatch.setattr("qcompiler.runtime.require_onnxruntime", lambda: Old)
    with pytest.raises(KernelError, match=r"was built for ONNX Runtime 1\.\d+, and this one is 1.2.0"):
        libraries.register(onnxruntime.SessionOptions(), library)


def test_what_building_takes(monkeypatch, tmp_path):
    with pytest.raises(KernelError, match=f"holds no {headers.HEADER}"):
        build.build(tmp_path / "x.so", headers=tmp_path)
    monkeypatch.setattr(headers, "_INSTALLED", ())
    monkeypatch.setattr("shutil.which", lambda program, **_: None)
    with pytest.raises(KernelError, match="CMake is needed"):
        build.build(tmp_path / "x.so")
    with pytest.raises(KernelError, match="without apt-get and dpkg-deb none can be fetched"):
        headers.find_headers(None, tmp_path / "kept")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    with pytest.raises(KernelError, match="not part of the installed package"):
        build.build(tmp_path / "x.so")


def test_what_the_compiler_says_is_told(monkeypatch, tmp_path):
    (tmp_path / headers.HEADER).write_text("#error no such thing\n")
    with pytest.raises(KernelError, match="no such thing"):
        build.build(tmp_path / "x.so", headers=tmp_path)
    assert not (tmp_path / "x.so").exists()


def test_models_of_our_operators_are_read_as_quantized_already(library):
    model = model_of("MatMul3Bits", make_inputs("MatMul3Bits"))
    onnx.checker.check_model(model)
    sites, _ = find_sites(ir.from_proto(model))
    assert not sites
