"""TorchGraph: the nodes of a graph or segment, run in order, each tensor freed after its last reader."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.errors import KernelError
from qcompiler.torch_graph.devices import CPU
from qcompiler.torch_graph.dtypes import TORCH_DTYPES, from_numpy, to_torch
from qcompiler.torch_graph.registry import Call, Operator, describe, find_operator, replaced

__all__ = ["TorchGraph", "unsupported"]

# Importing one of these enters its operators into the table.
_OPERATORS = (
    "activations",
    "attention",
    "contrib",
    "contrib_attention",
    "control",
    "convolution",
    "elementwise",
    "indexing",
    "integers",
    "matrices",
    "normalization",
    "pooling",
    "quantization",
    "recurrent",
    "reductions",
    "resize",
    "shapes",
)
for _name in _OPERATORS:
    importlib.import_module(f"qcompiler.torch_graph.ops_{_name}")

# Constants of fewer values stay on the CPU: shapes, axes and bounds, which functions read.
_LARGE = 64


@dataclass(eq=False)
class _Step:
    """A node ready to run; `captured` are the values that its bodies read from outside, `inner` names within them."""

    call: Call
    operator: Operator
    inputs: list[str | None]
    outputs: list[str]
    captured: list[str]
    inner: frozenset[str]

    @property
    def reads(self) -> set[str]:
        return {name for name in self.inputs if name} | set(self.captured)


class TorchGraph:
    """A differentiable form of some nodes.

    Attributes:
        inputs: Names of the values that are read but neither computed nor constant.
        outputs: Names of the values that `run` returns.
        names: Every name in it, those within bodies included.
        device: Where its large constants are; what is computed lies where the inputs do (see `devices`).
    """

    device = CPU

    def __init__(
        self,
        nodes: Sequence[ir.Node],
        opset_imports: Mapping[str, int],
        outputs: Sequence[str],
        *,
        constants: Sequence[ir.Value] = (),
        functions: Mapping[ir.Node, Callable[..., Any]] | None = None,
    ) -> None:
        """Look up every node's function; nothing is computed and no constant is read yet.

        Args:
            nodes: In topological order.
            opset_imports: Domain -> version.
            outputs: Names wanted.
            constants: Initializers that may be outputs without any node that reads them.
            functions: What runs in the place of nodes' operators: takes a `Call` and the inputs, as operators do.

        Raises:
            KernelError: A node has no function here; the message lists every such node (see `unsupported`).
        """
        problems: list[str] = []
        self._functions = functions or {}
        self._constants: dict[str, ir.Value] = {value.name: value for value in constants if value.name}
        self._steps = [step for node in nodes if (step := self._prepare(node, opset_imports, problems)) is not None]
        if problems:
            raise KernelError("\n".join(problems))
        self.outputs = list(outputs)
        made = {name for step in self._steps for name in step.outputs}
        reads = dict.fromkeys([*(name for step in self._steps for name in sorted(step.reads)), *self.outputs])
        self.inputs = [name for name in reads if name not in made and name not in self._constants]
        inner = {name for step in self._steps for name in step.inner}
        self.names = frozenset(made | reads.keys() | self._constants.keys() | inner)
        self._converted: dict[str, tuple[Any, Tensor]] = {}
        self._plans: dict[frozenset[str], list[tuple[_Step, list[str]]]] = {}

    @classmethod
    def from_model(cls, model: ir.Model) -> "TorchGraph":
        """The whole graph of a model without functions of its own, with the graph's outputs."""
        return cls._from_graph(model.graph, model.opset_imports)

    @classmethod
    def _from_graph(cls, graph: ir.Graph, opset_imports: Mapping[str, int]) -> "TorchGraph":
        outputs = [value.name or "" for value in graph.outputs]
        constants = [value for value in (*graph.initializers.values(), *graph.outputs) if value.const_value is not None]
        made = cls(list(graph), opset_imports, outputs, constants=constants)
        made.names |= {value.name for value in graph.inputs if value.name}  # also those that nothing reads
        return made

    def to(self, device: torch.device) -> "TorchGraph":
        """Compute on a device from now on, bodies included."""
        self.device = device
        self._converted.clear()
        for step in self._steps:
            for body, _ in step.call.bodies.values():
                body.to(device)
        return self

    def tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Arrays as tensors on the device."""
        return {name: from_numpy(array).to(self.device) for name, array in arrays.items()}

    def run(self, feeds: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Compute the outputs.

        Args:
            feeds: The inputs by name.
            values: Tensors that stand in the place of constants or of computed values, by name; nodes that are needed
                for nothing else are not run, and constants not read.

        Returns:
            The outputs by name. They may share memory with constants and with what was given: do not write to them.

        Raises:
            KernelError: An input is missing, a name is unknown, or a node cannot run on what it is given.
        """
        values = values or {}
        unknown = sorted(name for name in (*feeds, *values) if name not in self.names)
        if unknown:
            raise KernelError(f"no value of the graph is called {', '.join(unknown)}; inputs: {', '.join(self.inputs)}")
        given = {**feeds, **values}
        plan = self._plan(frozenset(given))
        computed: dict[str, Tensor] = {}
        for step, finished in plan:
            for name, result in zip(step.outputs, self._compute(step, computed, given), strict=False):
                if name and name not in given:
                    computed[name] = result
            for name in finished:
                computed.pop(name, None)
        return {name: self._value(name, computed, given) for name in self.outputs}

    def _compute(self, step: _Step, computed: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Sequence[Any]:
        """The outputs of one node."""
        inputs = [self._value(name, computed, given) if name else None for name in step.inputs]
        if step.operator.scoped:
            scope = {name: self._value(name, computed, given) for name in step.captured}
            scope.update((name, given[name]) for name in step.inner if name in given)
            inputs.insert(0, scope)
        try:
            result = step.operator.function(step.call, *inputs)
        except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            shapes = ", ".join(_shape(value) for value in inputs if not isinstance(value, dict))
            problem = str(error).strip().splitlines()[:1]
            raise KernelError(
                f"{describe(step.call.node)} failed on inputs {shapes}: {''.join(problem) or type(error).__name__}"
            ) from error
        return result if isinstance(result, tuple) else (result,)

    def _value(self, name: str, computed: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Any:
        if name in given:
            return given[name]
        return computed[name] if name in computed else self._constant(name)

    def _constant(self, name: str) -> Tensor:
        """A constant, converted once; a pass may have replaced it since."""
        stored = self._constants[name].const_value
        assert stored is not None
        source, tensor = self._converted.get(name, (None, None))
        if source is not stored:
            tensor = to_torch(stored)
            tensor = tensor.to(self.device) if tensor.numel() >= _LARGE else tensor
            self._converted[name] = (stored, tensor)
        return tensor

    def _plan(self, given: frozenset[str]) -> list[tuple[_Step, list[str]]]:
        """The steps that have to run, each with the names that nothing reads after it."""
        if given in self._plans:
            return self._plans[given]
        available = given | self._constants.keys()
        needed = set(self.outputs) - available
        steps: list[_Step] = []
        for step in reversed(self._steps):
            if not needed.isdisjoint(step.outputs):
                needed.difference_update(step.outputs)
                needed.update(step.reads - available)
                steps.append(step)
        if needed:
            raise KernelError(f"inputs are missing: {', '.join(sorted(needed))}; given: {', '.join(sorted(given))}")
        plan: list[tuple[_Step, list[str]]] = []
        later = set(self.outputs)
        for step in steps:  # from the last to the first
            plan.append((step, [name for name in (step.reads | set(step.outputs)) - available if name not in later]))
            later |= step.reads
        self._plans[given] = plan[::-1]
        return self._plans[given]

    def _prepare(self, node: ir.Node, opset_imports: Mapping[str, int], problems: list[str]) -> _Step | None:
        """A node with its function and its bodies; what is wrong with it goes to `problems`."""
        call = Call(node, _version(node, opset_imports))
        operator = find_operator(call) if node.overload == "" else "functions of the model have to be inlined before"
        if node in self._functions:
            operator = replaced(self._functions[node])
        problem = operator if isinstance(operator, str) else _type_problem(node)
        if problem:
            problems.append(f"{describe(node)} at version {call.version}: {problem}")
            return None
        assert isinstance(operator, Operator)
        captured: dict[str, None] = {}
        inner: set[str] = set()
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.GRAPH:
                graph = attribute.as_graph()
                try:
                    body = TorchGraph._from_graph(graph, opset_imports)
                except KernelError as error:
                    problems.append(str(error))
                    continue
                call.bodies[name] = (body, [value.name or "" for value in graph.inputs])
                own = {value.name for value in graph.inputs}
                captured.update((read, None) for read in body.inputs if read not in own)
                inner |= body.names - own
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.name:
                self._constants.setdefault(value.name, value)
        inputs = [value.name if value is not None else None for value in node.inputs]
        return _Step(call, operator, inputs, [v.name or "" for v in node.outputs], list(captured), frozenset(inner))


def unsupported(nodes: Sequence[ir.Node], opset_imports: Mapping[str, int]) -> list[str]:
    """Why the nodes cannot be run in PyTorch, one text for each that cannot; empty if all can."""
    try:
        TorchGraph(nodes, opset_imports, ())
    except KernelError as error:
        return str(error).splitlines()
    return []


def _version(node: ir.Node, opset_imports: Mapping[str, int]) -> int:
    """The version of a node's domain; ONNX Runtime's own operators have one version, imported or not."""
    names = ("", "ai.onnx") if node.domain in ("", "ai.onnx") else (node.domain,)
    return next((opset_imports[name] for name in names if name in opset_imports), 1)


def _type_problem(node: ir.Node) -> str:
    """Why the tensors of a node cannot be held; empty if they can, as far as their types are known."""
    for value in (*node.inputs, *node.outputs):
        if value is None:
            continue
        if isinstance(value.type, ir.SequenceType | ir.OptionalType):
            return f"'{value.name}' is a {type(value.type).__name__}; only tensors are implemented"
        kind = value.const_value.dtype if value.const_value is not None else value.dtype
        if kind is not None and kind != ir.DataType.UNDEFINED and kind not in TORCH_DTYPES:
            return f"'{value.name}' is of type {kind.name}, which PyTorch cannot hold"
    return ""


def _shape(value: Any) -> str:
    return "-" if value is None else f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
