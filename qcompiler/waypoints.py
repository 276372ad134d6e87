"""Waypoints: what calibration data have become on their way through a model, by the hash of what it follows from.

A value at a boundary (see `segments`) is known by the hash of the segment that computes it, of the weights and values
of other boundaries that it depends on, and so on back to the calibration data. Whatever is computed from such a value
can be stored under a key that is made of its hash; what has changed upstream has another one, and nothing else has.
Nothing has to be run to know the hashes: where everything that follows from a boundary is stored, the data never get
there.

The newest boundary is stored too, so that data that do have to get somewhere need not come all the way. It takes the
disk space of the activations that cross it, for all batches, and twice that while it is replaced; one that would take
more than a quarter of the free space is not stored.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.checkpoints import Arrays, Checkpoints, Pace, code_version, digest_of
from qcompiler.quantized import QuantizedTensor
from qcompiler.segments import Segment, Weights, lent, read_values, segment_parts
from qcompiler.session import Feeds

__all__ = ["Waypoints", "tensor_digest"]

logger = logging.getLogger(__name__)

# Seconds of work between two stored boundaries.
_PATIENCE = 20.0


def tensor_digest(tensor: ir.TensorProtocol) -> str:
    """The hash of a constant; of a quantized one, of its codes and grid."""
    if isinstance(tensor, QuantizedTensor):
        zero, how = tensor.zero_point, (tensor.spec, tensor.columns, tensor.layout, tensor.dtype.name)
        return digest_of("codes", how, tensor.packed, tensor.scale, "symmetric" if zero is None else zero)
    return digest_of(tensor.dtype.name, np.asarray(tensor.numpy()))


class Waypoints:
    """The boundaries that streams of the same calibration data come past, one stream for each set of weights.

    Without a folder of checkpoints there are no hashes, all digests are empty, and nothing is stored.
    """

    def __init__(
        self, store: Checkpoints | None, model: ir.Model, batches: Sequence[Feeds], provider: str, streams: int
    ) -> None:
        """Begin at the model's inputs; `provider` is the execution provider that runs the segments."""
        self._store, self._model = store, model
        self._places: list[str] = []
        self._stored = ""
        self._pace = Pace(_PATIENCE)
        self._values: list[dict[str, str]] = []
        if store is not None:
            # One by one, since a batch is made when it is asked for.
            data = [digest_of(sorted(feeds.items())) for feeds in batches]
            root = digest_of(code_version(), provider, data)
            self._values = [{name: digest_of(root, name) for name in batches[0]} for _ in range(streams)]

    def values(self, names: Sequence[str], *parts: object) -> str:
        """The hash of some values of the boundary in all streams, and of whatever else; empty without a folder."""
        if self._store is None:
            return ""
        return digest_of([[stream.get(name) for name in names] for stream in self._values], *parts)

    def segment(self, segment: Segment, weights: Sequence[Weights | None], *parts: object) -> str:
        """The hash of what a segment computes in all streams, and of whatever else; empty without a folder."""
        if self._store is None:
            return ""
        made = [self._made(segment, lends, at) for at, lends in enumerate(weights) if lends is not None]
        return digest_of([list(values.items()) for values in made], *parts)

    def leave(self, segment: Segment, weights: Sequence[Weights | None]) -> str:
        """Go past a segment.

        Args:
            segment: The segment.
            weights: What its nodes read in each stream; None for a stream that stays where it is.

        Returns:
            The key of the boundary behind it; empty without a folder.
        """
        if self._store is None:
            return ""
        for at, lends in enumerate(weights):
            if lends is not None:
                made, before = self._made(segment, lends, at), self._values[at]
                self._values[at] = {**{name: before[name] for name in segment.carried if name in before}, **made}
        self._places.append(digest_of("boundary", [sorted(values.items()) for values in self._values]))
        return self._places[-1]

    def _made(self, segment: Segment, weights: Weights, stream: int) -> dict[str, str]:
        """The hashes of a segment's outputs in one stream.

        Each is made of all nodes, since the runtime may join any of them, but only of those constants and inputs that
        the output depends on.
        """
        with lent(weights):
            proto, fed = segment_parts(self._model, segment)
            tensors = [(value.name or "", value.const_value) for value in fed]
            known = {name: tensor_digest(tensor) for name, tensor in tensors if tensor is not None}
        known.update({name: self._values[stream].get(name, "") for name in segment.inputs})
        sources: dict[str, set[str]] = {}
        for node in segment.nodes:
            names = [value.name or "" for value in read_values(node)]
            found = {source for name in names for source in sources.get(name, {name} & known.keys())}
            sources.update((output.name or "", found) for output in node.outputs)
        nodes = digest_of(proto.SerializeToString(deterministic=True))
        return {
            name: digest_of(nodes, name, [(source, known[source]) for source in sorted(sources[name])])
            for name in segment.outputs
        }

    def resume(self, places: Sequence[str]) -> tuple[int, list[list[Feeds]]]:
        """The last of some boundaries that is stored.

        Returns:
            How many of `places` lie behind it, and it: for each stream the feeds of each batch. (0, []) if none is.
        """
        if self._store is None:
            return 0, []
        for behind in range(len(places), 0, -1):
            found = self._store.get(places[behind - 1])
            if found is not None:
                logger.info("going on from a stored boundary, %d of %d segments on", behind, len(places))
                self._stored = places[behind - 1]
                return behind, _unpacked(found)
        return 0, []

    def offer(self, place: str, streams: Sequence[Sequence[Feeds]]) -> None:
        """Store the boundary at a place in the place of the one before, if it is time."""
        if self._store is None or not self._pace.due:
            return
        began = time.monotonic()
        arrays = _packed(streams)
        size = sum(array.nbytes for array in arrays.values())
        if any(array.dtype.hasobject for array in arrays.values()) or not self._store.has_room_for(size):
            logger.info("a boundary of %.1f MB is not stored", size / 1e6)
        else:
            self._store.put(place, arrays)
            if self._stored and self._stored != place:
                self._store.drop(self._stored)
            self._stored = place
        self._pace.stored(began)

    def close(self) -> None:
        """Forget all boundaries, now that everything that follows from them is stored."""
        if self._store is not None:
            for place in self._places:
                self._store.drop(place)


def _packed(streams: Sequence[Sequence[Feeds]]) -> Arrays:
    """Boundaries as one dictionary; what is the same array in several of them is there once."""
    arrays: Arrays = {}
    seen: dict[int, str] = {}
    index: list[list[dict[str, str]]] = []
    for stream in streams:
        index.append([])
        for feeds in stream:
            index[-1].append({})
            for name, array in feeds.items():
                if id(array) not in seen:
                    seen[id(array)] = str(len(seen))
                    arrays[seen[id(array)]] = array
                index[-1][-1][name] = seen[id(array)]
    arrays["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    return arrays


def _unpacked(arrays: Mapping[str, np.ndarray]) -> list[list[Feeds]]:
    """The reverse of `_packed`."""
    index = json.loads(arrays["index"].tobytes())
    return [[{name: arrays[number] for name, number in feeds.items()} for feeds in stream] for stream in index]
