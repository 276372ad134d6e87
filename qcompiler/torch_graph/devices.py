"""Where PyTorch computes: what to do about tensors that lie elsewhere, such as shapes and small constants."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qcompiler.errors import SchemeError

__all__ = ["CPU", "OneDevice", "computing_on", "find_device"]

CPU = torch.device("cpu")


class OneDevice(TorchFunctionMode):  # type: ignore[misc]
    """While it is entered, functions that are given tensors of a device and of the CPU get them all on the device.

    Shapes, axes and the like stay on the CPU, where functions read them, until they meet what was computed. What is
    changed in place stays where it is, and so does what chooses among values of the device, which PyTorch allows.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with a device that is not the CPU."""
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function."""
        kwargs = dict(kwargs or {})
        if self._mixed((*args, *kwargs.values())):
            kept = self._kept(getattr(function, "__name__", ""), args)
            args = *args[:kept], *(self._moved(each) for each in args[kept:])
            kwargs = {name: value if name == "out" else self._moved(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    def _kept(self, name: str, args: tuple[Any, ...]) -> int:
        """How many of the first arguments of a function stay where they are."""
        if name == "__getitem__" and args[0].device.type == self._device.type:
            return len(args)
        changes = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
        return int(changes)

    def _mixed(self, values: Iterable[Any]) -> bool:
        """Whether some tensors are on the device, and others are not."""
        places = {each.device.type for each in _tensors(values)}
        return self._device.type in places and len(places) > 1

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._device) if value.device.type != self._device.type else value
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(self._moved(each) for each in value)
        return value


def computing_on(device: torch.device) -> AbstractContextManager[Any]:
    """`OneDevice` for a device, and nothing for the CPU."""
    return nullcontext() if device == CPU else OneDevice(device)


def find_device(name: str, provider: str = "") -> torch.device:
    """The device of a name, or with "auto" that on which the provider of ONNX Runtime computes.

    Raises:
        SchemeError: There is no such device.
    """
    wanted = name
    if name == "auto":
        wanted = "cuda" if provider == "CUDAExecutionProvider" and torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SchemeError(
            "device=cuda: PyTorch finds no CUDA device here; install torch with CUDA on a machine that has one, "
            "or take device=cpu"
        )
    return torch.device(wanted)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
