"""What the tests of torch_graph share; torch is imported where it is used, since collecting tests must not need it."""

import numpy as np

from qcompiler.session import OrtRunner
from tests.builders import serialized


def to_torch(array):
    from qcompiler.torch_graph.dtypes import from_numpy

    return from_numpy(np.asarray(array))


def to_numpy(tensor):
    """The tensor as numpy; what numpy has no type of its own for as float32."""
    import torch

    small = tensor.is_floating_point() and (tensor.dtype == torch.bfloat16 or tensor.itemsize == 1)
    return (tensor.detach().float() if small else tensor.detach()).numpy()


def torch_graph(model):
    from qcompiler.torch_graph import TorchGraph

    return TorchGraph.from_model(model)


def run_torch(model, feeds, values=None):
    """The outputs of an onnx_ir model as numpy arrays by name."""
    given = {name: to_torch(array) for name, array in feeds.items()}
    results = torch_graph(model).run(given, {name: to_torch(array) for name, array in (values or {}).items()})
    return {name: to_numpy(tensor) for name, tensor in results.items()}


def run_ort(model, feeds):
    """The outputs by ONNX Runtime, its rewriting of graphs left out, as arrays by name."""
    with OrtRunner(serialized(model), threads=1, optimize=False) as runner:
        return {name: np.array(value) for name, value in runner.run(feeds).items()}


def assert_same(model, feeds, *, tolerance=1e-5, names=None):
    """PyTorch and ONNX Runtime agree in every output: in type, in shape, and in values up to `tolerance`."""
    ours, theirs = run_torch(model, feeds), run_ort(model, feeds)
    for name in names or theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].shape == theirs[name].shape, name
        np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance, err_msg=name)


def relative_error(ours, reference):
    """Norm of the difference over the norm of the reference, in double precision."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)
