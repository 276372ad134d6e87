"""What watches the passes run: time, memory, size, legality, dumps and progress.

An instrument sees every pass before and after it runs, and when it fails; it never changes the model.
"""

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir

from qcompiler.legality import check_legal, lowered_nodes

if TYPE_CHECKING:
    from qcompiler.passes.base import QuantPass, QuantPassResult

__all__ = ["Dump", "Instrument", "Legality", "MemoryMeter", "SizeDelta", "Timing", "anonymous_bytes"]

logger = logging.getLogger(__name__)


class Instrument(Protocol):
    """The three moments an instrument sees."""

    def before_pass(self, step: "QuantPass", model: ir.Model) -> None:
        """A pass is about to run."""

    def after_pass(self, step: "QuantPass", model: ir.Model, result: "QuantPassResult") -> None:
        """A pass has run."""

    def pass_failed(self, step: "QuantPass", model: ir.Model, error: Exception) -> None:
        """A pass has raised."""


class _Watcher:
    """An instrument that sees nothing, to be overridden."""

    def before_pass(self, step: "QuantPass", model: ir.Model) -> None:
        """Nothing."""

    def after_pass(self, step: "QuantPass", model: ir.Model, result: "QuantPassResult") -> None:
        """Nothing."""

    def pass_failed(self, step: "QuantPass", model: ir.Model, error: Exception) -> None:
        """Nothing."""


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process: what it holds beyond mapped files.

    Where the system does not tell it apart (outside Linux), the peak resident size, mapped files included.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MemoryMeter:
    """Samples anonymous memory in a thread; `lap` gives the peak since the last lap."""

    def __init__(self, interval: float = 0.02) -> None:
        """Sample every `interval` seconds."""
        self._interval = interval
        self._stop = threading.Event()
        self._peak = 0
        self.peak_bytes = 0
        self._thread = threading.Thread(target=self._run, name="memory-meter", daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        now = anonymous_bytes()
        self._peak = max(self._peak, now)
        self.peak_bytes = max(self.peak_bytes, now)

    def lap(self) -> int:
        """Peak bytes since the last lap (or the start)."""
        self._sample()
        peak, self._peak = self._peak, 0
        return peak

    def __enter__(self) -> "MemoryMeter":
        """Start sampling."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self._sample()
        self._stop.set()
        self._thread.join()


class Timing(_Watcher):
    """Wall-clock seconds of each pass, in order of running."""

    def __init__(self) -> None:
        """Start with no passes."""
        self.seconds: dict[str, float] = {}
        self._start = 0.0

    def before_pass(self, step: "QuantPass", model: ir.Model) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def after_pass(self, step: "QuantPass", model: ir.Model, result: "QuantPassResult") -> None:
        """Stop the clock."""
        self.seconds[step.name] = time.perf_counter() - self._start
        logger.info("%s: %.2f s, %d records", step.name, self.seconds[step.name], len(result.records))


class SizeDelta(_Watcher):
    """Bytes of all initializers before and after each pass, as they would be stored."""

    def __init__(self) -> None:
        """Start with no passes."""
        self.deltas: dict[str, int] = {}
        self._before = 0

    def before_pass(self, step: "QuantPass", model: ir.Model) -> None:
        """Weigh the model."""
        self._before = stored_bytes(model)

    def after_pass(self, step: "QuantPass", model: ir.Model, result: "QuantPassResult") -> None:
        """Weigh it again."""
        self.deltas[step.name] = stored_bytes(model) - self._before


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all constants; a quantized weight counts as its codes, scales and zero points."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        tensors += [a.as_tensor() for a in node.attributes.values() if a.type == ir.AttributeType.TENSOR]
    # A lazily built tensor may be listed twice, and two may be views of the same bytes; they are stored once.
    once = {_place(tensor): tensor for tensor in tensors if tensor is not None}
    return sum(int(getattr(tensor, "stored_bytes", tensor.nbytes)) for tensor in once.values())


def _place(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    """Where a tensor's bytes are."""
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset, tensor.nbytes
    if isinstance(tensor, ir.Tensor) and isinstance(tensor.raw, np.ndarray):
        return tensor.raw.ctypes.data, tensor.nbytes
    return (id(tensor),)


class Legality(_Watcher):
    """Checks after each pass that the model is what its stage allows."""

    def __init__(self) -> None:
        """Start with no passes."""
        self._given: set[ir.Node] | None = None

    def before_pass(self, step: "QuantPass", model: ir.Model) -> None:
        """Note what was lowered before the first pass."""
        if self._given is None:
            self._given = lowered_nodes(model)

    def after_pass(self, step: "QuantPass", model: ir.Model, result: "QuantPassResult") -> None:
        """Raise PassError if the pass left an illegal model."""
        check_legal(model, step.stage, step.name, self._given or ())


class Dump(_Watcher):
    """Writes the model after each pass to ``FOLDER/NN-pass.onnx``."""

    def __init__(self, folder: Path) -> None:
        """Create `folder` if need be."""
        self._folder = folder
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def after_pass(self, step: "QuantPass", model: ir.Model, result: "QuantPassResult") -> None:
        """Write it."""
        from qcompiler.files.saver import save_model

        save_model(model, self._folder / f"{self._count:02d}-{step.name}.onnx", force=True)
        self._count += 1
