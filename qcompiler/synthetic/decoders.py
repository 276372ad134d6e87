"""Ways to run a language model on rows of tokens that grow by one token a call.

- `CachedDecoder`: the graph has a key-value cache. A call runs the new token alone.
- `stepping.SteppedDecoder`: the graph has none, but one could be derived.
- `PlainDecoder`: neither. A call runs the whole row again, so that rows are written in short pieces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.calibration_inputs import ModelInputs, numpy_dtype
from qcompiler.graph import constant_array
from qcompiler.segments import Segment, read_values, segment_parts
from qcompiler.session import Feeds, OrtRunner

__all__ = ["CachedDecoder", "Part", "PlainDecoder", "Sessions", "cache_outputs", "input_dtypes"]

# Tokens up to which a row is run from its beginning for each.
_PIECE = 32
# Rows whose logits of all tokens are held at a time.
_ROWS = 8


@dataclass(frozen=True)
class Sessions:
    """How a model is run: where, by how many threads, and whether a copy of its weights is packed for speed."""

    provider: str
    threads: int
    packed: bool = True


class Part:
    """A session on what some values of a model depend on."""

    def __init__(self, model: ir.Model, outputs: Sequence[str], dtypes: Mapping[str, np.dtype], how: Sessions) -> None:
        """Load it.

        Args:
            model: Without functions, its constants as initializers.
            outputs: Names of the values.
            dtypes: Of values that are fed, inputs of the graph and others, by name.
            how: Where.
        """
        wanted, nodes = set(outputs), []
        for node in reversed(model.graph):
            if any(output.name in wanted and output.name not in dtypes for output in node.outputs):
                nodes.append(node)
                wanted.update(value.name or "" for value in read_values(node))
        self._inputs = [name for name in dtypes if name in wanted]
        segment = Segment(nodes=nodes[::-1], inputs=self._inputs, outputs=list(outputs))
        proto, fed = segment_parts(model, segment)
        for name in self._inputs:
            proto.graph.input.add(name=name).type.tensor_type.elem_type = int(ir.DataType.from_numpy(dtypes[name]))
        folder = _refer(proto, fed) if how.packed else None
        constants = {} if folder else {value.name or "": constant_array(value) for value in fed}
        for name, array in constants.items():
            proto.graph.input.add(name=name).type.tensor_type.elem_type = int(ir.DataType.from_numpy(array.dtype))
        self._runner = OrtRunner(
            proto.SerializeToString(),
            provider=how.provider,
            threads=how.threads,
            prepack=how.packed,
            constants=constants,
            folder=folder,
        )

    def run(self, feeds: Feeds) -> Feeds:
        """The outputs; feeds that nothing reads are left out."""
        return self._runner.run({name: feeds[name] for name in self._inputs})


def _refer(proto: onnx.ModelProto, constants: Sequence[ir.Value]) -> Path | None:
    """Make constants initializers that lie in files of one folder, which is returned; None where they do not.

    A session packs such constants for speed, and computes what hangs on them alone once.
    """
    tensors = [value.const_value for value in constants]
    stored = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    folders = {Path(tensor.base_dir) for tensor in stored}
    if len(folders) != 1 or len(stored) < len(tensors):
        return None
    for value, tensor in zip(constants, stored, strict=True):
        serialized = ir.serde.serialize_tensor(tensor)
        serialized.name = value.name or ""
        proto.graph.initializer.append(serialized)
    return folders.pop()


def cache_outputs(model: ir.Model, inputs: ModelInputs) -> dict[str, str]:
    """The output with the longer cache for each cache that is an input; empty if there is not one for each."""
    caches = [name for name, role in inputs.roles.items() if role == "cache"]
    names = [value.name or "" for value in model.graph.outputs]
    present = {name.partition(".")[2]: name for name in names if name.startswith("present")}
    found = {name: present[name.partition(".")[2]] for name in caches if name.partition(".")[2] in present}
    return found if len(found) == len(caches) else {}


def _token_bytes(inputs: ModelInputs, caches: Mapping[str, str]) -> int:
    """Bytes that a token takes in the cache of a row."""
    total = 0
    for name in caches:
        spec = inputs.specs[name]
        heads, size = spec.shape[1], spec.shape[3] if isinstance(spec.shape[3], int) else inputs.head_size
        total += int(heads or 0) * int(size or 0) * numpy_dtype(spec).itemsize
    return total


class CachedDecoder:
    """A graph with caches among its inputs and outputs."""

    longest: int | None = None

    def __init__(
        self, model: ir.Model, inputs: ModelInputs, logits: str, caches: Mapping[str, str], how: Sessions
    ) -> None:
        """Load the model; `caches` are those of `cache_outputs`."""
        self._inputs, self._logits, self._caches = inputs, logits, dict(caches)
        self.bytes_per_token = _token_bytes(inputs, caches)
        self._part = Part(model, [logits, *caches.values()], input_dtypes(inputs), how)
        self._cache: Feeds = {}

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Run the last token on the cache of the others; see `text.Decoder`."""
        last = ids[:, -1:]
        feeds = self._inputs.complete({_ids(self._inputs): last}, "text")
        for name, role in self._inputs.roles.items():
            if role == "mask":
                feeds[name] = np.ones(ids.shape, feeds[name].dtype)
            elif role == "positions":
                feeds[name] = np.full(last.shape, ids.shape[1] - 1, feeds[name].dtype)
        results = self._part.run({**feeds, **(self._cache if ids.shape[1] > 1 else {})})
        self._cache = {name: results[output] for name, output in self._caches.items()}
        return np.asarray(results[self._logits][:, -1], np.float32)


class PlainDecoder:
    """Any graph from token ids to logits: every call runs rows from their beginning."""

    bytes_per_token = 0

    def __init__(self, model: ir.Model, inputs: ModelInputs, logits: str, how: Sessions) -> None:
        """Load the model."""
        self._inputs, self._logits = inputs, logits
        rows, self._width = inputs.specs[_ids(inputs)].shape
        self._rows = rows if isinstance(rows, int) else _ROWS
        self._fixed = isinstance(rows, int)
        self.longest: int | None = self._width if isinstance(self._width, int) else _PIECE
        self._part = Part(model, [logits], input_dtypes(inputs), how)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Run whole rows; see `text.Decoder`."""
        parts = [self.all_logits(ids[start : start + self._rows])[:, -1] for start in range(0, len(ids), self._rows)]
        return np.concatenate(parts)

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 ``[B, T, V]`` behind every token of a few rows."""
        rows, length = ids.shape
        pad = self._width - length if isinstance(self._width, int) else 0
        # What comes later does not matter.
        fed = np.pad(ids, ((0, self._rows - rows if self._fixed else 0), (0, pad)))
        results = self._part.run(self._inputs.complete({_ids(self._inputs): fed}, "text"))
        return np.asarray(results[self._logits][:rows, :length], np.float32)


def _ids(inputs: ModelInputs) -> str:
    return inputs.need_ids("text that the model writes").name


def input_dtypes(inputs: ModelInputs) -> dict[str, np.dtype]:
    """Numpy dtype of each input."""
    return {name: numpy_dtype(spec) for name, spec in inputs.specs.items()}
