"""Blocks: levels joined up to where little crosses, and two streams of calibration data that go through them.

A level (see `segments`) is as short as a quantized weight. What changes many weights at once wants longer pieces, cut
where the boundary is small: between the layers of a transformer that is the residual stream. The *float* stream is what
the original weights compute, the *quantized* stream what the weights at hand compute.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qcompiler.calibration import row_mask
from qcompiler.graph import Site
from qcompiler.quantized import QuantizedTensor
from qcompiler.readings import in_flight
from qcompiler.scratch import Scratch
from qcompiler.segments import Segment, Weights, constants_of, lent, plan_segments, read_values, segment_model
from qcompiler.session import Feeds, OrtRunner
from qcompiler.waypoints import Waypoints

__all__ = [
    "TwoStreams",
    "answer_block",
    "float_weights",
    "join_levels",
    "learned_outputs",
    "measure_sizes",
    "plan_blocks",
    "single_rows",
    "split_rows",
]

# A boundary counts as narrow up to this many times the narrowest that is near.
_NARROW = 1.25
# Levels in which a narrow place is looked for.
_NEAR = 8


def plan_blocks(model: ir.Model, sites: Sequence[Site], feeds: Feeds, provider: str, narrow: int = 2) -> list[Segment]:
    """Cut the part of the model that the sites depend on into blocks.

    Args:
        model: In topological order.
        sites: Linear and convolution sites of the top graph, whether they are to be quantized or not.
        feeds: One batch, which tells how large each activation is.
        provider: Execution provider.
        narrow: Narrow places to go to in one step: 2 takes attention and MLP together.

    Returns:
        Blocks in order; the first ends before the first site. A node may be part of two, where repeating it costs
        less than keeping what it computes.
    """
    levels = plan_segments(model, sites)
    return join_levels(model, levels, measure_sizes(model, levels, feeds, provider), narrow)


def measure_sizes(model: ir.Model, levels: Sequence[Segment], feeds: Feeds, provider: str) -> dict[str, int]:
    """Bytes of every value that crosses between levels, found by running one batch."""
    boundary = dict(feeds)
    sizes = {name: array.nbytes for name, array in boundary.items()}
    for level in levels:
        made = _run(_runner(model, level, boundary, provider), level, boundary)
        boundary = {**{name: boundary[name] for name in level.carried}, **made}
        sizes.update((name, array.nbytes) for name, array in made.items())
    return sizes


def join_levels(model: ir.Model, levels: Sequence[Segment], sizes: Mapping[str, int], narrow: int) -> list[Segment]:
    """Join levels into blocks that end at the `narrow`-th narrow place after the one before."""
    values = {value.name or "": value for node in model.graph for value in node.outputs}
    place = {name: index for index, name in enumerate(values)}
    fixed = {site.node for level in levels for site in level.sites}
    boundaries = [_needed([*level.carried, *level.outputs], values, place, fixed) for level in levels[:-1]]
    widths = [sum(sizes[name] for name in names) for names in boundaries]
    ends = [0] if len(levels) > 1 else []
    while ends and ends[-1] < len(levels) - 1:
        near = range(ends[-1] + 1, min(ends[-1] + 1 + _NEAR, len(levels) - 1))
        least = min((widths[index] for index in near), default=0)
        found = [index for index in near if widths[index] <= _NARROW * least]
        last = len(levels) - 1
        ends.append(found[narrow - 1] if len(found) >= narrow else last if last - ends[-1] <= _NEAR else found[-1])
    ends = ends or [len(levels) - 1]
    before = [value.name or "" for value in model.graph.inputs if value.const_value is None]
    blocks: list[Segment] = []
    start = 0
    for end in ends:
        final = end == len(levels) - 1
        sites = [site for level in levels[start : end + 1] for site in level.sites]
        wanted = [site.node.outputs[0].name or "" for site in levels[end].sites] if final else boundaries[end]
        blocks.append(_block(model, sites, before, wanted, final=final))
        before, start = wanted, end + 1
    return blocks


def _needed(
    names: Sequence[str], values: Mapping[str, ir.Value], place: Mapping[str, int], fixed: set[ir.Node]
) -> list[str]:
    """A boundary without the values that follow from the rest of it without any site."""
    kept = set(names)
    for name in sorted(names, key=lambda name: place.get(name, -1), reverse=True):
        if name in values and _follows(values[name], kept - {name}, fixed):
            kept.discard(name)
    return [name for name in names if name in kept]


def _follows(value: ir.Value, given: set[str], fixed: set[ir.Node]) -> bool:
    """Whether a value can be computed from those given without running a site."""
    waiting, seen = [value], {value}
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in fixed:
            return False
        for read in read_values(node):
            if read.const_value is None and read.name not in given and read not in seen:
                seen.add(read)
                waiting.append(read)
    return True


def _block(model: ir.Model, sites: list[Site], before: list[str], wanted: list[str], *, final: bool) -> Segment:
    """What has to run to get from one boundary to the next."""
    given = set(before)
    outputs = [name for name in wanted if name not in given]
    needed: set[str] = set(outputs)
    nodes: list[ir.Node] = []
    for node in reversed(model.graph):
        if any(output.name in needed for output in node.outputs):
            nodes.append(node)
            for value in read_values(node):
                if value.const_value is None and value.name and value.name not in given:
                    needed.add(value.name)
    nodes.reverse()
    made = {output.name for node in nodes for output in node.outputs}
    reads = dict.fromkeys(v.name for node in nodes for v in read_values(node) if v.const_value is None and v.name)
    return Segment(
        sites=sites,
        nodes=nodes,
        inputs=[name for name in reads if name not in made],
        outputs=outputs,
        carried=[] if final else [name for name in wanted if name in given],
    )


def answer_block(model: ir.Model, blocks: Sequence[Segment]) -> Segment:
    """The last of the blocks, continued to what the model returns of it; it may read the model's inputs as well."""
    last = blocks[-1]
    reached = {output for site in last.sites for output in site.node.outputs}
    for node in model.graph:
        if any(value in reached for value in read_values(node)):
            reached.update(node.outputs)
    wanted = [value.name or "" for value in model.graph.outputs if value in reached]
    given = [value.name or "" for value in model.graph.inputs if value.const_value is None]
    before = [*blocks[-2].outputs, *blocks[-2].carried] if len(blocks) > 1 else []
    return _block(model, last.sites, [*before, *given], wanted, final=True) if wanted else last


def learned_outputs(block: Segment, sites: Sequence[Site]) -> list[str]:
    """The outputs of a block that depend on the weights of some of its sites."""
    reached = {output for site in sites for output in site.node.outputs}
    for node in block.nodes:
        if any(value in reached for value in read_values(node)):
            reached.update(node.outputs)
    names = {value.name for value in reached}
    return [name for name in block.outputs if name in names]


def split_rows(feeds: Feeds) -> list[Feeds]:
    """A batch row by row, where all inputs have as many rows; else as it is."""
    counts = {array.shape[0] if array.ndim else 0 for array in feeds.values()}
    if len(counts) != 1 or not (count := counts.pop()):
        return [dict(feeds)]
    return [{name: array[row : row + 1] for name, array in feeds.items()} for row in range(count)]


def single_rows(batches: Sequence[Feeds]) -> list[Feeds]:
    """Batches of token ids [B, S] and what goes with them, row by row; others as they are."""
    single: list[Feeds] = []
    for feeds in batches:
        tokens = all(array.ndim == 2 and np.issubdtype(array.dtype, np.integer) for array in feeds.values())
        alike = tokens and len({array.shape for array in feeds.values()}) == 1
        single += split_rows(feeds) if alike else [dict(feeds)]
    return single


@contextmanager
def float_weights(nodes: Sequence[ir.Node]) -> Iterator[None]:
    """Give the quantized weights that the nodes read their original values for a while."""
    with lent(_floats(nodes)):
        yield


def _floats(nodes: Sequence[ir.Node]) -> Weights:
    """The constants that nodes read, the originals of quantized ones."""
    return {
        value: tensor.meta.get("original", tensor) if isinstance(tensor, QuantizedTensor) else tensor
        for value, tensor in constants_of(nodes).items()
    }


class _Step(NamedTuple):
    """A block that streams are to be moved past.

    Attributes:
        block: The block.
        provider: Runs it.
        floats: What it reads in the float stream.
        weights: What it reads in the quantized stream; None where that one stays.
        targets: What it computes in the float stream, if that is known.
        place: The key of the boundary behind it.
    """

    block: Segment
    provider: str
    floats: Weights
    weights: Weights | None
    targets: list[Feeds] | None
    place: str


class TwoStreams:
    """The boundaries of all batches with the original weights, and with those that the model has.

    With `waypoints` they are moved when somebody looks at them, from the last boundary that an interrupted run stored.

    Attributes:
        masks: Of each batch, which rows are real tokens; see `row_mask`.
    """

    def __init__(
        self,
        model: ir.Model,
        batches: Sequence[Feeds],
        scratch: Scratch,
        pool: ThreadPoolExecutor,
        threads: int,
        waypoints: Waypoints | None = None,
    ) -> None:
        """Start at the model's inputs; `threads` batches are in flight in the pool, `waypoints` are of two streams."""
        self._model, self._scratch, self._pool, self._threads = model, scratch, pool, threads
        self._waypoints = waypoints or Waypoints(None, model, batches, "", 2)
        self.masks = [row_mask(feeds) for feeds in batches]
        self._exact: list[Feeds] = [dict(feeds) for feeds in batches]
        self._actual = list(self._exact)
        self._steps: list[_Step] = []
        self._targets: tuple[Segment | None, list[Feeds]] = (None, [])

    @property
    def exact(self) -> list[Feeds]:
        """Boundaries of the float stream."""
        self._arrive()
        return self._exact

    @property
    def actual(self) -> list[Feeds]:
        """Boundaries of the quantized stream; arrays that are the same in both are held once."""
        self._arrive()
        return self._actual

    def targets(self, block: Segment, provider: str) -> list[Feeds]:
        """What the block computes in the float stream, for each batch; kept for `advance` and `follow`."""
        self._arrive()
        with float_weights(block.nodes):
            self._targets = block, self._run(block, self._exact, provider)
        return self._targets[1]

    def digest(self, block: Segment, *parts: object) -> str:
        """The hash of what the block, which is next, computes in both streams, and of whatever else."""
        return self._waypoints.segment(block, [_floats(block.nodes), constants_of(block.nodes)], *parts)

    def advance(self, block: Segment, provider: str) -> None:
        """Move both streams past a block, the quantized one with the weights that the model has now."""
        self._leave(block, provider, constants_of(block.nodes))

    def follow(self, block: Segment, provider: str) -> None:
        """Move the float stream alone past a block."""
        self._leave(block, provider, None)

    def close(self) -> None:
        """Forget the boundaries that are stored."""
        self._waypoints.close()

    def _leave(self, block: Segment, provider: str, weights: Weights | None) -> None:
        of, targets = self._targets
        self._targets = None, []
        floats = _floats(block.nodes)
        place = self._waypoints.leave(block, [floats, weights])
        self._steps.append(_Step(block, provider, floats, weights, targets if of is block else None, place))
        if not place:
            self._arrive()

    def _arrive(self) -> None:
        """Move the streams to where they should be."""
        behind, stored = self._waypoints.resume([step.place for step in self._steps])
        if stored:
            before = self._held()
            self._exact, self._actual = stored
            self._drop(before)
        for step in self._steps[behind:]:
            self._move(step)
            self._waypoints.offer(step.place, (self._exact, self._actual))
        self._steps.clear()

    def _move(self, step: _Step) -> None:
        """Move the streams past a block."""
        block = step.block
        targets = step.targets
        if targets is None:
            with lent(step.floats):
                targets = self._run(block, self._exact, step.provider)
        moves = [(self._exact, targets)]
        if step.weights is not None:
            same = all(self._exact[0][name] is self._actual[0][name] for name in block.inputs)
            same &= all(tensor is step.floats[value] for value, tensor in step.weights.items())
            if same:
                results = targets
            else:
                with lent(step.weights):
                    results = self._run(block, self._actual, step.provider)
            moves.append((self._actual, results))
        before = self._held()
        for stream, computed in moves:
            for batch, made in enumerate(computed):
                stream[batch] = {**{name: stream[batch][name] for name in block.carried}, **made}
        self._drop(before)

    def _drop(self, before: Mapping[int, np.ndarray]) -> None:
        """Forget what neither stream holds any more."""
        after = self._held()
        for key, array in before.items():
            if key not in after:
                self._scratch.drop(array)

    def _held(self) -> dict[int, np.ndarray]:
        return {
            id(array): array for stream in (self._exact, self._actual) for feeds in stream for array in feeds.values()
        }

    def _run(self, block: Segment, boundary: list[Feeds], provider: str) -> list[Feeds]:
        runner = _runner(self._model, block, boundary[0], provider)
        made = in_flight(self._pool, lambda feeds: _run(runner, block, feeds), boundary, self._threads)
        return [{name: self._scratch.keep(array) for name, array in results.items()} for results in made]


def _runner(model: ir.Model, part: Segment, feeds: Feeds, provider: str) -> OrtRunner | None:
    """A session that computes the outputs of a part of the model, or None if it has none."""
    if not part.outputs:
        return None
    proto, constants = segment_model(model, part, {name: feeds[name].dtype for name in part.inputs})
    return OrtRunner(proto, provider=provider, threads=1, prepack=False, constants=constants)


def _run(runner: OrtRunner | None, part: Segment, feeds: Feeds) -> Feeds:
    if runner is None:
        return {}
    results = runner.run({name: feeds[name] for name in part.inputs}, part.outputs)
    # Copied, since a result keeps all memory of the session alive that made it.
    return {name: array.copy() for name, array in results.items()}
