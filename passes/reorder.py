"""Reordering: let input channels of like size share a group of weights.

A group has one scale for all its weights, which the largest of them decides. In the order of training, channels of all
sizes meet in each group; sorted by size, quiet ones are among themselves and get a fine grid (Yuan et al. 2023,
"RPTQ: Reorder-based Post-training Quantization for Large Language Models", arXiv:2304.01089, does so to activations).
The size of channel j is the mean over the sites that read it of log rms(W_:j). Nothing else changes: with P the order

    X W^T = (X P) (W P)^T

1. Where X is computed elementwise from the results of linear layers, as before the down projection of an MLP, the rows
   of their weights are put in that order, and X P costs nothing.
2. Behind an attention, the channels of each head are put in order, and the rows of the value projection, at no cost
   either; query heads that share a value head share its order. That is of use where groups are smaller than heads.
3. Elsewhere, as behind a normalization, a Gather does it as the model runs: one pass over an activation.

Left alone: what has one group for all of its channels, activations that are quantized, sites inside bodies, weights
that others read too, and what would gain less than `least`: the gain is what the sum of squared scales falls by.

Shapes: X ``[.., K]``; W ``[N, K]``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.errors import SchemeError
from qcompiler.foldings import Folding, find_foldings
from qcompiler.foldings.rules import label
from qcompiler.foldings.shapes import BlockedError
from qcompiler.foldings.sizes import dims_of
from qcompiler.graph import Site, constant_array, read_weight
from qcompiler.lowering import add_constant, make_node
from qcompiler.numerics.affine import WeightSpec, min_max_grid
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage, site_scheme, site_spec
from qcompiler.records import SiteRecord
from qcompiler.rescaling import open_sites
from qcompiler.rotation import Changes, Order, linear_heads, mix_heads
from qcompiler.sites import find_sites

__all__ = ["Reorder"]

# They treat each element by itself, in any order.
_ELEMENTWISE = {
    ("", name)
    for name in (
        "Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
        "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Sqrt", "Sub",
        "Swish", "Tanh",
    )
} | {("com.microsoft", name) for name in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Options of `reorder`."""

    gather: bool = field(default=True, metadata={"help": "insert a Gather where no layer before can be reordered"})
    least: float = field(default=0.01, metadata={"help": "the least gain that anything is reordered for, 0 to 1"})

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0 <= self.least <= 1:
            raise SchemeError(f"pass reorder: least={self.least:g} is not between 0 and 1")


@dataclass(frozen=True)
class _Way:
    """A way to reorder the channels of an activation.

    Attributes:
        order: int ``[K]``, which channel stands at each place.
        how: What records say.
        note: Notes what becomes of constants, the columns of the sites among them.
        gathers: Whether a Gather has to be inserted.
    """

    order: np.ndarray
    how: str
    note: Callable[[Changes], None]
    gathers: bool = False


class Reorder(QuantPass):
    """Puts the columns of weights in an order in which groups are more even."""

    name = "reorder"
    stage = Stage.TRANSFORM
    after = ("awq", "equalize", "rotate", "smooth_conv", "smoothquant")
    paper = "Yuan et al. 2023, arXiv:2304.01089"
    Options = Options

    def call(self, model: ir.Model) -> QuantPassResult:
        """Choose the order of each activation's channels, then change all weights at once."""
        every = find_sites(model)[0]
        linear = {site.node: site for site in every if site.role in ("linear", "lm_head")}
        readers: dict[ir.Value, list[Site]] = {}
        for site in open_sites(every):
            if site.node in linear and site.node.op_type != "Conv":
                readers.setdefault(site.input, []).append(site)
        foldings = {folding.value: folding for folding in find_foldings(model, linear.values())}
        changes, records, gathers = Changes(), [], []
        for value, sites in readers.items():
            reasons: list[str] = []
            for way in self._ways(sites, linear, every, foldings.get(value)):
                gain = 0.0 if isinstance(way, str) else self._gain(sites, way.order)
                if not isinstance(way, str) and gain >= max(self.options.least, 1e-9):
                    way.note(changes)
                    if way.gathers:
                        gathers.append((value, sites, way.order))
                    how = f"{way.how}: {reasons[0]}" if reasons else way.how
                    records += [SiteRecord(site.name, "rewritten", "", how, {"gain": gain}) for site in sites]
                    break
                reasons.append(way if isinstance(way, str) else f"it would gain {max(gain, 0.0):.1%}")
            else:
                records += [SiteRecord(each.name, "skipped", "", f"not reordered: {reasons[-1]}") for each in sites]
        changes.commit()
        for value, sites, order in gathers:
            self._gather(value, sites, order)
        return QuantPassResult(model, any(record.action == "rewritten" for record in records), tuple(records))

    def _ways(
        self, sites: Sequence[Site], linear: Mapping[ir.Node, Site], every: Sequence[Site], folding: Folding | None
    ) -> Iterator[_Way | str]:
        """The ways to reorder what some sites read, the cheapest first; or reasons why there is one less."""
        problem = self._problem(sites, every)
        if problem:
            yield problem
            return
        sizes = _sizes(sites)
        order = np.argsort(sizes, kind="stable")
        yield _with_rows(sites, order, linear, every)
        if folding is not None and folding.kind == "attention" and set(folding.sites) == set(sites):
            yield _within_heads(folding, sizes)
        if self.options.gather:
            yield _Way(order, "reordered behind a Gather", lambda changes: _columns(changes, sites, order), True)

    def _problem(self, sites: Sequence[Site], every: Sequence[Site]) -> str:
        """Why the columns of some sites that read the same cannot be reordered; empty if they can."""
        nodes = {site.node for site in sites}
        for site in sites:
            scheme = site_scheme(site)
            if site.nested:
                return f"inside the body of {site.nested}"
            if scheme is not None and scheme.activations is not None:
                return f"the activations of '{site.name}' are quantized"
            if site_spec(site, self.context.config).group_size >= site.columns:
                return f"'{site.name}' has one group for all of its channels"
            if _shared(site, nodes, every):
                return f"the weight of '{site.name}' is read elsewhere too"
        return ""

    def _gain(self, sites: Sequence[Site], order: np.ndarray) -> float:
        """By which share an order of the channels lessens the sum of squared scales, all sites counting the same."""
        before = after = 0.0
        for site in sites:
            weight, spec = read_weight(site), site_spec(site, self.context.config)
            unit = np.square(weight, dtype=np.float64).mean() or 1.0
            before += _squared_scales(weight, spec) / unit
            after += _squared_scales(np.ascontiguousarray(weight[:, order]), spec) / unit
        return 1 - after / before if before else 0.0

    def _gather(self, value: ir.Value, sites: Sequence[Site], order: np.ndarray) -> None:
        """Let the sites read the value with its channels in that order."""
        first = sites[0].node
        graph = first.graph
        assert isinstance(graph, ir.Graph)
        constant = add_constant(graph, f"{value.name}_order", order.astype(np.int32))
        node = make_node(graph, "Gather", [value, constant], {"axis": -1}, first, self.name)
        node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
        graph.insert_before(first, node)
        for site in sites:
            site.node.replace_input_with(0, node.outputs[0])


def _sizes(sites: Sequence[Site]) -> np.ndarray:
    """The size of each channel ``[K]``."""
    with np.errstate(divide="ignore"):
        logs = [np.log(np.square(read_weight(site), dtype=np.float64).mean(0)) for site in sites]
    return np.asarray(np.mean(logs, axis=0))


def _squared_scales(weight: np.ndarray, spec: WeightSpec) -> float:
    return float(np.square(min_max_grid(weight, spec).scale, dtype=np.float64).mean())


def _columns(changes: Changes, sites: Sequence[Site], order: np.ndarray) -> None:
    mix = Order(order)
    for site in sites:
        changes.columns(site, mix)


def _shared(site: Site, nodes: set[ir.Node], every: Sequence[Site]) -> bool:
    """Whether anything but these nodes reads the weight of a site."""
    return site.weight.is_graph_output() or any(
        other.weight is site.weight and other.node not in nodes for other in every
    )


def _within_heads(folding: Folding, sizes: np.ndarray) -> _Way | str:
    """The channels of each head of an attention in order; why that is impossible."""
    try:
        plan = linear_heads(folding)
    except BlockedError as blocked:
        return str(blocked)
    order, matrices = np.arange(len(sizes)), []
    for group in range(len(plan.heads)):
        mine = plan.columns[plan.owner == group]  # [H, D]
        within = np.argsort(sizes[mine].mean(0), kind="stable")
        order[mine] = mine[:, within]
        matrices.append(np.eye(len(within))[:, within])
    how = f"reordered within heads, with the rows of {plan.source.name}"
    return _Way(order, how, lambda changes: mix_heads(plan, np.array(matrices), changes))


def _with_rows(
    readers: Sequence[Site], order: np.ndarray, linear: Mapping[ir.Node, Site], every: Sequence[Site]
) -> _Way | str:
    """All channels in order, where linear layers compute what is read, and elementwise operators; else why not."""
    sites: list[Site] = []
    constants: list[tuple[ir.Node, int]] = []
    channels, nodes, waiting = readers[0].columns, {site.node for site in readers}, [readers[0].input]
    seen: set[ir.Value] = set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None or value.is_graph_output():
            return f"'{value.name}' is an input or output of the model"
        if node in linear:
            site = linear[node]
            if site.rows != channels or site.nested or site.quantized is not None or _shared(site, {node}, every):
                return f"the rows of '{site.name}' cannot be reordered"
            sites.append(site)
            operands = list(enumerate(node.inputs))[2:]  # the bias of a Gemm
        elif (node.domain, node.op_type) in _ELEMENTWISE:
            operands = list(enumerate(node.inputs))
            nodes.add(node)
        else:
            return f"{label(node)} needs the order"
        for index, operand in operands:
            dims = dims_of(operand) if operand is not None else []
            if operand is None or (dims is not None and dims[-1:] in ([], [1])):
                continue  # the same for all channels
            if operand.const_value is None:
                waiting.append(operand)
            elif dims is not None and dims[-1] == channels:
                constants.append((node, index))
            else:
                return f"the channels of what {label(node)} reads are not known"
    other = next((user for value in seen for user in value.consumers() if user not in nodes), None)
    if other is not None:
        return f"{label(other)} reads it too"

    def note(changes: Changes) -> None:
        _columns(changes, readers, order)
        mix = Order(order)
        for site in sites:
            changes.rows(site, mix)
        for node, index in constants:
            value = node.inputs[index]
            assert value is not None
            changes.constant((node, index), mix.apply(constant_array(value)))

    return _Way(order, f"reordered with the rows of {', '.join(site.name for site in sites)}", note)
