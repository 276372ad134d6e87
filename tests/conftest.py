import importlib.util
import logging

import numpy as np
import pytest

from qcompiler.kernels import library as libraries


def _cuda_problem():
    """Why CUDA cannot be used here, or an empty text."""
    from onnx import TensorProto, helper

    from qcompiler.errors import KernelError
    from qcompiler.runtime import preload_cuda, require_onnxruntime

    provider = "CUDAExecutionProvider"
    try:
        onnxruntime = require_onnxruntime()
    except KernelError as error:
        return str(error)
    if provider not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no CUDA provider"
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", value[:1], value[1:])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    preload_cuda(provider)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    return "" if provider in session.get_providers() else "the CUDA provider does not start"


@pytest.fixture(autouse=True)
def no_operators(monkeypatch, tmp_path_factory):
    """Whether the operators happen to be built in this tree does not matter to tests that do not ask for them."""
    monkeypatch.delenv(libraries.VARIABLE, raising=False)
    monkeypatch.setattr(libraries, "PLACE", tmp_path_factory.getbasetemp() / "nothing.so")


# Distribution in the extra `real` -> the module that it brings.
REAL_MODULES = {
    "accelerate": "accelerate", "efficientnet-lite-pytorch": "efficientnet_lite_pytorch", "gguf": "gguf",
    "onnxruntime-genai": "onnxruntime_genai", "onnxscript": "onnxscript", "pillow": "PIL", "tokenizers": "tokenizers",
    "torch": "torch", "transformers": "transformers",
}  # fmt: skip


def _real_problem():
    missing = [name for name, module in REAL_MODULES.items() if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(missing)} (the extra `real`)" if missing else ""


def _torch_problem():
    return "" if importlib.util.find_spec("torch") else "not installed: torch (the extra `torch`)"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests marked `slow`, minutes each")


def pytest_collection_modifyitems(config, items):
    """Skip, with the reason, what this machine cannot run and what was not asked for."""
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
    for marker, find_problem in (("gpu", _cuda_problem), ("real", _real_problem), ("torch", _torch_problem)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        problem = find_problem() if marked else ""
        if problem:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(autouse=True)
def _same_logger():
    """Commands set up the package's logger; every test gets it as it was."""
    logger = logging.getLogger("qcompiler")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def linear_file(tmp_path):
    """model.onnx with one site, fc, whose weight is [64, 24]."""
    from tests.builders import linear_model, serialized

    path = tmp_path / "model.onnx"
    path.write_bytes(serialized(linear_model(64, 24)))
    return path


@pytest.fixture
def decoder_file(tmp_path):
    """decoder.onnx with one layer."""
    from tests.builders import decoder, serialized

    path = tmp_path / "decoder.onnx"
    path.write_bytes(serialized(decoder(layers=1)))
    return path


@pytest.fixture
def token_file(tmp_path):
    """rows.npy with token ids for the decoder."""
    from tests.builders import token_batches

    path = tmp_path / "rows.npy"
    np.save(path, np.concatenate([feeds["input_ids"] for feeds in token_batches(8)]))
    return path
