"""Kernels for CUDA without a GPU: their meaning in Triton's interpreter, what the compiler makes of them, how they are
launched on a driver that only writes down; and the real thing where there is a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qcompiler import kernels
from qcompiler.kernels import build, reference
from qcompiler.kernels import library as libraries
from qcompiler.kernels.schemas import OPERATORS
from tests.cuda_cases import arguments
from tests.kernel_cases import make_inputs, model_of

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def compiled():
    """All images."""
    pytest.importorskip("triton")
    from qcompiler.kernels.triton import compiler

    return compiler.compile_all(list(compiler.variants()))


@pytest.fixture(scope="module")
def cuda_library(compiled, tmp_path_factory):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    from qcompiler.kernels.triton.compiler import write_images

    folder = tmp_path_factory.mktemp("cuda")
    write_images(compiled, folder)
    return build.build(folder / libraries.FILE_NAME, images=folder)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "libcuda.so"
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = Path(__file__).parent / "stub_driver.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, source], check=True)
    return path


def fnv(data):
    digest = 14695981039346656037
    for byte in data:
        digest = (digest ^ byte) * 1099511628211 % (1 << 64)
    return f"{digest:016x}"


def test_kernels_compute_what_the_reference_says():
    pytest.importorskip("triton")
    pytest.importorskip("torch")  # Triton's interpreter takes its tensors
    from qcompiler.kernels.triton.compiler import variants

    command = [sys.executable, "-m", "tests.triton_sweep"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    worst = json.loads(done.stdout)
    assert set(worst) == {each.name for each in variants()}
    for name, error in worst.items():
        # Decoded weights are rounded to float16 where tensor cores take them so.
        assert error <= (1e-6 if "float32" in name else 1e-3), name


def test_every_kernel_is_there_for_every_processor_and_spills_nothing(compiled):
    from qcompiler.kernels.triton.compiler import PTX, TARGETS, variants

    assert {80, 86, 89, 90, 100, 120} == set(TARGETS)
    found = {(image.variant, image.target) for image in compiled}
    assert found == {(variant, target) for variant in variants() for target in (*TARGETS, PTX)}
    assert not [(each.variant.name, each.target, each.stack) for each in compiled if each.stack]
    for each in compiled:
        assert each.code.startswith(b"\x7fELF" if each.target else b"//"), each.variant.name
        assert each.shared <= 48 * 1024  # what a program has on every processor, unasked


def products(name, rows, *, dtype="float16", **options):
    """What the launcher is given for an operator, and what it should pass on, with addresses that are made up."""
    inputs = make_inputs(name, rows, dtype=dtype, **options)
    values, entry = arguments(name, inputs)
    addresses = {
        key: 4096 * at for at, key in enumerate(("a", "b", "scales", "values", "zero_codes", "starts", "bias", "y"), 1)
    }
    used = {
        "uniform": ("zero_codes",) if values["zeros_are_codes"] else ("values",),
        "codebook": ("values", "starts"),
        "signs": (),
    }
    kind = "signs" if name == "MatMulSigns" else "codebook" if "Codebook" in name else "uniform"
    for key in ("values", "zero_codes", "starts"):
        if key not in used[kind]:
            addresses[key] = None
    product = {
        "kind": kind, "bits": OPERATORS[name].bits, "entry": entry, "half": dtype == "float16",
        "count": values["M"], "rows": values["N"], "columns": values["K"], "groups": values["groups"],
        "group_size": values["octets"] * 8 * entry, "entries": values["entries"],
        "zeros_are_codes": bool(values["zeros_are_codes"]), "zero_each": bool(values["zero_step"]),
        "starts_each": bool(values["start_step"]), "bias_each": bool(values["bias_step"]),
        **{key: addresses[key] for key in ("a", "scales", "values", "zero_codes", "starts", "bias", "y")},
        "codes": addresses["b"],
    }  # fmt: skip
    passed = [addresses[key] or 0 if key in addresses else value for key, value in values.items()]
    return product, [*passed, 0, 0]


def launched(library, driver, todo, tmp_path, capability=90, **environment):
    """Errors, and what the driver has seen."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    environment = os.environ | environment | {
        "QCOMPILER_CUDA_DRIVER": str(driver), "STUB_LOG": str(log), "STUB_CAPABILITY": str(capability),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.cuda_launch", str(library), json.dumps(todo)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


CASES = (
    ("MatMul4Bits", (1,), {"N": 24, "K": 144}, (1, 1)),
    ("MatMul4Bits", (7,), {"N": 100, "K": 144, "zeros": "half"}, (16, 1)),
    ("MatMul3Bits", (2, 70), {"N": 24, "K": 144, "zeros": "one"}, (64, 3)),
    # Rows that do not begin at multiples of 16 bytes: a row at a time.
    ("MatMul2Bits", (7,), {"N": 24, "K": 136}, (1, 7)),
    ("MatMul1Bit", (33,), {"N": 24, "K": 160, "dtype": "float32", "seed": 1}, (32, 2)),
    ("MatMulCodebook8", (3,), {"N": 24, "K": 160, "entry": 4, "group_size": 64}, (16, 1)),
    ("MatMulCodebook256", (1,), {"N": 24, "K": 160, "entry": 2, "dtype": "float32"}, (1, 1)),
    ("MatMulSigns", (200,), {"N": 24, "K": 160, "seed": 1}, (64, 4)),
)


def test_launches(cuda_library, compiled, driver, tmp_path):
    """The right kernel, loaded once, the right number of programs, and every argument in its place."""
    made = [products(name, rows, **options) for name, rows, options, _ in CASES]
    errors, seen = launched(cuda_library, driver, [product for product, _ in made] * 2, tmp_path)
    assert errors == [None] * len(errors)
    launches = [each for each in seen if "launch" in each]
    modules = [each for each in seen if "module" in each]
    assert len(launches) == 2 * len(CASES)
    assert len({each["module"] for each in modules}) == len(modules) == len(CASES)
    assert not any(each["align"] for each in modules)
    for (product, passed), (name, _, _, (block_m, programs)), launch in zip(made * 2, CASES * 2, launches, strict=True):
        (image,) = [
            each for each in compiled
            if (each.target, each.variant.kind, each.variant.bits, each.variant.entry, each.variant.block_m)
            == (90, product["kind"], product["bits"], product["entry"], block_m)
            and (each.variant.floats == "float16") == product["half"]
        ]  # fmt: skip
        assert launch["launch"] == fnv(image.code), name
        assert launch["grid"] == [-(-product["rows"] // image.variant.block_n), programs, 1], name
        assert launch["block"] == [32 * image.variant.warps, 1, 1]
        assert launch["shared"] == image.shared
        assert launch["stream"] == 99
        assert launch["arguments"] == passed, name
    functions = [each["function"] for each in seen if "function" in each]
    assert functions == ["matmul_row" if block_m == 1 else "matmul_tile" for *_, (block_m, _) in CASES]


@pytest.mark.parametrize(
    ("capability", "target"),
    [(80, 80), (86, 86), (87, 86), (89, 89), (90, 90), (100, 100), (103, 0), (120, 120), (121, 0)],
)
def test_the_image_fits_the_processor(cuda_library, compiled, driver, tmp_path, capability, target):
    """Code of the same generation, and PTX where there is none."""
    product, _ = products("MatMul4Bits", (1,), N=24, K=144)
    errors, seen = launched(cuda_library, driver, [product], tmp_path, capability)
    assert errors == [None]
    wanted = [
        fnv(each.code) for each in compiled
        if (each.target, each.variant.kind, each.variant.bits, each.variant.block_m, each.variant.floats)
        == (target, "uniform", 4, 1, "float16")
    ]  # fmt: skip
    assert [each["module"] for each in seen if "module" in each] == wanted


def test_more_rows_than_a_grid_has(cuda_library, driver, tmp_path):
    product, _ = products("MatMul2Bits", (7,), N=24, K=136)
    errors, seen = launched(cuda_library, driver, [product | {"count": 150_000}], tmp_path)
    assert errors == [None]
    launches = [each for each in seen if "launch" in each]
    assert [each["grid"][1] for each in launches] == [65535, 65535, 150_000 - 2 * 65535]
    assert [each["arguments"][8] for each in launches] == [each["grid"][1] for each in launches]
    assert [each["arguments"][0] - product["a"] for each in launches] == [i * 65535 * 136 * 2 for i in range(3)]
    assert [each["arguments"][7] - product["y"] for each in launches] == [i * 65535 * 24 * 2 for i in range(3)]


@pytest.mark.parametrize(
    ("change", "environment", "problem"),
    [
        ({"codes": 4100}, {}, "codes do not begin at a multiple of 16 bytes"),
        ({"columns": 1 << 31}, {}, "K = 2147483648 is more than kernels for CUDA take"),
        ({"entry": 3}, {}, "no kernel for CUDA was built for entries of 3 columns"),
        ({}, {"STUB_CAPABILITY": "75"}, "compute capability 7.5"),
        ({}, {"STUB_FAIL": "cuInit"}, "the CUDA driver does not start: what the stub was told to say"),
        ({}, {"STUB_FAIL": "cuModuleLoadData"}, "loading a kernel: what the stub was told to say (CUDA error 700)"),
        ({}, {"STUB_FAIL": "cuLaunchKernel"}, "launching a kernel: what the stub was told to say (CUDA error 700)"),
    ],
)
def test_what_cannot_be_launched(cuda_library, driver, tmp_path, change, environment, problem):
    product, _ = products("MatMul4Bits", (1,), N=24, K=144)
    capability = environment.get("STUB_CAPABILITY", 90)
    (error,), _ = launched(cuda_library, driver, [product | change], tmp_path, capability, **environment)
    assert problem in error


def test_no_rows_launch_nothing(cuda_library, driver, tmp_path):
    product, _ = products("MatMul4Bits", (1,), N=24, K=144)
    errors, seen = launched(cuda_library, driver, [product | {"count": 0}, product | {"rows": 0}], tmp_path)
    assert errors == [None, None]
    assert seen == []


def test_a_library_with_kernels_for_cuda_runs_on_a_machine_without(cuda_library, tmp_path):
    """Its operators for the CPU run; what is missing is said."""
    from qcompiler.session import OrtRunner

    inputs = make_inputs("MatMul3Bits", (5,))
    with OrtRunner(model_of("MatMul3Bits", inputs, body=False).SerializeToString(), custom_ops=cuda_library) as runner:
        found = runner.run({"A": inputs[0]})["Y"].copy()
    np.testing.assert_allclose(found, reference.run("MatMul3Bits", inputs), rtol=1e-4, atol=1e-4)
    product, _ = products("MatMul4Bits", (1,), N=24, K=144)
    (error,), _ = launched(cuda_library, tmp_path / "libnothing.so", [product], tmp_path)
    assert "no CUDA driver" in error
    assert "libnothing.so" in error


def test_what_a_library_has_for_cuda(library, cuda_library, driver, tmp_path, monkeypatch):
    assert libraries.cuda_targets(library) == ""
    assert libraries.cuda_problem(library) == "no kernels for CUDA were built"
    monkeypatch.setenv("QCOMPILER_CUDA_DRIVER", "/nowhere/libcuda.so")
    assert libraries.cuda_targets(cuda_library) == "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 PTX"
    assert libraries.cuda_problem(cuda_library).startswith("no CUDA driver: /nowhere/libcuda.so")
    (error,), _ = launched(library, driver, [products("MatMul4Bits", (1,), N=24, K=144)[0]], tmp_path)
    assert error.startswith("no kernel for CUDA was built")


def test_registering_beside_a_cuda_provider_says_what_is_missing(library, monkeypatch):
    import onnxruntime

    monkeypatch.setenv(libraries.VARIABLE, str(library))
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.warns(UserWarning, match="no kernels for CUDA were built; .* builds them; operators of ai.qcompiler"):
        kernels.register(onnxruntime.SessionOptions())


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_on_a_gpu(cuda_library, name):
    """Every variant that the sizes and types choose, against the reference."""
    import onnxruntime

    entries = (1, 2, 4) if "Codebook" in name else (1,)
    for entry, dtype, rows, (N, K) in (
        (entry, dtype, rows, size)
        for entry in entries
        for dtype in ("float32", "float16")
        for rows in ((1,), (13,), (2, 70))
        for size in ((96, 512), (67, 136))
    ):
        inputs = make_inputs(name, rows, N=N, K=K, group_size=64, dtype=dtype, entry=entry)
        options = onnxruntime.SessionOptions()
        libraries.register(options, cuda_library)
        model = model_of(name, inputs, body=False).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CUDAExecutionProvider"])
        (found,) = session.run(None, {"A": inputs[0]})
        expected = reference.run(name, inputs).astype(np.float64)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error <= (1e-5 if dtype == "float32" else 2e-3), (entry, dtype, rows, N, K)
