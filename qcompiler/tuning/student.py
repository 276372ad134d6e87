"""A quantized model that learns: its graph in PyTorch with all that a method trains, and the float model in it."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.checkpoints import Arrays
from qcompiler.graph import Site, constant_array
from qcompiler.torch_graph import TorchGraph
from qcompiler.torch_graph.devices import computing_on
from qcompiler.torch_graph.dtypes import as_numpy, to_torch
from qcompiler.tuning.activations import LearnedScale, Switch, find_quantizers, quantizer_functions
from qcompiler.tuning.directions import Adam, Direction
from qcompiler.tuning.distillation import Head, Stage
from qcompiler.tuning.learned import Learned
from qcompiler.tuning.learned_vector import LearnedVector, put_back_vectors, vector_arrays, vectors_apart
from qcompiler.tuning.losses import Loss
from qcompiler.tuning.method_weights import (
    AbsMean,
    BinaryConnect,
    DrawnBinaryConnect,
    LearnedStep,
    StraightThrough,
    Ternary,
    TrainedTernary,
    Xnor,
)
from qcompiler.tuning.rounding import Settings, products
from qcompiler.tuning.sites import code_arrays, codes_of, put_back, start_of
from qcompiler.tuning.trained_weight import TrainedWeight

if TYPE_CHECKING:
    from qcompiler.segments import Segment

__all__ = ["METHODS", "Method", "Student"]


@dataclass(frozen=True)
class Method:
    """What a method trains.

    Attributes:
        weights: What stands in the place of a quantized weight; None leaves weights alone.
        activations: How gradients go through quantized activations (see `activations.quantizer_functions`).
        scales: Whether scales of activations are learned; those of signs are where weights are trained.
        formats: Codes that a weight has to have: "" (any), "ternary", or "wide" (of 4 or 8 bits).
        vectors: What is learned of the float vectors: "all", "biases" or "none".
        adds: What is added to the model to be learned: "", "biases" or "adapters".
    """

    weights: type[TrainedWeight] | None
    activations: str = "qat"
    scales: bool = False
    formats: str = ""
    vectors: str = "all"
    adds: str = ""


METHODS = {
    "qat": Method(StraightThrough),
    "lsq": Method(LearnedStep, "lsq", True),
    "pact": Method(StraightThrough, "pact", True),
    "binaryconnect": Method(BinaryConnect, formats="ternary"),
    "binaryconnect-drawn": Method(DrawnBinaryConnect, formats="ternary"),
    "bnn": Method(BinaryConnect, "lsq", True, "ternary"),
    "xnor": Method(Xnor, "lsq", True, "ternary"),
    "twn": Method(Ternary, formats="ternary"),
    "ttq": Method(TrainedTernary, formats="wide"),
    "absmean": Method(AbsMean, formats="ternary"),
    "bitfit": Method(None, vectors="biases", adds="biases"),
    "qlora": Method(None, vectors="none", adds="adapters"),
}


@dataclass
class Student:
    """The model as stages, and everything that is learned of it.

    Attributes:
        stages: In order.
        head: What comes after them.
        weights: What is learned of quantized weights, with their sites.
        vectors: Float vectors that are learned beside them.
        scales: Of activations, with the values that hold them.
    """

    stages: list[Stage]
    head: Head
    switch: Switch
    originals: dict[str, Tensor]
    weights: list[tuple[Site, TrainedWeight]] = field(default_factory=list)
    vectors: list[LearnedVector] = field(default_factory=list)
    scales: list[tuple[ir.Value, LearnedScale]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: ir.Model,
        sites: Sequence[Site],
        blocks: "Sequence[Segment]",
        method: Method,
        loss: Loss,
        direction: Callable[[], Direction],
        dtype: torch.dtype,
        seed: int,
        added: Mapping[str, np.ndarray] | None = None,
    ) -> "Student":
        """Prepare a model.

        Args:
            model: With quantized weights, and with Q/DQ pairs where activations are quantized.
            sites: Whose weights are trained, one for each weight.
            blocks: The stages, the last of which is the head; empty for the whole graph as one stage.
            method: What is trained of them.
            loss: What the outputs are judged by.
            direction: Makes the direction of each parameter; Adam's for the weights of blocks keep factored magnitudes.
            dtype: Of weights in products.
            seed: Of what is drawn at random.
            added: Constants that were added to be learned, by name.
        """
        switch, lean = Switch(), bool(blocks) and direction is Adam
        quantizers = find_quantizers(model.graph)
        functions = quantizer_functions(quantizers, method.activations, switch)
        made = method.weights
        weights = [] if made is None else [
            (site, made(start_of(site), direction, dtype, seed + at, lean=lean)) for at, site in enumerate(sites)
        ]  # fmt: skip
        scales = {
            each.scale: LearnedScale(each.scale.name or "", float(constant_array(each.scale)), direction)
            for each in quantizers
            if method.scales or (each.signs and method.weights is not None)
        }
        opsets = model.opset_imports
        extra = {name: LearnedVector(name, array, direction, 1.0) for name, array in (added or {}).items()}
        by_name: dict[str, Learned] = {**{each.name: each for _, each in weights}, **extra}
        by_name.update((value.name or "", scale) for value, scale in scales.items())
        if not _apart(blocks, by_name.keys()):
            blocks = []
        parts = _parts(model, blocks)
        own: list[dict[str, np.ndarray]] = [{} for _ in parts]
        if method.vectors != "none":
            own = vectors_apart([nodes for nodes, _, _ in parts], biases=method.vectors == "biases")
        stages, vectors = [], []
        for (nodes, outputs, carried), found in zip(parts, own, strict=True):
            beside = [LearnedVector(name, array, direction) for name, array in found.items() if name not in extra]
            here = [by_name[name] for name in _reads(nodes) if name in by_name]
            vectors += beside
            stages.append(Stage(TorchGraph(nodes, opsets, outputs, functions=functions), carried, [*here, *beside]))
        head = _head(model, blocks, loss, functions)
        opened = {each.name for stage in stages for each in stage.weights}
        learned = [(value, scale) for value, scale in scales.items() if scale.name in opened]
        return cls(stages, head, switch, _originals(sites), weights, [*vectors, *extra.values()], learned)

    def to(self, device: torch.device) -> "Student":
        """Compute on a device from now on, parameters included; before the first step."""
        for stage in self.stages:
            stage.graph.to(device)
        for each in (*(weight for _, weight in self.weights), *self.vectors, *(scale for _, scale in self.scales)):
            each.to(device)
        self.originals = {name: value.to(device) for name, value in self.originals.items()}
        originals = {name: value.to(device) for name, value in self.head.originals.items()}
        self.head = replace(self.head, graph=self.head.graph.to(device), originals=originals)
        return self

    def answers(self, feeds: Mapping[str, np.ndarray], settings: Settings | None = None) -> dict[str, np.ndarray]:
        """What the head reads in the float model; with settings as exact as these have descent."""
        boundary, device = self.stages[0].graph.tensors(feeds), self.head.graph.device
        self.switch.on = False
        try:
            with torch.no_grad(), computing_on(device), products(settings or Settings(device=device.type)):
                for stage in self.stages:
                    given = {name: value for name, value in self.originals.items() if name in stage.graph.names}
                    results = stage.graph.run({name: boundary[name] for name in stage.graph.inputs}, given)
                    boundary = {**{name: boundary[name] for name in stage.carried}, **results}
        finally:
            self.switch.on = True
        return {name: as_numpy(boundary[name]).copy() for name in self.head.graph.inputs}

    def arrays(self) -> Arrays:
        """What was learned, as it will be stored."""
        sites, weights = [site for site, _ in self.weights], [weight for _, weight in self.weights]
        codes = code_arrays(sites, [each.codes for each in weights], [each.grid for each in weights])
        return {**codes, **vector_arrays([*self.vectors, *(scale for _, scale in self.scales)])}


def _reads(nodes: Sequence[ir.Node]) -> dict[str, None]:
    """The names of what nodes read, in order."""
    return dict.fromkeys(value.name for node in nodes for value in node.inputs if value is not None and value.name)


def _apart(blocks: "Sequence[Segment]", names: Iterable[str]) -> bool:
    """Whether no two blocks read the same of what is learned: each would have to wait for the other's gradient."""
    count = Counter(name for block in blocks for name in _reads(block.nodes))
    return all(count[name] <= 1 for name in names)


def _parts(model: ir.Model, blocks: "Sequence[Segment]") -> list[tuple[list[ir.Node], list[str], list[str]]]:
    """Nodes, outputs and what passes by, of each stage."""
    if blocks:
        return [(list(block.nodes), block.outputs, block.carried) for block in blocks[:-1]]
    return [(list(model.graph), [value.name or "" for value in model.graph.outputs], [])]


def _head(
    model: ir.Model, blocks: "Sequence[Segment]", loss: Loss, functions: Mapping[ir.Node, Callable[..., Any]]
) -> Head:
    """The last block, or nothing behind the outputs of the whole graph."""
    if not blocks:
        return Head(TorchGraph([], model.opset_imports, [value.name or "" for value in model.graph.outputs]), {}, loss)
    end = blocks[-1]
    graph = TorchGraph(end.nodes, model.opset_imports, end.outputs, functions=functions)
    return Head(graph, _originals(end.sites), loss)


def _originals(sites: Sequence[Site]) -> dict[str, Tensor]:
    """The float weights of sites, by the names of their values."""
    quantized = [(site.weight.name, site.quantized) for site in sites if site.quantized is not None]
    return {name: to_torch(tensor.meta["original"]) for name, tensor in quantized if name and "original" in tensor.meta}


def put_back_all(
    model: ir.Model, arrays: Mapping[str, Any], sites: Sequence[Site], name: str
) -> dict[Site, dict[str, float]]:
    """Give the model what was learned; returns figures of each site for its record."""
    put_back_vectors(model, arrays)
    learned = zip(sites, *codes_of(arrays, sites), strict=True)
    return {site: put_back(site, codes, grid, name) for site, codes, grid in learned}
