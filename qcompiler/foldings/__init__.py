"""Moving factors of channels through a model without changing what it computes.

For positive s [K], the sites that read an activation X [.., K] compute the same from X / s with W[:, j] * s_j. A
*folding* says which operator before them can divide its result by s at no cost: a normalization (its gamma and beta), a
linear layer (rows of its weight, its bias), or any constant that is multiplied in, with operators between that let
factors pass. That is legal where every reader of every value that is divided on the way is rescaled as well. Where it
is not, the folding says why, and a Mul by 1 / s can be inserted instead, which costs a pass over the activation.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.errors import NumericsError
from qcompiler.foldings.scaling import own_constant, own_weight, scaled_constant, scaled_weight
from qcompiler.foldings.search import Plan, Sites, find_plan, weight_problem
from qcompiler.foldings.sizes import note_sizes
from qcompiler.graph import Site
from qcompiler.lowering import add_constant, make_node
from qcompiler.sites import find_sites

__all__ = ["Folding", "find_foldings"]


@dataclass(eq=False)
class Folding:
    """The linear sites that read an activation, and what absorbs factors of its channels.

    Attributes:
        value: The activation; its K channels run along the sites' feature axis.
        sites: The sites whose columns are rescaled together. Where folding is legal, these are all readers, those
            that are to stay float included; elsewhere those that were asked for.
        reason: Why folding is not legal; empty if it is.
        stuck: Why not even a Mul can be inserted; empty if it can.
        plan: What to rescale; None where folding is not legal.
    """

    value: ir.Value
    sites: tuple[Site, ...]
    reason: str = ""
    stuck: str = ""
    plan: Plan | None = None

    @property
    def legal(self) -> bool:
        """Whether the factors can be folded."""
        return self.plan is not None

    @property
    def kind(self) -> str:
        """What absorbs the factors; empty where nothing does.

        ``norm``: a normalization. ``gain``: another constant for each channel, as in a normalization that is spelled
        out. ``attention``: the value projection before an attention. ``gated``: the factor of a gated product that no
        nonlinearity touches. ``linear``: a linear layer, with at most a ReLU and changes of shape between.
        """
        return self.plan.kind if self.plan is not None else ""

    @property
    def caches(self) -> tuple[str, ...]:
        """Inputs and outputs of the model that are divided too, and no longer fit those of the original."""
        return tuple(self.plan.caches) if self.plan is not None else ()

    @property
    def channels(self) -> int:
        """K."""
        return self.sites[0].columns

    def tie(self, factors: np.ndarray) -> np.ndarray:
        """Factors [K] that can be folded: the largest of those that share a channel of the source.

        Query heads that share a key and value head share their factors.
        """
        if self.plan is None:
            return factors
        largest = np.zeros(int(self.plan.columns.max()) + 1, factors.dtype)
        np.maximum.at(largest, self.plan.columns, factors)
        return np.asarray(largest[self.plan.columns])

    def apply(self, factors: np.ndarray) -> np.ndarray:
        """Fold the factors, tied, and return them; nothing is touched where all are one.

        Args:
            factors: Positive, ``[K]``.

        Raises:
            NumericsError: A factor that is not positive, or a constant that leaves the range of its dtype; the model
                has not changed then.
        """
        assert self.plan is not None, self.reason
        factors = self.tie(self._checked(factors))
        if (factors == 1).all():
            return factors
        plan = self.plan
        scale = np.ones(int(plan.columns.max()) + 1)
        scale[plan.columns] = 1 / factors

        def divided(ids: np.ndarray) -> np.ndarray:
            return np.where(ids >= 0, scale[ids], 1.0)

        constants = [
            (node, index, scaled_constant(_read(node, index), divided(ids))) for node, index, ids in plan.constants
        ]
        weights = self._scaled_columns(factors)
        if plan.rows is not None:
            site, ids = plan.rows
            weights.append(([site], scaled_weight(site, rows=divided(ids))))
        for node, index, constant in constants:
            _replace(own_constant(node, index), constant)
        self._commit(weights)
        return factors

    def insert(self, factors: np.ndarray, pass_name: str = "foldings") -> np.ndarray:
        """Multiply what the sites read by 1 / factors in a node of its own; the sites' columns as `apply` does."""
        assert not self.stuck, self.stuck
        factors = self._checked(factors)
        if (factors == 1).all():
            return factors
        weights = self._scaled_columns(factors)
        made: dict[tuple[ir.Value, ir.Graph | ir.Function | None], ir.Value] = {}
        for site in self.sites:
            key = (site.input, site.node.graph)
            if key not in made:
                made[key] = _insert_product(site, 1 / factors, pass_name)
            site.node.replace_input_with(0, made[key])
        self._commit(weights)
        return factors

    def _checked(self, factors: np.ndarray) -> np.ndarray:
        factors = np.asarray(factors, np.float64)
        if factors.shape != (self.channels,) or not (np.isfinite(factors).all() and (factors > 0).all()):
            raise NumericsError(f"factors for '{self.value.name}' have to be {self.channels} positive finite numbers")
        return factors

    def _scaled_columns(self, factors: np.ndarray) -> list[tuple[list[Site], ir.TensorProtocol]]:
        """The sites by weight and orientation, with the weights that they get."""
        groups: dict[tuple[ir.Value, str], list[Site]] = {}
        for site in self.sites:
            groups.setdefault((site.weight, site.layout), []).append(site)
        return [(group, scaled_weight(group[0], columns=factors)) for group in groups.values()]

    def _commit(self, weights: Iterable[tuple[list[Site], ir.TensorProtocol]]) -> None:
        for group, tensor in weights:
            own_weight(group)
            _replace(group[0].weight, tensor)


def _read(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _replace(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    tensor.name = value.name
    value.const_value, value.shape = tensor, tensor.shape  # type: ignore[assignment]


def _insert_product(site: Site, factors: np.ndarray, pass_name: str) -> ir.Value:
    """A Mul in front of the site; its result."""
    graph, value = site.node.graph, site.input
    assert isinstance(graph, ir.Graph) and site.weight.const_value is not None
    trailing = (1,) * (site.weight.const_value.shape.rank() - 2) if site.node.op_type == "Conv" else ()
    array = factors.astype(site.dtype.numpy()).reshape(-1, *trailing)
    constant = add_constant(graph, f"{value.name}_factors", array)
    node = make_node(graph, "Mul", [value, constant], {}, site.node, pass_name)
    graph.insert_before(site.node, node)
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    return node.outputs[0]


def find_foldings(model: ir.Model, sites: Iterable[Site], *, caches: bool = False) -> list[Folding]:
    """One folding for each activation that `sites` read, in graph order; values that differ in shape only are one.

    Args:
        model: Its nodes in topological order.
        sites: Those to rescale; lookup tables and convolutions that are not linear layers are left out.
        caches: Whether the inputs and outputs through which an attention keeps its values from run to run may be
            scaled: right where they are only ever fed back to the model.
    """
    note_sizes(model)
    wanted = {site.node: site for site in sites if site.role in ("linear", "lm_head")}
    every: Sites = {
        site.node: wanted.get(site.node, site) for site in find_sites(model)[0] if site.role in ("linear", "lm_head")
    }
    by_value: dict[ir.Value, list[Site]] = {}
    for site in every.values():
        if site.node in wanted:
            by_value.setdefault(site.input, []).append(site)
    found: list[Folding] = []
    taken: dict[ir.Node, Folding] = {}
    for value, readers in by_value.items():
        if all(site.node in taken for site in readers):
            continue
        stuck = next((problem for site in readers if (problem := weight_problem(site))), "")
        plan = stuck or find_plan(readers[0], every, caches=caches)
        other = None if isinstance(plan, str) else next((s for s in plan.readers if s.node in taken), None)
        if other is not None:
            plan = f"'{other.name}' is rescaled together with what reads '{taken[other.node].value.name}'"
        if isinstance(plan, str):
            found.append(Folding(value, tuple(readers), plan, stuck))
            continue
        order = {node: number for number, node in enumerate(every)}
        folding = Folding(value, tuple(sorted(plan.readers, key=lambda site: order[site.node])), plan=plan)
        found.append(folding)
        taken.update(dict.fromkeys((site.node for site in folding.sites), folding))
    return found
