"""How much a model's outputs change when some of its weights do.

The model is cut into pieces that run one after the other. What crosses between them is kept from the float model's run,
so that a change is followed from the piece that reads the changed weight on, and nothing before it is computed again.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.calibration import row_mask
from qcompiler.segments import Segment, chain_parts, segment_model, segment_parts, whole_model
from qcompiler.session import Feeds, OrtRunner
from qcompiler.verify_outputs import Comparison, producers_of_logits

__all__ = ["Sensitivity", "first_tokens"]

# Weights that a piece reads: few enough for little to be computed in vain, many enough to keep sessions few.
_WEIGHTS = 6


def first_tokens(feeds: Feeds, rows: int, tokens: int) -> Feeds:
    """The first rows of a batch, and of token ids ``[B, S]`` the first tokens.

    Args:
        feeds: A batch. Where its inputs do not share their first axis it is left whole.
        rows: Rows to keep.
        tokens: Tokens to keep, where all inputs are integers ``[B, S]`` or empty; the last ones where the first are
            padding.

    Returns:
        Views.
    """
    sizes = {array.shape[0] if array.ndim else 0 for array in feeds.values()}
    if len(sizes) != 1:
        return dict(feeds)
    kept = {name: array[:rows] for name, array in feeds.items()}
    ids = {name: array for name, array in kept.items() if array.ndim == 2 and array.dtype.kind in "iu"}
    if len({array.shape for array in ids.values()}) != 1 or any(kept[name].size for name in kept if name not in ids):
        return kept
    mask = row_mask(kept)
    first = mask is None or bool(mask[:, :tokens].any(1).all())
    return kept | {name: array[:, :tokens] if first else array[:, -tokens:] for name, array in ids.items()}


class Sensitivity:
    """A float model whose weights can be replaced for a run; runs may go on in several threads at once.

    Attributes:
        weights: Names of the weights that can be replaced.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Feeds], *, provider: str) -> None:
        """Run the model as it is.

        Args:
            model: In topological order; it is not changed.
            feeds: What to run it on; its outputs, and what crosses between its pieces, are kept.
            provider: Execution provider.
        """
        self._pieces = _pieces(model)
        self._runners: list[OrtRunner | None] = []  # None for a piece that nothing reads
        self._reads: list[frozenset[str]] = []
        self._outputs = [value.name or "" for value in model.graph.outputs]
        self._boundaries: list[list[Feeds]] = []
        for one in feeds:
            boundary, kept = dict(one), []
            for index in range(len(self._pieces)):
                if index == len(self._runners):
                    self._add_runner(model, self._pieces[index], boundary, provider)
                kept.append(boundary)
                boundary = self._advance(index, boundary, {})
            self._boundaries.append([*kept, boundary])
        self.weights = frozenset().union(*self._reads)
        self._producers = _producers(model)
        self._masks = [row_mask(one) for one in feeds]

    def change(self, weights: Mapping[str, np.ndarray], threads: int = 1) -> float:
        """What replacing weights, each in the shape and dtype it is stored in, changes.

        Args:
            weights: By name; those that cannot be replaced are left alone.
            threads: Feeds that are run at the same time.

        Returns:
            The mean KL divergence of the logits in nats; without logits the energy of the noise of the worst output
            over that of the output.
        """
        comparison = Comparison("with replaced weights", self._producers, threads)
        start = next((at for at, reads in enumerate(self._reads) if not reads.isdisjoint(weights)), len(self._pieces))

        def run(number: int) -> Feeds:
            boundary = self._boundaries[number][start]
            for index in range(start, len(self._pieces)):
                boundary = self._advance(index, boundary, weights)
            return {name: boundary[name] for name in self._outputs}

        with ThreadPoolExecutor(threads) as pool:
            for number, found in enumerate(pool.map(run, range(len(self._boundaries)))):
                wanted = {name: self._boundaries[number][-1][name] for name in self._outputs}
                comparison.add(wanted, found, self._masks[number])
        closeness = comparison.closeness()
        if closeness.kl is not None:
            return max(closeness.kl, 0.0)
        return 10 ** (-closeness.sqnr_db / 10) if closeness.sqnr_db is not None else 0.0

    def _add_runner(self, model: ir.Model, piece: Segment, boundary: Feeds, provider: str) -> None:
        if not piece.outputs:
            self._runners.append(None)
            self._reads.append(frozenset())
            return
        proto, constants = segment_model(model, piece, {name: boundary[name].dtype for name in piece.inputs})
        # Without an arena, since each session would keep the memory of its largest run for itself.
        self._runners.append(
            OrtRunner(proto, provider=provider, threads=1, prepack=False, arena=False, constants=constants)
        )
        self._reads.append(frozenset(constants))

    def _advance(self, index: int, boundary: Feeds, weights: Mapping[str, np.ndarray]) -> Feeds:
        """The boundary behind a piece."""
        piece, runner = self._pieces[index], self._runners[index]
        carried = {name: boundary[name] for name in piece.carried}
        if runner is None:
            return carried
        given = {name: boundary[name] for name in piece.inputs}
        given.update((name, array) for name, array in weights.items() if name in self._reads[index])
        return carried | runner.run(given, piece.outputs)


def _pieces(model: ir.Model) -> list[Segment]:
    """The model cut before every `_WEIGHTS`-th large constant that a matrix product reads."""
    parts: list[list[ir.Node]] = [[]]
    count = 0
    for node in model.graph:
        reads = node.op_type in ("MatMul", "Gemm", "Conv") and any(
            value is not None and _is_weight(value) for value in node.inputs[1:2]
        )
        if reads and count == _WEIGHTS:
            parts.append([])
            count = 0
        count += reads
        parts[-1].append(node)
    return chain_parts(model, parts, [value.name or "" for value in model.graph.outputs])


def _is_weight(value: ir.Value) -> bool:
    """Whether a value is constant, or follows from a constant alone."""
    while value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type != "Transpose" or producer.inputs[0] is None:
            return False
        value = producer.inputs[0]
    return True


def _producers(model: ir.Model) -> dict[str, str]:
    """See `producers_of_logits`."""
    proto, fed = segment_parts(model, whole_model(model))
    # To the one who looks for logits, a weight that is fed is a constant.
    proto.graph.initializer.extend(onnx.TensorProto(name=value.name) for value in fed)
    return producers_of_logits(proto.graph)
