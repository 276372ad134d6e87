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
from qcompiler.graph import Site, constant_array, original_weight, write_weight
from qcompiler.layers import bias_place, constant_add, remove_bias
from qcompiler.numerics.affine import quantize
from qcompiler.quantized import from_stored

__all__ = ["Additions", "adapters_to_inputs", "merge_adapter"]


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
    def of(cls, sites: Sequence[Site], kind: str, rank: int, seed: int, pass_name: str) -> "Additions":
        """Add "biases", "adapters" or, with an empty text, nothing to sites."""
        made = cls({}, [], [])
        if kind == "biases":
            made._add_biases(sites, pass_name)
        elif kind == "adapters":
            made._add_adapters(sites, rank, seed, pass_name)
        return made

    def remove(self) -> None:
        """Take it out again."""
        for _, branch in self.branches:
            remove_branch(branch)
        for add in self.biases:
            remove_bias(add)

    def _add_biases(self, sites: Sequence[Site], pass_name: str) -> None:
        """Give every MatMul that has none a bias of zeros."""
        for site in sites:
            if site.node.op_type != "MatMul" or constant_add(site.node) is not None:
                continue
            node, index = bias_place(site, pass_name)
            self._learn(node.inputs[index])
            self.biases.append(node)

    def _add_adapters(self, sites: Sequence[Site], rank: int, seed: int, pass_name: str) -> None:
        """Put an adapter beside each product: A uniform with the variance 1 / (3 K), B zero."""
        generator = np.random.default_rng(seed)
        for site in sites:
            if site.not_linear:
                continue
            reach = site.columns**-0.5
            inner = generator.uniform(-reach, reach, (rank, site.columns)).astype(np.float32)
            outer = np.zeros((site.rows, rank), np.float32)
            branch = add_branch(site, inner, outer, pass_name, "lora")
            self.branches.append((site, branch))
            self._learn(branch.inner)
            self._learn(branch.outer)

    def _learn(self, value: ir.Value | None) -> None:
        assert value is not None
        assert value.name
        self.constants[value.name] = constant_array(value)


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


def merge_adapter(site: Site, branch: Branch, pass_name: str) -> None:
    """Round a site's float weight with its adapter in it to the nearest codes of its grid, and take the branch out."""
    tensor = site.quantized
    assert tensor is not None
    layout = "KN" if branch.products[0].op_type == "MatMul" else "N:1"
    inner, outer = (from_stored(constant_array(value), layout) for value in (branch.inner, branch.outer))
    weight = original_weight(site) + outer.astype(np.float32) @ inner.astype(np.float32)
    remove_branch(branch)
    write_weight(site, quantize(weight, tensor.grid, tensor.spec), tensor.grid, tensor.spec, pass_name)
