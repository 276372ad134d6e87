import importlib
import importlib.metadata
import sys
import types

import pytest

from qcompiler import runtime
from qcompiler.errors import KernelError


@pytest.fixture
def pretend(monkeypatch):
    """Pretend that these distributions are installed and that importing onnxruntime gives `module`."""

    def install(distributions, module):
        def version(name):
            if name not in distributions:
                raise importlib.metadata.PackageNotFoundError(name)
            return distributions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setitem(sys.modules, "onnxruntime", module)
        runtime.require_onnxruntime.cache_clear()

    yield install
    runtime.require_onnxruntime.cache_clear()


def working(**names):
    module = types.ModuleType("onnxruntime")
    module.InferenceSession = object
    vars(module).update(names)
    return module


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"])
def test_one_runtime_is_used(pretend, name):
    module = working()
    pretend({name: "1.31.1"}, module)
    assert runtime.require_onnxruntime() is module
    assert runtime.installed_runtimes() == {name: "1.31.1"}


def test_runtime_that_no_distribution_lists_is_used(pretend):
    module = working()  # built from source, say
    pretend({}, module)
    assert runtime.require_onnxruntime() is module


def test_no_runtime_names_both_extras(pretend):
    pretend({}, None)
    with pytest.raises(KernelError, match=r"no ONNX Runtime .*onnx-qcompiler\[cpu\].*onnx-qcompiler\[gpu\]") as caught:
        runtime.require_onnxruntime()
    assert isinstance(caught.value.__cause__, ImportError)


def test_leftover_folder_is_no_runtime(pretend):
    pretend({}, types.ModuleType("onnxruntime"))
    with pytest.raises(KernelError, match="no ONNX Runtime is installed"):
        runtime.require_onnxruntime()


def test_two_runtimes_are_refused_though_they_import(pretend):
    pretend({"onnxruntime-gpu": "1.30.0", "onnxruntime": "1.31.1"}, working())
    with pytest.raises(KernelError) as caught:
        runtime.require_onnxruntime()
    message = str(caught.value)
    assert "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0" in message
    assert message.endswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu")


@pytest.mark.parametrize(("module", "why"), [(None, "import of onnxruntime halted"), ("empty", "its package is empty")])
def test_runtime_broken_by_an_uninstall_says_how_to_mend_it(pretend, module, why):
    pretend({"onnxruntime-gpu": "1.31.1"}, module and types.ModuleType("onnxruntime"))
    with pytest.raises(KernelError, match=why) as caught:
        runtime.require_onnxruntime()
    assert str(caught.value).endswith("pip install --force-reinstall --no-deps onnxruntime-gpu")


@pytest.mark.parametrize(
    ("provider", "available", "loads"),
    [
        ("CPUExecutionProvider", ("CUDAExecutionProvider", "CPUExecutionProvider"), False),
        ("CUDAExecutionProvider", ("CPUExecutionProvider",), False),
        ("CUDAExecutionProvider", ("CUDAExecutionProvider", "CPUExecutionProvider"), True),
    ],
)
def test_cuda_libraries_are_loaded_for_cuda_only_and_keep_stdout_clean(pretend, capsys, provider, available, loads):
    module = working(get_available_providers=lambda: list(available), preload_dlls=lambda: print("libcublas missing"))  # noqa: T201
    pretend({"onnxruntime-gpu": "1.31.1"}, module)
    runtime.preload_cuda(provider)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("libcublas missing" in err) == loads
