"""How quantization noise grows along a model: each tensor of the compiled model against that of the float model.

Names survive compilation, so a tensor is matched with its namesake. Where the kernel that computes it makes its codes,
the codes are watched, so that watching keeps no kernel from being fused; where every reader encodes it for itself, the
float value is, and the noise of the encoding counts for the reader. What is inside of a kernel (a convolution in front
of the Relu that it absorbs) has no counterpart.

Both models run side by side in chunks (see `observing`); a pair of tensors is reduced to sums as soon as both are
there. Memory depends on the size of a batch, not on the number of batches or tensors.

The noise that a layer adds is the noise of its result without what arrives with its inputs, as a share of the energy of
its result. For a layer that is computed from codes it is measured: the float layer is run on what the compiled one
reads, and does to the noise that arrives what an exact layer does. For others, and next to rescaled tensors, it is
reckoned: shares add up in products, energies in sums, else the largest share counts; it is negative where a layer
weakens noise.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import onnx_ir as ir

from qcompiler.calibration import row_mask
from qcompiler.calibration_inputs import fitted
from qcompiler.graph import constant_array
from qcompiler.numerics.activation import dequantize_activation
from qcompiler.numerics.metrics import ErrorSums, channel_products, error_sums, gain_free_noise
from qcompiler.numerics.rows import split_heads, token_rows
from qcompiler.observing import Chunks
from qcompiler.propagation_graph import Layer, Tap, coded_layers, find_layers, find_taps
from qcompiler.readings import in_flight
from qcompiler.segments import Segment, segment_model
from qcompiler.session import Feeds, InputSpec, OrtRunner

__all__ = ["LayerNoise", "Propagation", "propagate"]

_SUMS = {"Add", "Sub", "Sum"}
_PRODUCTS = {"Div", "Einsum", "MatMul", "Mul"}
# A tensor with more noise than this share, of which scaling its channels leaves no more than the second number, was
# rescaled by a transformation that later layers undo (SmoothQuant, equalization). Of noise that is independent of the
# signal that would leave as little only where there is nine times as much noise as signal.
_MUCH_NOISE, _REMAINDER = 0.1, 0.1
# Attention masks write such numbers, in 32 and in 16 bits; they are no signal.
_HIDDEN, _HIDDEN_HALF = 1e9, 6e4


@dataclass(frozen=True)
class LayerNoise:
    """What a layer does to the signal.

    Attributes:
        name: Of its site, or of the node that computes its result.
        operator: The operator of that node.
        output: The tensor.
        quantized: Whether the compiled model computes it from codes.
        before_db: SQNR of what it reads, in dB; infinite where nothing differs.
        after_db: SQNR of its result.
        added: The noise that it adds, as a share of the energy of its result; measured where it is `quantized`.
        rescaled: Whether the channels have other scales than in the float model, which is not counted as noise.
        site: Whether the name is that of a site, which --ignore takes.
    """

    name: str
    operator: str
    output: str
    quantized: bool
    before_db: float
    after_db: float
    added: float
    rescaled: bool = False
    site: bool = False

    @property
    def drop_db(self) -> float | None:
        """By how much the SQNR falls; None where it was infinite before."""
        if self.before_db == float("inf"):
            return None if self.after_db != float("inf") else 0.0
        return self.before_db - self.after_db


@dataclass(frozen=True)
class Propagation:
    """The layers in graph order.

    Attributes:
        layers: Every matched tensor of floating point.
        matched: Their number.
        tensors: Float tensors that the float model computes.
        rows: Batches that were run.
        synthetic: Whether the rows are made up.
    """

    layers: tuple[LayerNoise, ...]
    matched: int
    tensors: int
    rows: int
    synthetic: bool = False

    def worst(self, count: int, *, sites: bool = False) -> list[LayerNoise]:
        """The quantized layers (or only sites) that add the most noise, worst first; none that adds nothing."""
        found = [layer for layer in self.layers if layer.quantized and layer.added > 0 and (layer.site or not sites)]
        return sorted(found, key=lambda layer: -layer.added)[:count]


def propagate(
    reference: ir.Model,
    model: ir.Model,
    batches: Sequence[Feeds],
    *,
    provider: str = "CPUExecutionProvider",
    threads: int = 1,
    inputs: Sequence[InputSpec] = (),
    tick: Callable[[int, int], None] | None = None,
) -> Propagation:
    """Compare the tensors of two models.

    Args:
        reference: The float model, without local functions and Constant nodes, in topological order.
        model: The model that was compiled from it.
        batches: Feeds of the float model.
        provider: Execution provider.
        threads: Batches in flight; the result does not depend on it.
        inputs: The inputs of the compiled model, where they may be of other types.
        tick: Called with (batches done, batches).

    Returns:
        Figures of each tensor of the top graph that both models have; padding tokens are left out.
    """
    taps = find_taps(reference, model)
    coded = coded_layers(reference, model, taps)
    exact = _ExactLayers(reference, coded, provider)
    pairs = _Pairs(reference, model, taps, provider, inputs)
    sums: dict[str, _Sums] = {name: _Sums() for name in taps}

    def reduce(index: int) -> list[tuple[str, "_Part | None"]]:
        feeds = batches[index]
        mask, parts = row_mask(feeds), []
        for name, one, other, own in exact.run(feeds, pairs.run(feeds)):
            parts.append((name, _part(one, other, own, mask)))
        return parts

    with ThreadPoolExecutor(threads) as pool:
        first = (reduce(0) for _ in range(min(1, len(batches))))
        rest = in_flight(pool, reduce, range(1, len(batches)), threads)
        for done, parts in enumerate(chain(first, rest)):
            for name, part in parts:
                sums[name].add(part)
            if tick is not None:
                tick(done + 1, len(batches))
    other = {name for name, found in sums.items() if found.unfit}
    measured = {name: found for name, found in sums.items() if found.elements and not found.unfit}
    layers, tensors = find_layers(reference, model, taps, set(measured), other)
    return Propagation(tuple(_noises(layers, measured, coded)), len(measured), tensors, len(batches))


# What a batch adds to the sums of a tensor: errors, those to the exact layer's result (None where it was not run),
# products of channels along some axes (none where there is too little noise to ask for other scales), elements.
_Part = tuple[ErrorSums, ErrorSums | None, dict[int, np.ndarray], int]


def _part(reference: np.ndarray, found: np.ndarray, exact: np.ndarray | None, mask: np.ndarray | None) -> _Part | None:
    """None where the tensors cannot be compared: integers, or another shape."""
    if reference.shape != found.shape or not (_is_float(reference) and _is_float(found)):
        return None
    rows, others = (without_padding(array, mask) for array in (reference, found))
    errors = error_sums(rows, others)
    products = {}
    if errors.noise > _MUCH_NOISE * errors.signal and rows.ndim > 1:
        products = {axis: channel_products(rows, others, axis) for axis in ((1, -1) if rows.ndim > 2 else (-1,))}
    own = None
    if exact is not None and exact.shape == found.shape:
        own = error_sums(without_padding(exact, mask), others)
    return errors, own, products, rows.size


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def without_padding(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The values that tell something: no padding tokens, and zero for what an attention mask hides.

    Args:
        values: Any shape.
        mask: bool ``[B, S]``, False where a token is padding, or None.

    Returns:
        What `token_rows` makes of them; attention scores ``[B, H, Q, S]`` have zeros for padding keys.
    """
    heads = split_heads(values, mask)
    if mask is not None and heads.ndim == 4 and heads.shape[:2] != mask.shape:
        values = heads
        if (heads.shape[0], heads.shape[3]) == mask.shape:
            values = np.where(mask[:, None, None, :], heads, 0)
    rows = token_rows(values, mask)
    hidden = np.abs(rows) > rows.dtype.type(_HIDDEN if rows.dtype.itemsize > 2 else _HIDDEN_HALF)
    return np.where(hidden, 0, rows) if hidden.any() else rows


class _Sums:
    """What is known of one tensor over all batches."""

    def __init__(self) -> None:
        self.errors, self.elements, self.unfit = ErrorSums(), 0, False
        self.own: ErrorSums | None = ErrorSums()
        self.products: dict[int, np.ndarray] = {}

    def add(self, part: _Part | None) -> None:
        """Add a batch's share."""
        if part is None:
            self.unfit = True
            return
        errors, own, products, elements = part
        if not self.elements:
            self.products = products
        else:  # channels whose number varies are none
            both = ((self.products[axis], products[axis], axis) for axis in self.products.keys() & products.keys())
            self.products = {axis: mine + more for mine, more, axis in both if mine.shape == more.shape}
        self.errors += errors
        self.own = self.own + own if self.own is not None and own is not None else None
        self.elements += elements

    @property
    def rescaled(self) -> bool:
        """Whether the channels differ by factors, and by little else."""
        noise = self.errors.noise
        return noise > _MUCH_NOISE * self.errors.signal and self._left < _REMAINDER * noise

    @property
    def _left(self) -> float:
        return min((gain_free_noise(products) for products in self.products.values()), default=float("inf"))

    @property
    def noise(self) -> float:
        """Summed squared error."""
        return self._left if self.rescaled else self.errors.noise

    @property
    def share(self) -> float:
        """Noise as a share of the signal."""
        if not self.errors.signal:
            return float("inf") if self.noise else 0.0
        return self.noise / self.errors.signal


class _Pairs:
    """Both models, and the pairs of tensors that they compute."""

    def __init__(
        self,
        reference: ir.Model,
        model: ir.Model,
        taps: Mapping[str, Tap],
        provider: str,
        inputs: Sequence[InputSpec],
    ) -> None:
        values = {output.name: output for node in reference.graph for output in node.outputs}
        self._reference = Chunks(reference, [values[name] for name in taps], provider)
        self._model = Chunks(model, list({tap.value: None for tap in taps.values()}), provider)
        self._names: dict[str, list[str]] = {}
        for name, tap in taps.items():
            self._names.setdefault(tap.value.name or "", []).append(name)
        self._taps, self._inputs = taps, inputs

    def run(self, feeds: Feeds) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, value in the float model, value in the compiled model), as soon as both are computed."""
        left: dict[str, np.ndarray] = {}
        right: dict[str, np.ndarray] = {}
        following = self._model.values(fitted(feeds, self._inputs))
        for name, array in self._reference.values(feeds):
            left[name] = array
            while name not in right:
                more = next(following, None)
                if more is None:
                    break
                right.update((each, self._decoded(each, more[1])) for each in self._names.get(more[0], ()))
            for ready in [each for each in left if each in right]:
                yield ready, left.pop(ready), right.pop(ready)

    def _decoded(self, name: str, array: np.ndarray) -> np.ndarray:
        tap = self._taps[name]
        if tap.scale is None:
            return array
        zero = 0 if tap.zero_point is None else int(constant_array(tap.zero_point))
        return dequantize_activation(array, float(constant_array(tap.scale)), zero)


class _ExactLayers:
    """The float forms of the layers that are computed from codes, run on what the compiled model feeds these."""

    def __init__(self, reference: ir.Model, layers: Mapping[str, Segment], provider: str) -> None:
        self._reference, self._layers, self._provider = reference, layers, provider
        self._readers = Counter(name for layer in layers.values() for name in layer.inputs)
        self._runners: dict[str, OrtRunner] = {}

    def run(
        self, feeds: Feeds, pairs: Iterable[tuple[str, np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
        """The pairs, each with what the exact layer makes of the compiled model's values; None for float layers."""
        held, waiting = dict(feeds), self._readers.copy()
        for name, one, other in pairs:
            if waiting[name]:
                held[name] = other.astype(one.dtype, copy=False)
            layer, exact = self._layers.get(name), None
            if layer is not None:
                inputs = {each: held[each] for each in layer.inputs if each in held}
                if len(inputs) == len(layer.inputs):
                    exact = self._runner(name, layer, inputs).run(inputs, [name])[name]
                for each in layer.inputs:
                    waiting[each] -= 1
                    if not waiting[each]:
                        held.pop(each, None)
            yield name, one, other, exact

    def _runner(self, name: str, layer: Segment, inputs: Feeds) -> OrtRunner:
        if name not in self._runners:
            dtypes = {each: array.dtype for each, array in inputs.items()}
            proto, constants = segment_model(self._reference, layer, dtypes)
            self._runners[name] = OrtRunner(
                proto, provider=self._provider, threads=1, prepack=False, arena=False, constants=constants
            )
        return self._runners[name]


@dataclass
class _Flow:
    """The noise that values carry, by name, as shares of their energy."""

    measured: Mapping[str, _Sums]
    shares: dict[str, float] = field(default_factory=dict)

    def arriving(self, node: ir.Node) -> float:
        """The share of noise that a node's result has if the node itself adds none."""
        names = [v.name for v in node.inputs if v is not None and v.name is not None and v.name in self.shares]
        if not names:
            return 0.0
        shares = [self.shares[name] for name in names]
        known = [self.measured[name] for name in names if name in self.measured]
        result = self.measured.get(node.outputs[0].name or "")
        if node.op_type == "Concat" and len(known) == len(names) and any(each.errors.signal for each in known):
            return sum(each.noise for each in known) / sum(each.errors.signal for each in known)
        if node.op_type in _SUMS and len(known) == len(names) and result is not None and result.errors.signal:
            noise = sum(each.noise / each.elements for each in known)
            return noise * result.elements / result.errors.signal
        return sum(shares) if node.op_type in _PRODUCTS else max(shares)


def _noises(
    layers: Sequence[Layer], measured: Mapping[str, _Sums], coded: Mapping[str, Segment]
) -> Iterator[LayerNoise]:
    flow = _Flow(measured)
    for layer in layers:
        before = flow.arriving(layer.node) if layer.carries_noise else 0.0
        flow.shares.update((output.name or "", before) for output in layer.node.outputs)
        sums = measured.get(layer.output)
        if sums is None:
            continue
        after = flow.shares[layer.output] = sums.share
        added = after - before
        if layer.quantized and sums.own is not None and layer.output in coded and sums.errors.signal:
            values = [layer.output, *coded[layer.output].inputs]
            if not any(measured[name].rescaled for name in values if name in measured):
                added = sums.own.noise / sums.errors.signal
        yield LayerNoise(
            layer.name, layer.operator, layer.output, layer.quantized, _decibel(before), _decibel(after),
            added, sums.rescaled, layer.site,
        )  # fmt: skip


def _decibel(share: float) -> float:
    if not share:
        return float("inf")
    return float(-10 * np.log10(share))
