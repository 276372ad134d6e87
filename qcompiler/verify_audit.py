"""Checks of a compiled model's graph: its scales, and what ONNX Runtime makes of its operators."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from qcompiler.errors import ModelError, PassError
from qcompiler.kernels.schemas import OPERATORS
from qcompiler.session import Executed

__all__ = [
    "attribute",
    "check_scales",
    "constant_bytes",
    "count_operators",
    "fusion_remarks",
    "read_constant",
    "walk",
    "with_exact_compute",
]

_CPU = "CPUExecutionProvider"
# Which input of an operator holds scales.
_SCALES = {
    "DequantizeLinear": 1,
    "GatherBlockQuantized": 2,
    "MatMulNBits": 2,
    "QuantizeLinear": 1,
    **{name: [each.name for each in contract.inputs].index("scales") for name, contract in OPERATORS.items()},
}
_HEAVY = {"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"}
_QUANTIZED = {
    "ConvInteger",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "DynamicQuantizeMatMul",
    "GatherBlockQuantized",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QGemm",
    "QMoE",
    "QuantizeLinear",
    *OPERATORS,
}
_COPIES = {"MemcpyFromHost", "MemcpyToHost"}
_PASSED_THROUGH = {"Cast", "Reshape", "Transpose"}
_READERS = _HEAVY | {"Gather"}
# A remark lists this many nodes.
_LISTED = 3
# Widths whose exact kernel does not exist on the CPU.
_NO_EXACT_KERNEL = (2, 8)
_INT8_LEVEL = 4


def walk(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, onnx.GraphProto]]:
    """Every node with the graph that holds it, bodies included."""
    for node in graph.node:
        yield node, graph
        for item in node.attribute:
            if item.type == onnx.AttributeProto.GRAPH:
                yield from walk(item.g)
            for body in item.graphs:
                yield from walk(body)


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    return next((int(item.i) for item in node.attribute if item.name == name), default)


def _constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Every initializer by name; in bodies too, where names are unique in models that ONNX Runtime loads."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for _, graph in walk(model.graph):
        if graph is not model.graph:
            found.update((tensor.name, tensor) for tensor in graph.initializer)
    return found


def constant_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers, wherever they are stored."""
    total = 0
    for tensor in _constants(model).values():
        count = int(np.prod(tensor.dims, dtype=np.int64))
        total += int(np.ceil(count * ir.DataType(tensor.data_type).itemsize))
    return total


def check_scales(model: onnx.ModelProto, folder: Path, where: str) -> None:
    """Check that every constant scale of a quantized operator is a number that can be one.

    Args:
        model: The compiled model, its external data not loaded; that is mapped, not read.
        folder: Where external data lies.
        where: What messages begin with.

    Raises:
        PassError: A scale is NaN, infinite or zero; names the initializer.
    """
    constants = _constants(model)
    seen = set()
    for node, _ in walk(model.graph):
        at = _SCALES.get(node.op_type)
        name = node.input[at] if at is not None and len(node.input) > at else ""
        if name not in constants or name in seen:
            continue
        seen.add(name)
        scales = _read(constants[name], folder, where)
        for problem, bad in (("NaN or infinite", ~np.isfinite(scales)), ("zero", scales == 0)):
            count = int(np.count_nonzero(bad))
            if count:
                raise PassError(
                    f"{where}: {count} of the {scales.size} scales in '{name}' are {problem}, which {node.op_type} "
                    f"'{node.name}' reads; leave its site float with --ignore and report this"
                )


def read_constant(model: onnx.ModelProto, name: str, folder: Path, where: str) -> np.ndarray:
    """A constant of a model whose external data, in `folder`, is not loaded; raises ModelError if it cannot be read."""
    constants = _constants(model)
    if name not in constants:
        raise ModelError(f"{where}: '{name}' is no constant")
    return _read(constants[name], folder, where)


def _read(tensor: onnx.TensorProto, folder: Path, where: str) -> np.ndarray:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    if 0 in tensor.dims:
        return np.zeros(0, np.float32)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path, dtype = folder / entries.get("location", ""), ir.DataType(tensor.data_type).numpy()
    try:
        return np.memmap(path, dtype, "r", int(entries.get("offset") or 0), tuple(tensor.dims))
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}: the scales '{tensor.name}' cannot be read from '{path.name}' ({error})") from error


def with_exact_compute(model: onnx.ModelProto) -> tuple[bytes, int]:
    """The model, serialized, with float compute (level 0) for every MatMulNBits at level 4; and how many these were."""
    changed = []
    for node, _ in walk(model.graph):
        if node.op_type == "MatMulNBits":
            changed += [item for item in node.attribute if item.name == "accuracy_level" and item.i == _INT8_LEVEL]
    if not changed:
        return b"", 0
    for item in changed:
        item.i = 0
    try:
        return model.SerializeToString(), len(changed)
    finally:
        for item in changed:
            item.i = _INT8_LEVEL


def count_operators(executed: Iterable[Executed], provider: str) -> dict[str, int]:
    """Number of nodes that ran, by operator, of those that matter for speed; most frequent first.

    What another provider than `provider` had to run has that one's name behind it: ``MatMul (CPU)``.
    """
    counts: Counter[str] = Counter()
    for node in executed:
        if _matters(node.op_type):
            elsewhere = f" ({node.provider.removesuffix('ExecutionProvider')})" if node.provider != provider else ""
            counts[node.op_type + elsewhere] += 1
    return dict(counts.most_common())


def _matters(op_type: str) -> bool:
    return op_type in _HEAVY or op_type in _QUANTIZED or op_type in _COPIES or op_type.startswith("QLinear")


def fusion_remarks(model: onnx.ModelProto, executed: Sequence[Executed], provider: str) -> list[str]:
    """What about the nodes that ran is slow or not as written.

    1. A DequantizeLinear of a weight that was not fused with its reader: the weight is dequantized on every run.
    2. MatMulNBits that ONNX Runtime made out of DequantizeLinear: its activations are int8 unless it is told otherwise.
    3. MatMulNBits of 2 or 8 bits without accuracy level 4 on the CPU: the weight is dequantized on every run.
    4. Operators that matter on the CPU under another provider.
    """
    nodes = {node.name: node for node, _ in walk(model.graph) if node.name}
    remarks = _unfused(model, executed, nodes)
    written = sum(node.op_type == "MatMulNBits" for node, _ in walk(model.graph))
    made = sum(node.op_type == "MatMulNBits" for node in executed) - written
    if made > 0 and provider == _CPU:
        remarks.append(
            f"ONNX Runtime runs {made} MatMul behind DequantizeLinear as MatMulNBits with int8 activations; the "
            "session option session.qdq_matmulnbits_accuracy_level = 0 makes it compute exactly"
        )
    slow = [
        node.name
        for node, _ in walk(model.graph)
        if node.op_type == "MatMulNBits"
        and attribute(node, "bits", 4) in _NO_EXACT_KERNEL
        and attribute(node, "accuracy_level", 0) != _INT8_LEVEL
    ]
    if slow and provider == _CPU:
        remarks.append(
            f"{len(slow)} MatMulNBits of 2 or 8 bits dequantize their weight on every run, for lack of a kernel at any "
            f"accuracy level but 4: {_listed(slow)}"
        )
    if provider != _CPU:
        stray = Counter(node.op_type for node in executed if node.provider == _CPU and _matters(node.op_type))
        if stray:
            found = ", ".join(f"{count} {op_type}" for op_type, count in stray.most_common())
            remarks.append(f"under {provider} the CPU runs {found}, with copies to and fro")
    return remarks


def _unfused(model: onnx.ModelProto, executed: Sequence[Executed], nodes: Mapping[str, onnx.NodeProto]) -> list[str]:
    constants = _constants(model)
    readers: dict[str, list[onnx.NodeProto]] = {}
    decoded: set[str] = set()  # activations; an operator that reads them is for `verify_integers` to judge
    for node, _ in walk(model.graph):
        for name in node.input:
            readers.setdefault(name, []).append(node)
        if node.op_type == "DequantizeLinear" and node.input[0] not in constants:
            decoded.update(node.output)
    found: dict[str, str] = {}
    for ran in executed:
        origin = nodes.get(ran.name)
        if ran.op_type != "DequantizeLinear" or origin is None or origin.op_type != ran.op_type:
            continue
        weight = constants.get(origin.input[0])
        if weight is not None and len(weight.dims) >= 2:
            for reader in _final_readers(origin, readers):
                if reader.input[0] in decoded:
                    continue
                found.setdefault(reader.name or reader.op_type, reader.op_type)
    if not found:
        return []
    kinds = ", ".join(f"{count} {op_type}" for op_type, count in sorted(Counter(found.values()).items()))
    return [
        f"a DequantizeLinear that ONNX Runtime did not fuse dequantizes the weight of {kinds} on every run: "
        f"{_listed(list(found))}; --format matmulnbits is faster"
    ]


def _final_readers(node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]]) -> Iterator[onnx.NodeProto]:
    for name in node.output:
        for reader in readers.get(name, ()):
            if reader.op_type in _READERS:
                yield reader
            elif reader.op_type in _PASSED_THROUGH:
                yield from _final_readers(reader, readers)


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"'{name}'" for name in names[:_LISTED]) + rest
