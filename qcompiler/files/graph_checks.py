"""Checks on the wiring of a model as it was stored: names, order, cycles and function calls.

They run on the protobuf message, not on the `onnx_ir` model made of it, since making it drops or mends what is wrong.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import onnx

from qcompiler.errors import ModelError

__all__ = ["attribute_graphs", "check_wiring", "describe_node"]

_EXPORT_AGAIN = "the file is damaged or its export is broken: export the model again"


class _Scope(NamedTuple):
    """Names that a graph defines, each with its node's index (-1: input or initializer), and the node looked from."""

    defined: dict[str, int]
    reader: int


def check_wiring(model: onnx.ModelProto, where: str) -> bool:
    """Check that every name is defined once, somewhere, and not by way of itself.

    Args:
        model: The stored model.
        where: What messages begin with: the file's name.

    Returns:
        Whether some node comes before one that it reads from, so that the graph has to be sorted.

    Raises:
        ModelError: A value or node that is defined twice or nowhere, a cycle, or a function that calls itself.
    """
    checker = _Checker(where)
    graph = model.graph
    checker.refuse_unsupported(graph)
    inputs = [value.name for value in graph.input]
    initializers = [tensor.name for tensor in graph.initializer]
    checker.body("the graph", inputs, initializers, graph.node, [value.name for value in graph.output], ())
    for function in model.functions:
        checker.body(f"function '{function.name}'", function.input, (), function.node, function.output, ())
    checker.functions(model.functions)
    return checker.unsorted


def describe_node(node: onnx.NodeProto) -> str:
    """The node as messages print it."""
    if node.name:
        return f"node '{node.name}' ({node.op_type})"
    return f"the {node.op_type} node that computes '{node.output[0] if node.output else ''}'"


def attribute_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a control-flow node."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


class _Checker:
    """Walks graphs; remembers whether one of them is out of order."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.unsorted = False

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.where}: {what}")

    def body(
        self,
        title: str,
        inputs: Iterable[str],
        initializers: Iterable[str],
        nodes: Sequence[onnx.NodeProto],
        outputs: Iterable[str],
        scopes: tuple[_Scope, ...],
    ) -> set[str]:
        """Check one graph or function body; returns the names it takes from the graphs around it."""
        defined = self._definitions(title, inputs, initializers, nodes, scopes)
        captured: set[str] = set()
        edges: list[list[int]] = []
        for index, node in enumerate(nodes):
            reads = [name for name in node.input if name]
            for graph in attribute_graphs(node):
                reads += sorted(self._subgraph(node, graph, (*scopes, _Scope(defined, index))))
            for name in reads:
                if name not in defined and not any(name in scope.defined for scope in scopes):
                    raise self.fail(f"{describe_node(node)} reads '{name}', which nothing computes; {_EXPORT_AGAIN}")
            captured.update(name for name in reads if name not in defined)
            edges.append([defined[name] for name in reads if defined.get(name, -1) >= 0])
        for name in outputs:
            if name not in defined:
                what = f"and nothing computes it; {_EXPORT_AGAIN}"
                if any(name in scope.defined for scope in scopes):
                    what = "a value from around it, which ONNX Runtime refuses; put an Identity in between"
                raise self.fail(f"{title} returns '{name}', {what}")
        if any(source >= index for index, sources in enumerate(edges) for source in sources):
            self.unsorted = True
            self._refuse_cycle(nodes, edges)
        return captured

    def _definitions(
        self,
        title: str,
        inputs: Iterable[str],
        initializers: Iterable[str],
        nodes: Sequence[onnx.NodeProto],
        scopes: tuple[_Scope, ...],
    ) -> dict[str, int]:
        """Every name that a body defines with the index of its node; -1 for inputs and initializers."""
        defined: dict[str, int] = {}
        for name in inputs:
            if name in defined:
                raise self.fail(f"{title} has two inputs named '{name}'; rename one")
            defined[name] = -1
        weights: set[str] = set()
        for name in initializers:
            if not name or name in weights:
                what = f"two initializers named '{name}'" if name else "an initializer without a name"
                raise self.fail(f"{title} has {what}; {_EXPORT_AGAIN}")
            weights.add(name)
            defined[name] = -1
        names: set[str] = set()
        for index, node in enumerate(nodes):
            self._check_node(node)
            if node.name and node.name in names:
                raise self.fail(f"{title} has two nodes named '{node.name}', which ONNX Runtime refuses; rename one")
            names.add(node.name)
            for name in node.output:
                if not name:
                    continue
                if name in defined or any(scope.defined.get(name, scope.reader) < scope.reader for scope in scopes):
                    raise self.fail(f"{describe_node(node)} computes '{name}', which is defined already; rename one")
                defined[name] = index
        return defined

    def _check_node(self, node: onnx.NodeProto) -> None:
        """Check what a node says about itself alone."""
        texts = (node.op_type, node.domain, node.name, *node.input, *node.output, *(a.name for a in node.attribute))
        if not all(isinstance(text, str) for text in texts):  # protobuf gives bytes that are no text as bytes
            raise self.fail(f"{describe_node(node)} has a name that is not UTF-8; {_EXPORT_AGAIN}")
        if not node.op_type:
            raise self.fail(f"{describe_node(node)} names no operator; {_EXPORT_AGAIN}")
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.UNDEFINED and not attribute.ref_attr_name:
                raise self.fail(f"attribute '{attribute.name}' of {describe_node(node)} has no type; {_EXPORT_AGAIN}")

    def _subgraph(self, node: onnx.NodeProto, graph: onnx.GraphProto, scopes: tuple[_Scope, ...]) -> set[str]:
        self.refuse_unsupported(graph)
        inputs = [value.name for value in graph.input]
        initializers = [tensor.name for tensor in graph.initializer]
        title = f"a body of {describe_node(node)}"
        return self.body(title, inputs, initializers, graph.node, [value.name for value in graph.output], scopes)

    def refuse_unsupported(self, graph: onnx.GraphProto) -> None:
        """Refuse maps, which onnx_ir does not know, and sparse initializers, which it would drop."""
        for value in (*graph.input, *graph.output, *graph.value_info):
            if _is_map(value.type):
                raise self.fail(f"value '{value.name}' is a map, which is not supported; export it without ZipMap")
        for sparse in graph.sparse_initializer:
            raise self.fail(f"initializer '{sparse.values.name}' is sparse, which is not supported; store it densely")

    def _refuse_cycle(self, nodes: Sequence[onnx.NodeProto], edges: list[list[int]]) -> None:
        """Raise an error that names a cycle if there is one; `edges` lists the nodes that each node reads from."""
        cycle = find_cycle(edges)
        if cycle:
            names = [describe_node(nodes[index]) for index in cycle[:4]]
            more = f" -> {len(cycle) - 4} more" if len(cycle) > 4 else ""
            path = " -> ".join(names) + more + " -> " + names[0]
            raise self.fail(f"the graph has a cycle: {path}; {_EXPORT_AGAIN}")

    def functions(self, functions: Sequence[onnx.FunctionProto]) -> None:
        """Refuse functions that are defined twice or call themselves."""
        keys = [_function_key(f.domain, f.name, f.overload) for f in functions]
        index = {key: number for number, key in enumerate(keys)}
        if len(index) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise self.fail(f"function '{twice[1]}' of domain '{twice[0]}' is defined twice; {_EXPORT_AGAIN}")
        edges = [sorted({index[key] for key in _calls(f.node) if key in index}) for f in functions]
        cycle = find_cycle(edges)[::-1]
        if cycle:
            names = " -> ".join(f"'{functions[number].name}'" for number in (*cycle, cycle[0]))
            raise self.fail(f"functions call themselves: {names}; ONNX allows no recursion: use a Loop")


def find_cycle(edges: Sequence[Sequence[int]]) -> list[int]:
    """One cycle in the order of the data flow, or nothing; ``edges[i]`` lists what i reads from."""
    state = [0] * len(edges)  # 0 unseen, 1 on the path, 2 done
    for root in range(len(edges)):
        path, todo = [], [(root, iter(edges[root]))] if not state[root] else []
        if todo:
            state[root] = 1
            path.append(root)
        while todo:
            here, rest = todo[-1]
            source = next((s for s in rest if state[s] != 2), None)
            if source is None:
                state[here] = 2
                todo.pop()
                path.pop()
            elif state[source] == 1:
                return path[path.index(source) :][::-1]
            else:
                state[source] = 1
                path.append(source)
                todo.append((source, iter(edges[source])))
    return []


def _is_map(kind: onnx.TypeProto) -> bool:
    """Whether values of this type are maps, or sequences of maps."""
    while kind.WhichOneof("value") in ("sequence_type", "optional_type"):
        kind = getattr(kind, str(kind.WhichOneof("value"))).elem_type
    return bool(kind.WhichOneof("value") == "map_type")


def _function_key(domain: str, name: str, overload: str) -> tuple[str, str, str]:
    return ("" if domain == "ai.onnx" else domain, name, overload)


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, str, str]]:
    for node in nodes:
        yield _function_key(node.domain, node.op_type, node.overload)
        for graph in attribute_graphs(node):
            yield from _calls(graph.node)
