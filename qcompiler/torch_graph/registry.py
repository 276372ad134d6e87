"""The table of operators, and what one of their functions gets to see of its node."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnx
import onnx_ir as ir

from qcompiler.errors import KernelError
from qcompiler.torch_graph.dtypes import TORCH_DTYPES, to_torch

__all__ = [
    "MICROSOFT",
    "NEWEST_OPSET",
    "Call",
    "Operator",
    "describe",
    "find_operator",
    "op",
    "register",
    "replaced",
    "supported_ops",
]

MICROSOFT = "com.microsoft"
# The last version of the standard whose changes these functions follow; a later change of an operator is refused.
NEWEST_OPSET = 28
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operator:
    """One meaning of an operator.

    Attributes:
        function: Takes a `Call` and the inputs (None for those left out); returns a tensor, or a tuple of outputs.
        since: The first version of the domain with this meaning.
        until: The last version that was looked at.
        only: Attribute -> the values of it that are implemented.
        knows: The attributes that are implemented, for operators outside the standard; None takes any.
        scoped: Whether the function runs bodies: it also gets the values that these read from outside.
        refuses: More that is not implemented: returns the reason, or an empty text.
    """

    function: Callable[..., Any]
    since: int
    until: int
    only: Mapping[str, Collection[Any]]
    knows: frozenset[str] | None
    scoped: bool
    refuses: Callable[["Call"], str]


_REGISTRY: dict[tuple[str, str], dict[int, Operator]] = {}


@dataclass(eq=False)
class Call:
    """A node, as its function sees it.

    Attributes:
        node: The node.
        version: Of the node's domain, as imported by the model.
        bodies: The graphs among its attributes, ready to run.
    """

    node: ir.Node
    version: int
    bodies: dict[str, Any] = field(default_factory=dict)
    _cache: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute as a Python value (a tensor for tensors), or `default` where it is absent."""
        if name not in self._cache:
            attribute = self.node.attributes.get(name)
            if attribute is None:
                return default
            value = attribute.value
            if attribute.type == ir.AttributeType.TENSOR:
                value = to_torch(attribute.as_tensor())
            elif isinstance(value, tuple | list):
                value = list(value)
            self._cache[name] = value
        return self._cache[name]

    def kind(self, name: str, default: int = 0) -> ir.DataType:
        """An attribute that names a data type."""
        return ir.DataType(self.get(name, default))

    def dtype(self, name: str, default: Any) -> Any:
        """The torch dtype that an attribute names."""
        return TORCH_DTYPES[self.kind(name)] if self.get(name) else default

    def input_kind(self, index: int) -> ir.DataType | None:
        """The declared type of an input, where it is known: torch's own does not tell integers below a byte apart."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            return None
        return value.const_value.dtype if value.const_value is not None else value.dtype

    def has_input(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def wants(self, index: int) -> bool:
        """Whether an optional output is asked for."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index].name)

    def error(self, problem: str) -> KernelError:
        """What is wrong with the values that this node was given."""
        return KernelError(f"{describe(self.node)}: {problem}")


def describe(node: ir.Node) -> str:
    """A node for messages: its operator with its domain, and its name or first output."""
    name = node.name or next((value.name for value in node.outputs if value.name), "")
    return f"{node.domain or 'ai.onnx'}.{node.op_type} '{name}'"


def register(
    function: Callable[..., Any],
    *names: str,
    since: int = 1,
    until: int | None = None,
    domain: str = "",
    only: Mapping[str, Collection[Any]] | None = None,
    knows: str | None = None,
    scoped: bool = False,
    refuses: Callable[[Call], str] = lambda _: "",
) -> None:
    """Enter a function under the names of its operators; see `Operator` for the rest."""
    last = until or (1 if domain else NEWEST_OPSET)
    known = None if knows is None else frozenset(knows.split())
    for name in names:
        versions = _REGISTRY.setdefault((domain, name), {})
        assert since not in versions, (domain, name, since)
        versions[since] = Operator(function, since, last, only or {}, known, scoped, refuses)


def replaced(function: Callable[..., Any]) -> Operator:
    """An operator of nobody's, for a single node."""
    return Operator(function, 1, NEWEST_OPSET, {}, None, False, lambda _: "")


def op(*names: str, **options: Any) -> Callable[[_F], _F]:
    """Decorate the function of an operator; the options are those of `register`."""

    def enter(function: _F) -> _F:
        register(function, *names, **options)
        return function

    return enter


def supported_ops() -> dict[str, list[tuple[str, list[int]]]]:
    """Domain -> operators in order, each with the versions at which its meaning here begins."""
    found: dict[str, list[tuple[str, list[int]]]] = {}
    for (domain, name), versions in sorted(_REGISTRY.items()):
        found.setdefault(domain, []).append((name, sorted(versions)))
    return found


def find_operator(call: Call) -> Operator | str:
    """The function for a node, or why there is none."""
    node = call.node
    domain = "" if node.domain == "ai.onnx" else node.domain
    versions = _REGISTRY.get((domain, node.op_type))
    if versions is None:
        known = sorted(name for own, name in _REGISTRY if own == domain)
        listed = ", ".join(known) if known else f"nothing of this domain; domains: ai.onnx, {MICROSOFT}"
        return f"the operator is not among those implemented in PyTorch ({listed})"
    fitting = [since for since in versions if since <= call.version]
    if not fitting:
        return f"version {call.version} of its domain is older than {min(versions)}, the first one implemented"
    operator = versions[max(fitting)]
    changed = _last_change(node.op_type, call.version) if not domain else operator.since
    if changed > operator.until:
        return f"its meaning changed at version {changed}; implemented up to {operator.until}"
    for name, allowed in operator.only.items():
        if name in node.attributes and call.get(name) not in allowed:
            values = ", ".join(map(repr, allowed))
            return f"{name}={call.get(name)!r} is not implemented, only {values}"
    unknown = sorted(set(node.attributes) - operator.knows) if operator.knows is not None else []
    if unknown:
        return f"attribute {', '.join(unknown)} is not implemented, only {', '.join(sorted(operator.knows or ()))}"
    return operator.refuses(call) or operator


def _last_change(op_type: str, version: int) -> int:
    """The version of the standard in which an operator got the meaning that it has at `version`; 0 if it has none."""
    try:
        return int(onnx.defs.get_schema(op_type, min(version, onnx.defs.onnx_opset_version()), "").since_version)
    except onnx.defs.SchemaError:
        return 0  # ONNX Runtime puts a few of its own operators into the standard's domain
