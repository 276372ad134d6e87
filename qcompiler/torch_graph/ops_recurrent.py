"""RNN, GRU and LSTM, step by step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.torch_graph.registry import Call, op

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "Affine": lambda x, alpha=1.0, beta=0.0: alpha * x + beta,
    "Elu": lambda x, alpha=1.0, _=0.0: functional.elu(x, alpha),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "LeakyRelu": lambda x, alpha=0.01, _=0.0: functional.leaky_relu(x, alpha),
    "Relu": lambda x, *_: torch.relu(x),
    "Sigmoid": lambda x, *_: torch.sigmoid(x),
    "Softsign": lambda x, *_: functional.softsign(x),
    "Tanh": lambda x, *_: torch.tanh(x),
}
_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}


def _refusal(call: Call) -> str:
    unknown = sorted({str(name) for name in call.get("activations", [])} - _ACTIVATIONS.keys())
    if unknown:
        return f"activation {', '.join(unknown)} is not implemented, only {', '.join(_ACTIVATIONS)}"
    if call.get("activation_alpha") or call.get("activation_beta"):
        return "activation_alpha and activation_beta are not implemented"
    return ""


def _activations(call: Call, direction: int) -> list[Callable[[Tensor], Tensor]]:
    """The functions of one direction; `clip` limits what they get."""
    usual = _DEFAULTS[call.node.op_type]
    names = call.get("activations", usual * 2)[direction * len(usual) :][: len(usual)]
    clip = call.get("clip", 0.0)
    return [_clipped(_ACTIVATIONS[name], clip) if clip else _ACTIVATIONS[name] for name in names]


def _clipped(function: Callable[..., Tensor], limit: float) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x.clamp(-limit, limit))


def _run(call: Call, step: Callable[..., list[Tensor]], x: Tensor, lengths: Tensor | None, inputs: list[Any]) -> Any:
    """Run every direction over the sequence.

    Args:
        call: The node.
        step: (direction, x of a time, state) -> the next state, the hidden one first.
        x: [time, batch, features].
        lengths: int32 [batch], or None where all sequences are whole.
        inputs: The states [directions, batch, hidden] to begin with.

    Returns:
        Hidden states [time, directions, batch, hidden], and the last states.
    """
    mode = call.get("direction", "forward")
    reversed_ = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[mode]
    outputs, last = [], []
    for direction, backwards in enumerate(reversed_):
        state = [value[direction] for value in inputs]
        rows: list[Any] = [None] * x.shape[0]
        for time in range(x.shape[0] - 1, -1, -1) if backwards else range(x.shape[0]):
            new = step(direction, x[time], state)
            shown = new[0]
            if lengths is not None:  # what has ended keeps its state and shows zeros
                alive = (time < lengths)[:, None]
                new = [torch.where(alive, after, before) for after, before in zip(new, state, strict=True)]
                shown = torch.where(alive, shown, torch.zeros_like(shown))
            rows[time], state = shown, new
        outputs.append(torch.stack(rows))
        last.append(state)
    return torch.stack(outputs, 1), [torch.stack(each) for each in zip(*last, strict=True)]


def _start(state: Tensor | None, x: Tensor, directions: int, hidden: int) -> Tensor:
    return x.new_zeros(directions, x.shape[1], hidden) if state is None else state


def _laid_out(call: Call, hidden: Tensor, last: list[Tensor]) -> tuple[Tensor, ...]:
    """Outputs as the node's layout has them."""
    if not call.get("layout", 0):
        return hidden, *last
    return hidden.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in last)


def _time_first(call: Call, *tensors: Tensor | None) -> list[Any]:
    swap = call.get("layout", 0)
    return [value.transpose(0, 1) if swap and value is not None else value for value in tensors]


def _halves(bias: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor]:
    """The biases [directions, gates * hidden] of the input and of the recurrence."""
    if bias is None:
        zero = w.new_zeros(w.shape[:2])
        return zero, zero
    wb, rb = bias.chunk(2, 1)
    return wb, rb


@op("RNN", since=7, refuses=_refusal)
def _rnn(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
) -> tuple[Tensor, ...]:
    x, initial_h = _time_first(call, x, initial_h)
    wb, rb = _halves(bias, w)

    def step(d: int, x_t: Tensor, state: list[Tensor]) -> list[Tensor]:
        (f,) = _activations(call, d)
        return [f(x_t @ w[d].T + state[0] @ r[d].T + wb[d] + rb[d])]

    return _laid_out(call, *_run(call, step, x, lengths, [_start(initial_h, x, w.shape[0], r.shape[-1])]))


@op("GRU", since=7, refuses=_refusal)
def _gru(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
) -> tuple[Tensor, ...]:
    x, initial_h = _time_first(call, x, initial_h)
    wb, rb = _halves(bias, w)

    def step(d: int, x_t: Tensor, state: list[Tensor]) -> list[Tensor]:
        f, g = _activations(call, d)
        (h,) = state
        xz, xr, xh = (x_t @ w[d].T + wb[d]).chunk(3, -1)
        rz, rr, rh = r[d].chunk(3)
        bz, br, bh = rb[d].chunk(3)
        z, reset = f(xz + h @ rz.T + bz), f(xr + h @ rr.T + br)
        recurrent = reset * (h @ rh.T + bh) if call.get("linear_before_reset", 0) else (reset * h) @ rh.T + bh
        return [(1 - z) * g(xh + recurrent) + z * h]

    return _laid_out(call, *_run(call, step, x, lengths, [_start(initial_h, x, w.shape[0], r.shape[-1])]))


@op("LSTM", since=7, refuses=_refusal)
def _lstm(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    x, initial_h, initial_c = _time_first(call, x, initial_h, initial_c)
    wb, rb = _halves(bias, w)

    def step(d: int, x_t: Tensor, state: list[Tensor]) -> list[Tensor]:
        f, g, last = _activations(call, d)
        h, c = state
        i, o, forget, cell = (x_t @ w[d].T + h @ r[d].T + wb[d] + rb[d]).chunk(4, -1)
        pi, po, pf = (0, 0, 0) if peepholes is None else peepholes[d].chunk(3)
        i = f(i + pi * c)
        forget = 1 - i if call.get("input_forget", 0) else f(forget + pf * c)
        c = forget * c + i * g(cell)
        return [f(o + po * c) * last(c), c]

    start = [_start(state, x, w.shape[0], r.shape[-1]) for state in (initial_h, initial_c)]
    return _laid_out(call, *_run(call, step, x, lengths, start))
