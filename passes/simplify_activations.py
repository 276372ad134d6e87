"""Spell hard activation functions with the operator made for them.

1. ``Clip(a * x + b, 0, c) / c`` becomes ``HardSigmoid(x)`` with alpha = a / c and beta = b / c. The affine part may be
   Mul, Add, Sub and Div by single values, in any order and number; the division may be a Mul by 1 / c, and is missing
   where c is 1.
2. ``x * Clip(x + 3, 0, 6) / 6`` (hard swish) becomes ``x * HardSigmoid(x)``, wherever the division by 6 stands: at the
   product, at the Clip, or at x.
3. Multiplying and dividing by one, as in ``x * Sigmoid(1 * x)`` (swish with a parameter), goes away.

Integer convolutions leave nothing but such operators to run in float; written so, `insert_qdq` and `absorb_scales` can
run them on codes. Equal but for the rounding of floats.

Left alone, with a record that says why: what anything else reads in between, and a division by another number. Clip
without an affine part is a bounded Relu, which the quantization behind it absorbs.
"""

import math

import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import constant_scalar, walk
from qcompiler.lowering import make_node
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, quantizes_activations
from qcompiler.records import SiteRecord

__all__ = ["SimplifyActivations"]

_ARITHMETIC = ("Mul", "Add", "Sub", "Div")
# Exporters write 1 / 6 in float32 or with a few digits; what is within this is meant to be equal.
_TOLERANCE = 1e-6


class SimplifyActivations(QuantPass):
    """Finds hard sigmoid and hard swish in simpler operators."""

    name = "simplify_activations"
    stage = Stage.CANONICALIZE
    after = ("canonicalize",)

    @classmethod
    def applies(cls, config: CompileConfig) -> bool:
        """Where activations are quantized: every operator between two integer ones counts."""
        return quantizes_activations(config)

    def call(self, model: ir.Model) -> QuantPassResult:
        """Go through the Clips."""
        records: list[SiteRecord] = []
        for node, _ in list(walk(model.graph)):
            if _is_nothing(node):
                assert node.graph is not None
                source = next(value for value in node.inputs if constant_scalar(value) is None)
                assert source is not None
                node.outputs[0].replace_all_uses_with(source)
                node.graph.remove(node, safe=True)
                records.append(SiteRecord(_name(node), "rewritten", reason="multiplied by one, and is gone"))
            elif node.domain == "" and node.op_type == "Clip":
                found = self._simplify(node)
                if found:
                    done = found.startswith("Hard")
                    reason = f"now {found}" if done else f"no hard sigmoid: {found}"
                    records.append(SiteRecord(_name(node), "rewritten" if done else "skipped", reason=reason))
        return QuantPassResult(model, any(record.action == "rewritten" for record in records), tuple(records))

    def _simplify(self, clip: ir.Node) -> str:
        """Replace a Clip; returns what it became, why it did not, or nothing where it is not meant."""
        bound = _bound(clip)
        source, alpha, beta, chain = _affine(clip)
        if not chain or bound is None or beta == 0 or alpha == 0:
            return ""
        # Values have no types where shapes were never inferred; their constants do.
        if any(value is not None and value.dtype not in (None, ir.DataType.FLOAT) for value in chain[0].inputs):
            return "ONNX Runtime has HardSigmoid in float32 only"
        if any(node.outputs[0].is_graph_output() or len(node.outputs[0].uses()) > 1 for node in chain):
            return "what it clips has other readers"
        divided = _division(clip, bound)
        if isinstance(divided, str):
            return divided
        graph = clip.graph
        assert graph is not None
        attributes = {"alpha": alpha / bound, "beta": beta / bound}
        hard = make_node(graph, "HardSigmoid", [source], attributes, clip, self.name)
        hard.outputs[0].type, hard.outputs[0].shape = source.type, source.shape
        graph.insert_after(clip, hard)
        _replace(clip.outputs[0], hard.outputs[0])
        if divided is not None:
            scaled = next(value for value in divided.inputs if constant_scalar(value) is None)
            assert scaled is not None and divided.graph is not None
            _replace(divided.outputs[0], hard.outputs[0] if scaled is clip.outputs[0] else scaled)
            divided.graph.remove(divided, safe=True)
        graph.remove([clip, *chain], safe=True)
        return f"HardSigmoid({alpha / bound:.6g} x + {beta / bound:.6g})"


def _is_nothing(node: ir.Node) -> bool:
    """Whether a node multiplies by one, and its result is not what the caller gets."""
    if node.op_type not in ("Mul", "Div") or node.outputs[0].is_graph_output():
        return False
    step = _step(node, node)
    return step is not None and step[1:] == (1.0, 0.0)


def _name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type


def _bound(clip: ir.Node) -> float | None:
    """The upper bound of a Clip from 0, or None."""
    limits = [clip.attributes.get_float(name, math.nan) for name in ("min", "max")]
    for index, value in enumerate(clip.inputs[1:3]):
        limits[index] = math.nan if (known := constant_scalar(value)) is None else known
    low, high = limits
    return high if low == 0 and 0 < high < math.inf and high < 1e30 else None


def _affine(clip: ir.Node) -> tuple[ir.Value, float, float, list[ir.Node]]:
    """What a Clip reads as ``alpha * source + beta``, and the nodes that compute it from the source, last one first."""
    value, alpha, beta = clip.inputs[0], 1.0, 0.0
    assert value is not None
    chain: list[ir.Node] = []
    while True:
        node = value.producer()
        step = _step(node, clip) if node is not None else None
        if node is None or step is None or (chain and len(value.uses()) > 1):
            return value, alpha, beta, chain
        # alpha * (scale * v + shift) + beta
        value, scale, shift = step
        alpha, beta = alpha * scale, alpha * shift + beta
        chain.append(node)


def _step(node: ir.Node, clip: ir.Node) -> tuple[ir.Value, float, float] | None:
    """What a node does to one of its inputs by single values: (input, scale, shift); None if it does something else."""
    if node.domain != "" or node.op_type not in _ARITHMETIC or node.graph is not clip.graph:
        return None
    left, right = node.inputs
    first, second = constant_scalar(left, right), constant_scalar(right, left)
    constant = first if second is None else second
    value = right if second is None else left
    if constant is None or value is None or value.const_value is not None or not math.isfinite(constant):
        return None
    if node.op_type == "Mul":
        return value, constant, 0.0
    if node.op_type == "Add":
        return value, 1.0, constant
    if node.op_type == "Sub":
        return (value, 1.0, -constant) if second is not None else (value, -1.0, constant)
    return (value, 1 / constant, 0.0) if second is not None and constant else None


def _division(clip: ir.Node, bound: float) -> ir.Node | str | None:
    """The node that divides a Clip's result, or a product with it, by its bound; None if the bound is 1, or why not."""
    if abs(bound - 1) < _TOLERANCE:
        return None
    product, shared = _product(clip), False
    for node in (clip, *product):
        value = node.outputs[0]
        uses = list(value.uses())
        alone = len(uses) == 1 and not value.is_graph_output()
        if alone and _divides(uses[0].node, node, bound):
            return uses[0].node
        shared |= not alone and any(_divides(use.node, node, bound) for use in uses)
    for factor in (factor for node in product for factor in node.inputs):
        divider = factor.producer() if factor is not None else None
        if divider is not None and divider is not clip and _divides(divider, clip, bound):
            if len(divider.outputs[0].uses()) == 1 and not divider.outputs[0].is_graph_output():
                return divider
            shared = True
    if shared:
        return "what it computes has other readers before it is divided"
    return f"nothing divides by its bound of {bound:g}"


def _product(clip: ir.Node) -> list[ir.Node]:
    """The Mul that is the only reader of a Clip, of two activations, if there is one."""
    readers = clip.outputs[0].consumers()
    if len(clip.outputs[0].uses()) != 1 or readers[0].op_type != "Mul" or readers[0].domain != "":
        return []
    constant = any(value is None or value.const_value is not None for value in readers[0].inputs)
    elsewhere = readers[0].graph is not clip.graph or clip.outputs[0].is_graph_output()
    return [] if constant or elsewhere else [readers[0]]


def _divides(node: ir.Node, near: ir.Node, bound: float) -> bool:
    """Whether a node does nothing but divide by `bound`."""
    step = _step(node, near)
    return step is not None and step[2] == 0 and abs(step[1] * bound - 1) < _TOLERANCE


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Let the readers of a value, the caller included, have another one, which takes its name if the caller had it."""
    if old.is_graph_output():
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = new.name, name
    else:
        old.replace_all_uses_with(new)
