"""ONNX graphs and segments run by PyTorch, differentiable with respect to every float tensor in them.

Needs the extra `torch`. What runs is the standard's meaning of each operator, one small function per operator, so that
a learned rounding or a trained parameter can stand in the place of any constant and receives its gradient.
"""

from qcompiler.errors import KernelError

try:
    import torch  # noqa: F401  the first import of this package says what is missing
except ImportError as error:
    raise KernelError(
        "running a graph in PyTorch needs the package torch, which cannot be imported; "
        "pip install 'onnx-qcompiler[torch]'"
    ) from error

from qcompiler.torch_graph.executor import TorchGraph, unsupported
from qcompiler.torch_graph.registry import supported_ops

__all__ = ["TorchGraph", "supported_ops", "unsupported"]
