"""Store the key-value cache of GroupQueryAttention as int8 codes, or as int4 codes, two in a byte.

1. What the operator writes to its cache, keys after rotary embedding and values, is measured on the calibration data
   with the weights that are quantized by now. Scales are those of the largest magnitude at 8 bits, and of the least
   squared error at 4 bits, for each channel of each head, or one for keys and one for values of a layer.
2. The operator gets the scales as inputs and encodes what is new itself. Caches become int8, or uint8 with half the
   head size, on their way in and out.

ONNX Runtime has one width for both, so that keys have as many bits as values. Left float, with the reason: an operator
inside a control-flow body, without a cache, with one that is quantized already, or with one that is read, or made, by
another operator of the graph.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.collectors import ChannelRange, RowSample
from qcompiler.config import CompileConfig
from qcompiler.errors import CalibrationError, NumericsError, SchemeError
from qcompiler.graph import PASS_KEY, walk
from qcompiler.lowering import add_constant
from qcompiler.numerics.affine import WeightSpec, clip_grid, dequantize, min_max_grid, quantize
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.base import WEIGHTS, QuantPass, QuantPassResult, Stage, watch
from qcompiler.records import SiteRecord

__all__ = ["QuantizeKvCache"]

_OPERATOR = "GroupQueryAttention"
_PAST, _PRESENT, _SCALES = (3, 4), (1, 2), (12, 13)
_GRANULARITIES = {"channel": "PER_CHANNEL", "tensor": "PER_TENSOR"}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Options:
    """Options of `quantize_kv_cache`."""

    granularity: str = field(default="channel", metadata={"help": "what shares a scale: channel or tensor"})
    batches: int = field(default=16, metadata={"help": "calibration batches to measure on, evenly spaced; 0 takes all"})


class QuantizeKvCache(QuantPass):
    """Gives every GroupQueryAttention a quantized cache."""

    name = "quantize_kv_cache"
    stage = Stage.QUANTIZE
    # Last, since afterwards the model no longer takes the caches that calibration data has.
    after = (WEIGHTS, "correct_bias", "insert_qdq", "insert_dynamic", "absorb_scales")
    needs_calibration = True
    paper = "Hooper et al. 2024, arXiv:2401.18079 (keys by channel)"
    Options = Options

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where a quantized cache is asked for."""
        return config.kv_cache != "float"

    def call(self, model: ir.Model) -> QuantPassResult:
        """Measure all caches in one sweep, then quantize them."""
        if self.context.config.kv_cache == "float":
            raise SchemeError(f"{self.name} has no format to quantize to; give --kv-cache kv8 or kv4")
        if self.options.granularity not in _GRANULARITIES:
            known = ", ".join(_GRANULARITIES)
            raise SchemeError(f"{self.name}: granularity {self.options.granularity} is unknown; choose one of {known}")
        records, nodes = [], []
        for node, nested in walk(model.graph):
            if node.op_type == _OPERATOR and node.domain == "com.microsoft":
                reason = f"inside the body of {nested}, where nothing can be measured" if nested else _problem(node)
                if reason:
                    records.append(SiteRecord(node.name or _OPERATOR, "skipped", reason=reason))
                else:
                    nodes.append(node)
        if not nodes and not records:
            reason = f"no {_OPERATOR}, the operator that has a quantized cache; onnxruntime-genai's builder makes it"
            records.append(SiteRecord("key-value cache", "skipped", reason=reason))
        seen = self._measured(model, nodes)
        records += [self._quantize(model.graph, node, seen) for node in nodes]
        return QuantPassResult(model, bool(nodes), tuple(records))

    def _measured(self, model: ir.Model, nodes: list[ir.Node]) -> "dict[ir.Value, _Heads]":
        seen = {node.outputs[index]: _Heads() for node in nodes for index in _PRESENT}
        if not seen:
            return seen
        batches, wanted = self.context.batches, self.options.batches
        if not len(batches):
            raise CalibrationError(
                "a quantized key-value cache needs calibration data for its scales; give --calibration PATH"
            )
        if 0 < wanted < len(batches):
            batches = [batches[index * len(batches) // wanted] for index in range(wanted)]
        watch(self.context, self.name, model, {value: [collector] for value, collector in seen.items()}, batches)
        return seen

    def _quantize(self, graph: ir.Graph, node: ir.Node, seen: "dict[ir.Value, _Heads]") -> SiteRecord:
        bits = int(self.context.config.kv_cache.removeprefix("kv"))
        node.resize_inputs(max(len(node.inputs), max(_SCALES) + 1))
        metrics = {}
        for what, past, present, place in zip(("key", "value"), _PAST, _PRESENT, _SCALES, strict=True):
            value = node.outputs[present]
            try:
                scale, quality = seen[value].scales(bits, self.options.granularity)
            except NumericsError as error:
                raise NumericsError(f"{self.name}: '{value.name}': {error}") from error
            node.replace_input_with(place, add_constant(graph, f"{value.name}_scale", scale))
            metrics[f"{what}_sqnr_db"] = quality
            for cache in (node.inputs[past], value):
                assert cache is not None
                _retype(cache, bits, seen[value].size)
            kind = _GRANULARITIES[self.options.granularity]
            node.attributes[f"{what[0]}_quant_type"] = ir.AttrString(f"{what[0]}_quant_type", kind)
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", bits)
        node.metadata_props[PASS_KEY] = self.name
        spec = f"kv{bits}-{self.options.granularity}"
        return SiteRecord(node.name or _OPERATOR, "quantized", spec, metrics=metrics)


def _problem(node: ir.Node) -> str:
    """Why the operator's cache cannot be quantized; empty if it can."""
    if len(node.outputs) <= max(_PRESENT) or len(node.inputs) <= max(_PAST):
        return "it has no cache"
    for index in _PAST:
        past = node.inputs[index]
        if past is None:
            return "it has no cache"
        if past.dtype not in _FLOATS:
            return "its cache is quantized already"
        if not past.is_graph_input() or len(list(past.uses())) != 1:
            return f"its cache '{past.name}' is not an input of the model that it alone reads"
    for index in _PRESENT:
        present = node.outputs[index]
        readers = [user.op_type for user in present.consumers()]
        if readers or not present.is_graph_output():
            return f"its cache '{present.name}' is read by {readers[0]}" if readers else "nothing takes its cache"
    return ""


def _retype(cache: ir.Value, bits: int, size: int) -> None:
    """Declare a cache [B, H, T, D] as codes."""
    cache.type = ir.TensorType(ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8)
    if cache.shape is not None:
        last = cache.shape[3] if bits == 8 else size // 2
        cache.shape = ir.Shape([*list(cache.shape)[:3], last])


class _Heads:
    """Largest magnitudes and a sample of a cache [B, H, T, D], with H * D channels.

    Attributes:
        whole: It is shown all of the cache: T is not the number of tokens where there is a past.
        heads: H.
        size: D.
    """

    whole = True

    def __init__(self) -> None:
        self.heads = self.size = 0
        self._range, self._sample = ChannelRange(), RowSample()

    def part(self, values: np.ndarray) -> tuple[tuple[int, ...], object, np.ndarray] | None:
        """A batch's share."""
        if not values.size:
            return None
        rows = values.transpose(0, 2, 1, 3).reshape(-1, values.shape[1] * values.shape[3]).astype(np.float32)
        return values.shape, self._range.part(rows), self._sample.part(rows)

    def add(self, part: tuple[tuple[int, ...], tuple[np.ndarray, np.ndarray] | None, np.ndarray] | None) -> None:
        """Add a batch's share."""
        if part is not None:
            self.heads, self.size = part[0][1], part[0][3]
            self._range.add(part[1])
            self._sample.add(part[2])

    def scales(self, bits: int, granularity: str) -> tuple[np.ndarray, float]:
        """Scales float32 [1, H, 1, D], or [1] for all channels, and the SQNR of the sample in dB."""
        if not self.size:
            raise CalibrationError("no calibration row reaches the key-value cache; give rows of tokens")
        largest = self._range.absmax
        if not np.isfinite(largest).all():
            raise NumericsError("the cache holds NaN or infinity on the calibration data; check the data")
        sample = self._sample.values.T  # [H * D, T]
        channels = len(sample)
        if granularity == "tensor":
            largest, sample = largest.max(keepdims=True), sample.reshape(1, -1)
        # With the largest values of all the data among them, the full range is that of all the data.
        sample = np.concatenate([sample, largest[:, None]], 1)
        spec = WeightSpec(bits, sample.shape[1], symmetric=True, signed_scale=False)
        grid = clip_grid(sample, spec) if bits == 4 else min_max_grid(sample, spec)
        codes = quantize(sample, grid, spec)
        quality = sqnr_db(sample, dequantize(codes, grid.scale, grid.zero_point, spec.group_size))
        scale = grid.scale[:, 0]
        return (scale.reshape(1, self.heads, 1, self.size) if len(scale) == channels else scale), quality
