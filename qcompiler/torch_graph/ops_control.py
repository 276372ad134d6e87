"""If, Loop and Scan: Python runs the bodies, which see the values around them."""

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.torch_graph.dtypes import TORCH_DTYPES
from qcompiler.torch_graph.registry import Call, op

_Scope = dict[str, Tensor]


def _run(call: Call, attribute: str, scope: _Scope, inputs: list[Any]) -> list[Tensor]:
    """The outputs of a body on its inputs, and on those values around it that it reads."""
    body, names = call.bodies[attribute]
    feeds = {name: value for name, value in scope.items() if name in body.names}
    feeds.update(zip(names, inputs, strict=False))
    results = body.run(feeds)
    return [results[name] for name in body.outputs]


@op("If", scoped=True)
def _if(call: Call, scope: _Scope, condition: Tensor) -> tuple[Tensor, ...]:
    return tuple(_run(call, "then_branch" if bool(condition) else "else_branch", scope, []))


@op("Loop", scoped=True)
def _loop(
    call: Call, scope: _Scope, trips: Tensor | None, condition: Tensor | None = None, *state: Tensor
) -> tuple[Tensor, ...]:
    carried = list(state)
    rows: list[list[Tensor]] = []
    going = condition is None or bool(condition)
    number = 0
    while going and (trips is None or number < int(trips)):
        going_on, *results = _run(call, "body", scope, [torch.tensor(number), torch.tensor(going), *carried])
        carried, scanned = results[: len(carried)], results[len(carried) :]
        rows.append(scanned)
        going, number = bool(going_on), number + 1
    count = len(call.node.outputs) - len(carried)
    if not rows:
        return (*carried, *(_nothing(value) for value in call.get("body").outputs[1 + len(carried) :]))
    return (*carried, *(torch.stack([row[i] for row in rows]) for i in range(count)))


def _nothing(value: ir.Value) -> Tensor:
    """What collects a value that was never computed: no rows of the type and, as far as it is known, shape declared."""
    sizes = [] if value.shape is None else [size if isinstance(size, int) else 0 for size in value.shape]
    return torch.zeros(0, *sizes, dtype=TORCH_DTYPES[value.dtype or ir.DataType.FLOAT])


@op("Scan", scoped=True, since=9)
def _scan(call: Call, scope: _Scope, *inputs: Tensor) -> tuple[Tensor, ...]:
    count = call.get("num_scan_inputs")
    carried, scanned = list(inputs[: len(inputs) - count]), inputs[len(inputs) - count :]
    axes = call.get("scan_input_axes", [0] * count)
    backwards = call.get("scan_input_directions", [0] * count)
    sequences = [
        (value.flip(axis) if back else value).movedim(axis, 0)
        for value, axis, back in zip(scanned, axes, backwards, strict=True)
    ]
    rows: list[list[Tensor]] = []
    for items in zip(*sequences, strict=True):
        results = _run(call, "body", scope, [*carried, *items])
        carried, made = results[: len(carried)], results[len(carried) :]
        rows.append(made)
    outputs = len(call.node.outputs) - len(carried)
    out_axes = call.get("scan_output_axes", [0] * outputs)
    flipped = call.get("scan_output_directions", [0] * outputs)
    stacked = [torch.stack([row[i] for row in rows], out_axes[i]) for i in range(outputs)]
    return (*carried, *(value.flip(out_axes[i]) if flipped[i] else value for i, value in enumerate(stacked)))
