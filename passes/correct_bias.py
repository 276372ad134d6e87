"""Bias correction: take out of every output channel the mean of the error that its quantized weights make.

Nagel et al. 2019, arXiv:1906.04721, section 4.2: Q x + b differs from W x + b by (Q - W) x, so adding (W - Q) E[x] to b
makes the mean output error zero. E[x] is the mean over calibration rows and positions, without padding tokens.

1. Gemm and Conv: their own bias, which is made where there was none. For a Conv E[x] is taken for every kernel offset
   over what it meets, zeros of the border included, so that stride, padding, dilation and groups are exact.
2. MatMul: the constant Add behind it where that is its only reader. With `insert=true` an Add is made elsewhere.

Activations are measured on the model as it is now, where the sites before are quantized: that is what a site will read.
The corrections themselves move the means of what comes later a little; `rounds` measures again with them in place.

Left alone, with a record that says why: lookup tables, sites in bodies of control flow, MatMul without a bias, computed
biases. A bias that others read too is untied first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.convolution import Geometry, tap_sums
from qcompiler.errors import CalibrationError
from qcompiler.graph import Site, constant_array, original_weight, weight_error
from qcompiler.layers import bias_place, constant_add, is_constant, store_constant
from qcompiler.passes.base import WEIGHTS, QuantPass, QuantPassResult, Stage, scheme_text, watch
from qcompiler.records import SiteRecord
from qcompiler.sites import find_sites

__all__ = ["CorrectBias", "mean_error"]


@dataclass(frozen=True)
class Options:
    """Options of `correct_bias`."""

    insert: bool = field(default=False, metadata={"help": "add a bias behind a MatMul that has none"})
    rounds: int = field(default=1, metadata={"help": "how often to measure, each time with the biases of the last"})


class CorrectBias(QuantPass):
    """Corrects the biases of quantized sites."""

    name = "correct_bias"
    stage = Stage.QUANTIZE
    after = (WEIGHTS,)
    paper = "Nagel et al. 2019, arXiv:1906.04721"
    needs_calibration = True
    Options = Options

    def call(self, model: ir.Model) -> QuantPassResult:
        """Measure what the quantized sites read, and correct them."""
        sites = [site for site in find_sites(model)[0] if site.quantized is not None]
        problems = {site: _problem(site, insert=self.options.insert) for site in sites}
        chosen = [site for site in sites if not problems[site]]
        if chosen and not len(self.context.batches):
            raise CalibrationError("correct_bias needs calibration data; give --calibration PATH, or drop correct_bias")
        totals: dict[Site, np.ndarray] = {}
        figures: dict[Site, dict[str, float]] = {}
        biases: dict[Site, tuple[ir.Node, int]] = {}
        for _ in range(max(1, self.options.rounds) if chosen else 0):
            for site, means in self._measure(model, chosen).items():
                shift, figures[site] = _correction(site, means)
                step = shift - totals.get(site, 0)
                if not step.any():
                    continue
                if site not in biases:
                    biases[site] = bias_place(site, self.name)
                _add(*biases[site], step, site)
                totals[site] = shift
        for site in chosen:
            # Adding the same again would be wrong, and a float weight in memory is not needed any more.
            if site.quantized is not None:
                site.quantized.meta.pop("original", None)
        records = []
        for site in sites:
            problem = problems[site] or ("" if site in totals else "its mean output error is zero")
            if problem:
                records.append(SiteRecord(site.name, "skipped", reason=f"bias not corrected: {problem}"))
            else:
                records.append(SiteRecord(site.name, "quantized", scheme_text(site), "bias corrected", figures[site]))
        return QuantPassResult(model, bool(totals), tuple(records))

    def _measure(self, model: ir.Model, sites: Sequence[Site]) -> dict[Site, np.ndarray]:
        """E[x] of each site, float64 [C, taps]; sites that read the same activation alike share a collector."""
        collectors: dict[tuple[ir.Value, Geometry | None], _Means] = {}
        of_site = {}
        for site in sites:
            geometry = Geometry.of(site.node) if site.node.op_type == "Conv" else None
            of_site[site] = collectors.setdefault((site.input, geometry), _Means(geometry))
        watched: dict[ir.Value, list[_Means]] = {}
        for (value, _), collector in collectors.items():
            watched.setdefault(value, []).append(collector)
        watch(self.context, self.name, model, watched)
        return {site: collector.means for site, collector in of_site.items()}


def mean_error(error: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Apply a weight's error to the mean input: ``(W - Q) E[x]``.

    Args:
        error: ``[N, K]``; with g groups K is C / g channels times the taps.
        means: float64 ``[C, taps]``.

    Returns:
        float64 ``[N]``.
    """
    rows, (channels, taps) = len(error), means.shape
    groups = channels * taps // error.shape[1]
    grouped = error.astype(np.float64).reshape(groups, rows // groups, -1)  # [g, N / g, K]
    return np.asarray(np.einsum("gnk,gk->gn", grouped, means.reshape(groups, -1)).reshape(rows))


class _Means:
    """Collects E[x] for a convolution, which is shown whole images, or for a linear layer without a geometry."""

    def __init__(self, geometry: Geometry | None) -> None:
        self.whole = geometry is not None
        self._geometry = geometry
        self._sums, self._count = np.zeros(()), 0

    def part(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        if self._geometry is not None:
            return tap_sums(values, self._geometry)
        rows = values.reshape(-1, values.shape[-1])  # [T, K]
        return rows.sum(axis=0, dtype=np.float64)[:, None], len(rows)

    def add(self, part: tuple[np.ndarray, int]) -> None:
        self._sums = self._sums + part[0]
        self._count += part[1]

    @property
    def means(self) -> np.ndarray:
        """float64 [C, taps], taps being 1 for a linear layer."""
        return self._sums / max(1, self._count)


def _correction(site: Site, means: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """What the bias has to gain, float64 [N], and how large it is."""
    shift, output = mean_error(weight_error(site), means), mean_error(original_weight(site), means)
    size, whole = (float(np.linalg.norm(vector)) for vector in (shift, output))
    figures = {"mean_error": size / math.sqrt(site.rows), "relative_mean_error": size / whole if whole else 0.0}
    return shift, figures


def _problem(site: Site, *, insert: bool) -> str:
    """Why a quantized site is not corrected, or nothing."""
    node = site.node
    if site.nested:
        return f"inside the body of {site.nested}, where nothing is measured"
    if site.role == "embedding":
        return "a lookup table has no bias"
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return f"{node.op_type} is not among MatMul, Gemm and Conv"
    if site.quantized is None or "original" not in site.quantized.meta:
        return "its float weight is gone, or it was corrected before"
    if site.input.const_value is not None:
        return "it reads a constant"
    if node.op_type == "MatMul":
        missing = constant_add(node) is None and not insert
        return "no constant Add is the only reader of its result; insert=true makes one" if missing else ""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return "" if bias is None or is_constant(bias) else "its bias is computed"


def _add(node: ir.Node, index: int, shift: np.ndarray, site: Site) -> None:
    """Add [N] to a node's constant; what others read too, or the caller gets, stays as it is for them."""
    old = node.inputs[index] if index < len(node.inputs) else None
    stored = np.zeros(1, site.dtype.numpy()) if old is None else constant_array(old)
    array = (stored.astype(np.float64) + shift).astype(stored.dtype)
    store_constant(node, index, array, site.name)
