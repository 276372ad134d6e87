"""OrtRunner: ONNX Runtime sessions as the compiler needs them."""

import ctypes
import functools
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qcompiler.errors import KernelError
from qcompiler.kernels.library import library_path, register
from qcompiler.kernels.schemas import DOMAIN
from qcompiler.runtime import preload_cuda, require_onnxruntime

__all__ = [
    "Executed",
    "Feeds",
    "InputSpec",
    "OrtRunner",
    "adapter_bytes",
    "cpu_threads",
    "operators_of",
    "saturates",
    "single_threaded_blas",
]

Feeds = dict[str, np.ndarray]
_KERNEL_EVENT = "_kernel_time"
# numpy has it from ml_dtypes, which ONNX Runtime does not know, as onnx.TensorProto numbers it.
_BFLOAT16, _BFLOAT16_TYPE = "bfloat16", 16
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


def adapter_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The file that ONNX Runtime's LoraAdapter loads, of the inputs that it gives a model."""
    ort = require_onnxruntime()
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        path = Path(folder) / "adapter"
        made = ort.AdapterFormat()
        made.set_adapter_version(1)
        made.set_model_version(1)
        values = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        made.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in values.items()})
        made.export_adapter(str(path))
        return path.read_bytes()


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime adds pairs of 8-bit products in 16 bits here, as on x86 processors without VNNI."""
    import onnx

    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", kinds.UINT8, [1, 64])]
    outputs = [helper.make_tensor_value_info("y", kinds.INT32, [1, 16])]
    weights = [onnx.numpy_helper.from_array(np.full((64, 16), 127, np.int8), "w")]
    model = helper.make_model(
        helper.make_graph(nodes, "probe", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    with OrtRunner(model.SerializeToString(), threads=1) as runner:
        found = runner.run({"x": np.full((1, 64), 255, np.uint8)})["y"]
    return bool((found != 64 * 255 * 127).any())


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Keep numpy's matrix products on the calling thread.

    The compiler runs independent pieces in threads of its own: that scales better than threads inside one product,
    which wait for one another (and spin) on a busy machine, and it makes results independent of the number of threads.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def operators_of(opset_imports: Iterable[Any]) -> Path | None:
    """The library of our operators, if a model with these imports (of a ModelProto) has any and it is built."""
    return library_path() if any(each.domain == DOMAIN for each in opset_imports) else None


class Executed(NamedTuple):
    """A node that ran: its name, its operator after all of ONNX Runtime's rewriting, and the provider it ran on."""

    name: str
    op_type: str
    provider: str


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
        arena: bool = True,
        constants: Mapping[str, np.ndarray] | None = None,
        folder: Path | None = None,
        record: bool = False,
        optimized: Path | None = None,
        fuse_qdq: bool = True,
        custom_ops: Path | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: Serialized bytes or a path (external data is found beside it).
            provider: Execution provider; asking for one that is not there is an error, never a silent fall back.
            threads: Intra-op threads; 0 takes all cores.
            optimize: Graph optimizations on or off.
            prepack: Keep a packed copy of constant weights: faster, but a second copy of the float weights in memory.
            arena: Keep memory that one run has freed for the next one.
            constants: Weights that are graph inputs of `model`, fed with every run.
            folder: Where the external data of serialized bytes lies.
            record: Note which nodes run, for `executed`.
            optimized: Write the graph as it is after all optimizations here, its larger constants beside it.
            fuse_qdq: Whether encoders and decoders may become parts of integer kernels.
            custom_ops: The library of our operators; without it their bodies run.

        Raises:
            KernelError: ONNX Runtime refuses the model, or has no such provider.
        """
        onnxruntime = require_onnxruntime()
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise KernelError(f"provider {provider} is not in this ONNX Runtime; it has {', '.join(available)}")
        preload_cuda(provider)
        options = _options(threads, optimize, prepack, arena, fuse_qdq, custom_ops)
        self._record = tempfile.TemporaryDirectory(prefix="qcompiler-", ignore_cleanup_errors=True) if record else None
        _set_files(options, folder, optimized, self._record.name if self._record is not None else None)
        source = str(model) if isinstance(model, Path) else model
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=[provider])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types
            self.close()
            where = f"'{Path(model).name}'" if not isinstance(model, bytes) else "a part of the model"
            how = f"on {provider} with optimizations {'on' if optimize else 'off'}"
            raise KernelError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {where} {how}: {_first_line(error)}"
            ) from error
        if provider not in self._session.get_providers():
            raise KernelError(
                f"provider {provider} could not be started (its libraries are missing?); try another --provider"
            )
        self._constants = {name: _to_ort(array) for name, array in (constants or {}).items()}
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
        """Run once.

        Args:
            feeds: Every input that is not a constant.
            outputs: Names of what is wanted; everything by default.

        Returns:
            The outputs. They lie in the session's memory, which lives as long as any of them: copy what you keep.

        Raises:
            KernelError: ONNX Runtime cannot run the model on these feeds.
        """
        names = self.outputs if outputs is None else outputs
        values = self._constants | {name: _to_ort(array) for name, array in feeds.items()}
        try:
            results = self._session.run_with_ort_values(names, values)
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types
            raise KernelError(f"ONNX Runtime cannot run the model: {_first_line(error)}") from error
        return {name: _from_ort(value) for name, value in zip(names, results, strict=True)}

    def executed(self) -> list[Executed]:
        """The distinct nodes that have run so far, where `record` was asked for; recording ends here."""
        path = Path(self._session.end_profiling())
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        path.unlink()
        found: dict[tuple[str, str], Executed] = {}
        for event in events:
            name, arguments = event.get("name", ""), event.get("args", {})
            if event.get("cat") == "Node" and name.endswith(_KERNEL_EVENT):
                node = Executed(
                    name.removesuffix(_KERNEL_EVENT), arguments.get("op_name", ""), arguments.get("provider", "")
                )
                found.setdefault((node.name, str(arguments.get("node_index"))), node)
        return list(found.values())

    def close(self) -> None:
        """Free the session and its record."""
        self.__dict__.pop("_session", None)
        if self._record is not None:
            self._record.cleanup()

    def __enter__(self) -> "OrtRunner":
        """Use as a context manager: leaving it frees the session."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the session."""
        self.close()


def _options(threads: int, optimize: bool, prepack: bool, arena: bool, fuse_qdq: bool, custom_ops: Path | None) -> Any:
    """ONNX Runtime's session options that every session here has."""
    onnxruntime = require_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = cpu_threads(threads)
    # Idle threads that spin would take the cores from numpy between two runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not fuse_qdq:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.enable_cpu_mem_arena = arena
    if custom_ops is not None:
        register(options, custom_ops)
    return options


def _set_files(options: Any, folder: Path | None, optimized: Path | None, record: str | None) -> None:
    """Say where external data lies, where the optimized graph goes, and in which folder to note what runs."""
    if record is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(record) / "run")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        data_file = f"{optimized.name}.data"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data_file)


def _to_ort(array: np.ndarray) -> Any:
    """An OrtValue in the array's memory, which it keeps alive, or in that of a usable copy."""
    values = require_onnxruntime().OrtValue
    if array.dtype.name != _BFLOAT16:
        return values.ortvalue_from_numpy(_usable(array))
    return values.ortvalue_from_numpy_with_onnx_type(_usable(array), _BFLOAT16_TYPE)


def _from_ort(value: Any) -> np.ndarray:
    """The array of an OrtValue in main memory, whose memory it keeps alive; of bfloat16 ONNX Runtime makes none."""
    if value.data_type() != f"tensor({_BFLOAT16})":
        return np.asarray(value.numpy())
    import ml_dtypes

    shape = value.shape()
    memory = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    memory.owner = value
    array: np.ndarray = np.frombuffer(memory, ml_dtypes.bfloat16).reshape(shape)
    return array


def _usable(array: np.ndarray) -> np.ndarray:
    """The array, or a copy where ONNX Runtime could not read it in place: mapped data may begin at any byte."""
    return np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))


def _first_line(error: Exception) -> str:
    """The message's first line without ONNX Runtime's source positions."""
    return str(error).strip().splitlines()[0][:400] if str(error).strip() else type(error).__name__
