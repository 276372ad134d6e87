"""What is measured at each output of a model: figures that fit what the output is.

- *logits*: floats ``[..., V]`` of rank 2 or 3 that are named so, or have at least 100 classes V and end in a matrix
  product or a bias: KL divergence, top-1 agreement and SQNR.
- *probabilities*: the same that end in a softmax over V, of any number of classes.
- *cache*: the ``present`` keys and values of a decoder, all of them together: the worst SQNR.
- *values*: other floats: SQNR and the largest absolute error.
- *exact*: anything else: the fraction that is equal.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from qcompiler.errors import KernelError, PassError
from qcompiler.numerics.metrics import ErrorSums, error_sums, logits_divergence

__all__ = ["Closeness", "Comparison", "OutputMetrics", "producers_of_logits"]

_FEWEST_CLASSES = 100
# How far the sum of float16 probabilities may be from 1.
_ROUNDING = 0.01
_LOGITS, _PROBABILITIES, _CACHE, _VALUES, _EXACT = "logits", "probabilities", "cache", "values", "exact"
_LINEAR = {"MatMul", "Gemm", "MatMulNBits", "MatMulInteger", "QLinearMatMul", "Softmax", "LogSoftmax"}
_CLASSES = (_LOGITS, _PROBABILITIES)
_TRANSPARENT = {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Slice", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class Closeness:
    """How close a model is to the float model, its worst output counting.

    Attributes:
        sqnr_db: Signal to quantization noise ratio in dB; infinite if all floats are equal, None if there are none.
        kl: Mean KL divergence of the logits in nats; None without logits.
        top1: Fraction of positions whose largest logit is at the same place; None without logits.
    """

    sqnr_db: float | None = None
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class OutputMetrics:
    """The figures of one output (or of all outputs of the key-value cache), over all rows.

    Attributes:
        name: Its name.
        kind: ``logits``, ``probabilities``, ``cache``, ``values`` or ``exact``.
        positions: Compared positions (logits, probabilities) or elements.
        sqnr_db: For floats.
        kl: For logits and probabilities: mean, nats.
        kl_worst: For those: the largest of a position, nats.
        top1: For those.
        max_abs_error: For floats.
        equal: For everything but floats: fraction of equal elements.
    """

    name: str
    kind: str
    positions: int
    sqnr_db: float | None = None
    kl: float | None = None
    kl_worst: float | None = None
    top1: float | None = None
    max_abs_error: float | None = None
    equal: float | None = None


@dataclass
class _Sums:
    """What has been added up for one output."""

    kind: str
    errors: ErrorSums = field(default_factory=ErrorSums)
    elements: int = 0
    equal: int = 0
    positions: int = 0
    kl: float = 0.0
    kl_worst: float = 0.0
    same: int = 0

    def metrics(self, name: str) -> OutputMetrics:
        """The figures."""
        if self.kind == _EXACT:
            equal = self.equal / self.elements if self.elements else 1.0
            return OutputMetrics(name, _EXACT, self.elements, equal=equal)
        sqnr, largest = self.errors.sqnr_db, self.errors.largest
        if self.kind not in _CLASSES or not self.positions:
            return OutputMetrics(name, self.kind, self.elements, sqnr, max_abs_error=largest)
        kl, top1 = self.kl / self.positions, self.same / self.positions
        return OutputMetrics(name, self.kind, self.positions, sqnr, kl, self.kl_worst, top1, largest)


class Comparison:
    """Adds up the differences between two models, row by row; nothing of a row is kept."""

    def __init__(self, where: str, producers: Mapping[str, str], threads: int = 1) -> None:
        """Start with nothing.

        Args:
            where: What messages begin with: which model was run how.
            producers: See `producers_of_logits`.
            threads: Threads to compare with; the result does not depend on it.
        """
        self._where = where
        self._producers = producers
        self._threads = threads
        self._sums: dict[str, _Sums] = {}

    def add(
        self, reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], mask: np.ndarray | None
    ) -> None:
        """Compare one row.

        Args:
            reference: Outputs of the float model.
            other: Outputs of the compiled model.
            mask: bool ``[B, S]``, False for padding, which is not compared; None compares everything.

        Raises:
            PassError: An output is missing, or of another shape.
            KernelError: An output holds NaN or infinity where the float model's does not.
        """
        for name, expected in reference.items():
            if name not in other:
                raise PassError(f"{self._where}: the output '{name}' of the float model is missing")
            found = other[name]
            if found.shape != expected.shape:
                shapes = f"{list(found.shape)}, but the float model's is {list(expected.shape)}"
                raise PassError(f"{self._where}: the shape of output '{name}' is {shapes}")
            sums = self._sums.setdefault(name, _Sums(_kind(name, expected, self._producers.get(name, ""))))
            self._add_one(name, sums, expected, found, mask)

    def _add_one(
        self, name: str, sums: _Sums, expected: np.ndarray, found: np.ndarray, mask: np.ndarray | None
    ) -> None:
        classes = sums.kind in _CLASSES
        leading, rows = expected.ndim - 1 if classes else 0, None
        if mask is not None and expected.ndim - classes >= 2 and expected.shape[:2] == mask.shape:
            leading, rows = 2, np.flatnonzero(mask)
        width = math.prod(expected.shape[leading:])
        count = math.prod(expected.shape[:leading])
        expected, found = expected.reshape(count, width), found.reshape(count, width)
        sums.elements += width * (count if rows is None else len(rows))
        if sums.kind == _EXACT:
            same = expected == found if rows is None else expected[rows] == found[rows]
            sums.equal += int(np.count_nonzero(same))
            return
        errors = error_sums(expected, found, rows, self._threads)
        if errors.lost:
            raise KernelError(
                f"{self._where}: output '{name}' holds {errors.lost} values that are NaN or infinite where the float "
                "model's are finite; leave sites float with --ignore, or take more bits"
            )
        sums.errors += errors
        if classes:
            shares = sums.kind == _PROBABILITIES
            kl, same = logits_divergence(expected, found, rows, self._threads, probabilities=shares)
            defined = np.isfinite(kl)
            kl = kl[defined]
            sums.positions += len(kl)
            sums.kl += math.fsum(kl)
            sums.kl_worst = max(sums.kl_worst, float(kl.max(initial=0.0)))
            sums.same += int(np.count_nonzero(same[defined]))

    def outputs(self) -> tuple[OutputMetrics, ...]:
        """The figures so far: outputs in their order, those of the cache as one line at the end."""
        found = [sums.metrics(name) for name, sums in self._sums.items() if sums.kind != _CACHE]
        caches = [sums for sums in self._sums.values() if sums.kind == _CACHE]
        if caches:
            worst = min(sums.errors.sqnr_db for sums in caches)
            largest = max(sums.errors.largest for sums in caches)
            elements = sum(sums.elements for sums in caches)
            name = f"present* ({len(caches)} outputs)"
            found.append(OutputMetrics(name, _CACHE, elements, worst, max_abs_error=largest))
        return tuple(found)

    def closeness(self) -> Closeness:
        """The worst of every figure."""
        found = self.outputs()
        return Closeness(
            min((metrics.sqnr_db for metrics in found if metrics.sqnr_db is not None), default=None),
            max((metrics.kl for metrics in found if metrics.kl is not None), default=None),
            min((metrics.top1 for metrics in found if metrics.top1 is not None), default=None),
        )

    def remarks(self) -> list[str]:
        """What is odd about the reference itself."""
        return [
            f"{sums.errors.undefined} values of the float model's output '{name}' are NaN or infinite and were left out"
            for name, sums in self._sums.items()
            if sums.errors.undefined
        ]


def _kind(name: str, array: np.ndarray, producer: str) -> str:
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        return _EXACT
    if name.lower().startswith("present"):
        return _CACHE
    if array.ndim not in (2, 3) or array.shape[-1] < 2:
        return _VALUES
    if producer == "Softmax":
        totals = array.sum(-1, dtype=np.float32)
        return _PROBABILITIES if bool((np.abs(totals - 1) < _ROUNDING).all()) else _VALUES
    many = producer != "" and array.shape[-1] >= _FEWEST_CLASSES
    return _LOGITS if many or "logits" in name.lower() else _VALUES


def producers_of_logits(graph: onnx.GraphProto) -> dict[str, str]:
    """Graph outputs that end as a classifier's last layer does, with the operator that computes them.

    That is a matrix product or a softmax, then a bias or nothing. Hidden states and embeddings end in normalizations
    and sums instead, or say so in their name.
    """
    made_by = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    constants.update(output for node in graph.node if node.op_type == "Constant" for output in node.output)
    found = {}
    for output in graph.output:
        node = made_by.get(output.name)
        while node is not None:
            varying = [name for name in node.input if name and name not in constants]
            if node.op_type in _LINEAR:
                if not any(word in output.name.lower() for word in ("embed", "hidden", "feature", "pool")):
                    found[output.name] = node.op_type
                break
            if node.op_type not in _TRANSPARENT and not (node.op_type == "Add" and len(varying) == 1):
                break
            node = made_by.get(varying[0]) if varying else None
    return found
