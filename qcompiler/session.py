"""OrtRunner: ONNX Runtime sessions as the compiler needs them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.errors import KernelError
from qcompiler.runtime import preload_cuda, require_onnxruntime

__all__ = ["Feeds", "InputSpec", "OrtRunner", "cpu_threads", "single_threaded_blas"]

Feeds = dict[str, np.ndarray]
_NUMPY_OF_ORT = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
    "tensor(bfloat16)": "bfloat16",
}


@dataclass(frozen=True)
class InputSpec:
    """A graph input: its name, numpy dtype name and shape (a name or None marks a dynamic dimension)."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


def cpu_threads(requested: int) -> int:
    """The number of threads to use: `requested`, or every core this process may run on when it is 0."""
    return requested or len(os.sched_getaffinity(0))


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Keep numpy's matrix products on the calling thread.

    The compiler runs independent pieces in threads of its own: that scales better than threads inside one product,
    which wait for one another (and spin) on a busy machine, and it makes results independent of the number of threads.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


class OrtRunner:
    """A session whose large weights may be fed as graph inputs, so that they are neither copied nor packed."""

    def __init__(
        self,
        model: bytes | str | Path,
        *,
        provider: str = "CPUExecutionProvider",
        threads: int = 0,
        optimize: bool = True,
        prepack: bool = True,
        constants: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: Serialized bytes or a path (external data is found beside it).
            provider: Execution provider; asking for one that is not there is an error, never a silent fall back.
            threads: Intra-op threads; 0 takes all cores.
            optimize: Graph optimizations on or off.
            prepack: Keep a packed copy of constant weights: faster, but a second copy of the float weights in memory.
            constants: Weights that are graph inputs of `model`, fed with every run.

        Raises:
            KernelError: ONNX Runtime refuses the model, or has no such provider.
        """
        onnxruntime = require_onnxruntime()
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise KernelError(f"provider {provider} is not in this ONNX Runtime; it has {', '.join(available)}")
        preload_cuda(provider)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = cpu_threads(threads)
        # Idle threads that spin would take the cores from numpy between two runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        source = str(model) if isinstance(model, Path) else model
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=[provider])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types
            where = f"'{model}'" if not isinstance(model, bytes) else "a part of the model"
            raise KernelError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {where}: {_first_line(error)}"
            ) from error
        if provider not in self._session.get_providers():
            raise KernelError(
                f"provider {provider} could not be started (its libraries are missing?); try another --provider"
            )
        self._constants = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(_usable(array)) for name, array in (constants or {}).items()
        }
        self.outputs = [value.name for value in self._session.get_outputs()]

    @property
    def inputs(self) -> list[InputSpec]:
        """The graph inputs that `run` must be fed."""
        return [
            InputSpec(value.name, _NUMPY_OF_ORT.get(value.type, value.type), tuple(value.shape))
            for value in self._session.get_inputs()
            if value.name not in self._constants
        ]

    def run(self, feeds: Mapping[str, np.ndarray], outputs: list[str] | None = None) -> Feeds:
        """Run once; returns the named outputs (all by default)."""
        onnxruntime = require_onnxruntime()
        names = self.outputs if outputs is None else outputs
        values: dict[str, Any] = dict(self._constants)
        for name, array in feeds.items():
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(_usable(array))
        try:
            results = self._session.run_with_ort_values(names, values)
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types
            raise KernelError(f"ONNX Runtime cannot run the model: {_first_line(error)}") from error
        return {name: value.numpy() for name, value in zip(names, results, strict=True)}


def _usable(array: np.ndarray) -> np.ndarray:
    """The array, or a copy where ONNX Runtime could not read it in place: mapped data may begin at any byte."""
    return np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))


def _first_line(error: Exception) -> str:
    """The message's first line without ONNX Runtime's source positions."""
    return str(error).strip().splitlines()[0][:400] if str(error).strip() else type(error).__name__
