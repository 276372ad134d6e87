"""Sessions on the compiled model that say afterwards which operators were really run, and where."""

import json
import tempfile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from qcompiler.errors import KernelError
from qcompiler.runtime import preload_cuda, require_onnxruntime
from qcompiler.session import OrtRunner, cpu_threads

__all__ = ["Executed", "OutputRunner"]

_KERNEL_EVENT = "_kernel_time"


class Executed(NamedTuple):
    """A node that ran: its name, its operator after all of ONNX Runtime's rewriting, and the provider it ran on."""

    name: str
    op_type: str
    provider: str


class OutputRunner(OrtRunner):
    """A session that records what it runs, from a file or from bytes whose external data lies in a folder.

    A context manager: leaving it frees the session and its record.
    """

    def __init__(
        self,
        model: Path | bytes,
        folder: Path,
        *,
        provider: str,
        threads: int,
        optimize: bool = True,
        prepack: bool = True,
    ) -> None:
        """Load a model.

        Args:
            model: A path, or serialized bytes.
            folder: Where external data lies.
            provider: Execution provider; others but the CPU are not fallen back to.
            threads: Intra-op threads; 0 takes all cores.
            optimize: Graph optimizations on or off.
            prepack: Keep a packed copy of constant weights, and memory that one run has freed for the next one;
                MatMulNBits is many times slower without.

        Raises:
            KernelError: ONNX Runtime refuses the model, or has no such provider.
        """
        onnxruntime = require_onnxruntime()
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise KernelError(f"provider {provider} is not in this ONNX Runtime; it has {', '.join(available)}")
        preload_cuda(provider)
        self._record = tempfile.TemporaryDirectory(prefix="qcompiler-", ignore_cleanup_errors=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = cpu_threads(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._record.name) / "run")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        if not prepack:
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        if isinstance(model, bytes):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        source = model if isinstance(model, bytes) else str(model)
        how = f"on {provider} with optimizations {'on' if optimize else 'off'}"
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=[provider])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types
            self._record.cleanup()
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise KernelError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load the compiled model {how}: {told[0][:400]}"
            ) from error
        if provider not in self._session.get_providers():
            raise KernelError(f"provider {provider} could not be started; are its libraries installed?")
        self._constants = {}
        self.outputs = [value.name for value in self._session.get_outputs()]

    def executed(self) -> list[Executed]:
        """The distinct nodes that have run so far; recording ends here."""
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

    def __enter__(self) -> "OutputRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session
        self._record.cleanup()
