"""How much a model's outputs change when some of its weights do."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.calibration import row_mask
from qcompiler.segments import Segment, segment_model
from qcompiler.session import Feeds, OrtRunner
from qcompiler.verify_outputs import Comparison, producers_of_logits

__all__ = ["Sensitivity", "first_rows"]


def first_rows(feeds: Feeds, rows: int) -> Feeds:
    """The first rows of a batch; all of it where its inputs do not share their first axis."""
    sizes = {array.shape[0] if array.ndim else 0 for array in feeds.values()}
    return {name: array[:rows] for name, array in feeds.items()} if len(sizes) == 1 else dict(feeds)


class Sensitivity:
    """A float model whose weights can be replaced for a run.

    Attributes:
        weights: Names of the weights that can be replaced.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Feeds], *, provider: str, threads: int) -> None:
        """Run the model as it is.

        Args:
            model: In topological order; it is not changed.
            feeds: What to run it on; its outputs are kept.
            provider: Execution provider.
            threads: Threads of the session; 0 takes all cores.
        """
        dtypes = {name: array.dtype for name, array in feeds[0].items()}
        outputs = [value.name or "" for value in model.graph.outputs]
        whole = Segment(nodes=list(model.graph), inputs=list(dtypes), outputs=outputs)
        proto, constants = segment_model(model, whole, dtypes)
        self.weights = frozenset(constants)
        self._threads = threads
        self._producers = producers_of_logits(onnx.load_model_from_string(proto).graph)
        self._runner = OrtRunner(proto, provider=provider, threads=threads, prepack=False, constants=constants)
        self._feeds = [dict(one) for one in feeds]
        self._wanted = [{name: array.copy() for name, array in self._runner.run(one).items()} for one in feeds]

    def change(self, weights: Mapping[str, np.ndarray]) -> float:
        """What replacing weights, each in the shape and dtype it is stored in, changes.

        Returns:
            The mean KL divergence of the logits in nats; without logits the energy of the noise of the worst output
            over that of the output.
        """
        comparison = Comparison("with replaced weights", self._producers, max(self._threads, 1))
        for feeds, wanted in zip(self._feeds, self._wanted, strict=True):
            comparison.add(wanted, self._runner.run({**feeds, **weights}), row_mask(feeds))
        closeness = comparison.closeness()
        if closeness.kl is not None:
            return max(closeness.kl, 0.0)
        return 10 ** (-closeness.sqnr_db / 10) if closeness.sqnr_db is not None else 0.0
