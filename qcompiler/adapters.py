"""What training adds to a model that stays as it is: biases, and low-rank adapters beside its products.

Hu et al. 2022, "LoRA", arXiv:2106.09685: ``y = W x + (alpha / r) B A x`` with A ``[r, K]`` drawn and B ``[N, r]`` zero
at the beginning, so that nothing changes at first. The factor alpha / r is part of B here. Dettmers et al. 2023,
"QLoRA", arXiv:2305.14314, train them beside weights of 4 bits, on all linear layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.branches import Branch, add_branch, remove_branch
from qcompiler.graph import Site, constant_array, original_weight
from qcompiler.layers import bias_place, constant_add, remove_bias
from qcompiler.numerics.affine import Grid, quantize
from qcompiler.quantized import from_stored

__all__ = ["Additions", "adapters_to_inputs", "add_adapters", "add_biases", "merge_adapter"]


@dataclass(frozen=True)
class Additions:
    """What was added for a training.

    Attributes:
        constants: What is to be learned, by name.
        branches: Adapters with their sites.
        biases: Nodes that add biases.
    """

    constants: dict[str, np.ndarray]
    branches: list[tuple[Site, Branch]]
    biases: list[ir.Node]

    @classmethod
    def of(cls, model: ir.Model, sites: Sequence[Site], kind: str, rank: int, seed: int, pass_name: str) -> "Additions":
        """Add "biases", "adapters" or "" nothing to sites."""
        del model
        if kind == "biases":
            return cls(*add_biases(sites, pass_name))
        if kind != "adapters":
            return cls({}, [], [])
        fit = [site for site in sites if not site.not_linear]
        branches = add_adapters(fit, rank, seed, pass_name)
        values = [value for branch in branches for value in (branch.inner, branch.outer)]
        constants = {value.name or "": constant_array(value) for value in values}
        return cls(constants, list(zip(fit, branches, strict=True)), [])

    def remove(self) -> None:
        """Take it out again."""
        for _, branch in self.branches:
            remove_branch(branch)
        for add in self.biases:
            remove_bias(add)


def add_biases(
    sites: Sequence[Site], pass_name: str
) -> tuple[dict[str, np.ndarray], list[tuple[Site, Branch]], list[ir.Node]]:
    """Give every MatMul that has none a bias of zeros: constants, no branches, and the nodes that add them."""
    found: dict[str, np.ndarray] = {}
    nodes: list[ir.Node] = []
    for site in sites:
        if site.node.op_type != "MatMul" or site.nested or constant_add(site.node) is not None:
            continue
        node, index = bias_place(site, pass_name)
        value = node.inputs[index]
        assert value is not None
        found[value.name or ""] = constant_array(value)
        nodes.append(node)
    return found, [], nodes


def add_adapters(sites: Sequence[Site], rank: int, seed: int, pass_name: str) -> list[Branch]:
    """Put an adapter beside each site: A uniform with the variance 1 / (3 K), B zero."""
    generator = np.random.default_rng(seed)
    branches = []
    for site in sites:
        reach = site.columns**-0.5
        inner = generator.uniform(-reach, reach, (rank, site.columns)).astype(np.float32)
        branches.append(add_branch(site, inner, np.zeros((site.rows, rank), np.float32), pass_name, "lora"))
    return branches


def adapters_to_inputs(model: ir.Model, branches: Sequence[Branch]) -> dict[str, np.ndarray]:
    """Make the adapters inputs of the model, zero where none are given; returns what they were, by name.

    Such an input has an initializer too, so that a caller may leave it out, and ONNX Runtime's LoraAdapter gives it.
    """
    found: dict[str, np.ndarray] = {}
    for branch in branches:
        for value in (branch.inner, branch.outer):
            array = constant_array(value)
            assert value.name
            found[value.name] = array
            value.const_value = ir.tensor(np.zeros_like(array), name=value.name)
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
            model.graph.inputs.append(value)
    return found


def merge_adapter(site: Site, branch: Branch) -> tuple[np.ndarray, Grid]:
    """Codes and grid of a quantized site's float weight with its adapter in it, rounded to nearest on the same grid.

    The branch is taken out, and the float weight is replaced.
    """
    tensor = site.quantized
    assert tensor is not None
    layout = "KN" if branch.products[0].op_type == "MatMul" else "N:1"
    inner, outer = (from_stored(constant_array(value), layout) for value in (branch.inner, branch.outer))
    weight = original_weight(site) + outer.astype(np.float32) @ inner.astype(np.float32)
    scale = tensor.scale.astype(np.float32)
    zero = np.full_like(scale, tensor.spec.format.mid) if tensor.zero_point is None else tensor.zero_point
    grid = Grid(scale, zero.astype(np.float32))
    remove_branch(branch)
    return quantize(weight, grid, tensor.spec), grid
