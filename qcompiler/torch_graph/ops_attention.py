"""Attention and rotary embedding of the standard, and what ONNX Runtime's share with them."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompiler.torch_graph.dtypes import TORCH_DTYPES
from qcompiler.torch_graph.registry import Call, op

__all__ = ["attend", "heads_first", "heads_last", "rotate"]


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads * D] -> [B, heads, S, D]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def heads_last(x: Tensor) -> Tensor:
    """[B, heads, S, D] -> [B, S, heads * D]."""
    return x.transpose(1, 2).flatten(2)


def repeated(x: Tensor, heads: int) -> Tensor:
    """[B, H, S, D] -> [B, heads, S, D]: each of H heads serves heads / H queries."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of channels.

    Args:
        x: [B, heads, S, D].
        cos: [B or 1, S, R / 2]; the first R channels of D are turned.
        sin: The same.
        interleaved: Whether the pairs are neighbours; otherwise the halves of R meet.

    Returns:
        [B, heads, S, D].
    """
    width = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def attend(scores: Tensor, value: Tensor, mask: Tensor | None, softcap: float, dtype: torch.dtype) -> Tensor:
    """Softmax of the scores [B, H, S, T] times value [B, H, T, D]; bools in the mask leave out, floats are added."""
    return torch.matmul(_softmax(_masked(_capped(scores, softcap), mask, None), dtype), value)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Probabilities; a row that sees nothing has zeros, and a gradient of zero."""
    wide = scores.to(dtype)
    blind = (wide == -math.inf).all(-1, keepdim=True)
    return torch.softmax(wide.masked_fill(blind, 0), -1).masked_fill(blind, 0).to(scores.dtype)


def _visible(call: Call, queries: int, keys: int, past: int, lengths: Tensor | None) -> Tensor | None:
    """Which keys a query may see by its place alone, bools to be broadcast to [B, H, S, T]; None where all."""
    key, query = torch.arange(keys), torch.arange(queries)[:, None]
    if lengths is None:
        seen, place = None, query + past
    else:
        length = lengths[:, None, None, None]
        seen, place = key < length, query + length - queries
    left, right = call.get("left_window_size", -1), call.get("right_window_size", -1)
    if call.get("is_causal", 0):
        right = 0
    if right >= 0:
        ahead = key <= place + right
        seen = ahead if seen is None else seen & ahead
    if left >= 0:
        behind = key >= place - left
        seen = behind if seen is None else seen & behind
    return seen


def _masked(scores: Tensor, mask: Tensor | None, seen: Tensor | None) -> Tensor:
    """Scores [B, H, S, T] with the mask added (bools leave out) and what is not seen left out."""
    if mask is not None:
        missing = scores.shape[-1] - mask.shape[-1]
        if missing and mask.shape[-1] != 1:  # keys beyond the mask are left out
            mask = pad(mask, (0, missing), value=False if mask.dtype == torch.bool else -math.inf)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores if seen is None else scores.masked_fill(~seen, -math.inf)


@op("Attention")
def _attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    flat = q.ndim == 3
    if flat:
        heads, kv_heads = call.get("q_num_heads"), call.get("kv_num_heads")
        q, k, v = heads_first(q, heads), heads_first(k, kv_heads), heads_first(v, kv_heads)
    past = 0
    if past_key is not None and past_value is not None:
        past, k, v = past_key.shape[2], torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    root = math.sqrt(call.get("scale", 1 / math.sqrt(q.shape[-1])))
    raw = torch.matmul(q * root, repeated(k, q.shape[1]).mT * root)
    capped = _capped(raw, call.get("softcap", 0.0))
    masked = _masked(capped, mask, _visible(call, q.shape[2], k.shape[2], past, lengths))
    precision = call.get("softmax_precision")
    weights = _softmax(masked, TORCH_DTYPES[call.kind("softmax_precision")] if precision else masked.dtype)
    result = torch.matmul(weights, repeated(v, q.shape[1]))
    shown = (raw, capped, masked, weights)[call.get("qk_matmul_output_mode", 0)] if call.wants(3) else raw
    return (heads_last(result) if flat else result), k, v, shown


@op("RotaryEmbedding", since=23)
def _rotary_embedding(call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    flat = x.ndim == 3
    if flat:
        x = heads_first(x, call.get("num_heads"))
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    half = call.get("rotary_embedding_dim", 0) // 2 or x.shape[-1] // 2
    result = rotate(x, cos[..., :half], sin[..., :half], bool(call.get("interleaved", 0)))
    return heads_last(result) if flat else result
