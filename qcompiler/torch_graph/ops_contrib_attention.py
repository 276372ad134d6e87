"""Attention as ONNX Runtime has it: GroupQueryAttention, MultiHeadAttention, RotaryEmbedding."""

import math
from typing import Any

import torch
from torch import Tensor

from qcompiler.torch_graph.ops_attention import attend, heads_first, heads_last, repeated, rotate
from qcompiler.torch_graph.registry import MICROSOFT, Call, op


def _rotary_refusal(call: Call) -> str:
    return "is_packed_batching is not implemented" if call.get("is_packed_batching", 0) else ""


@op(
    "RotaryEmbedding",
    domain=MICROSOFT,
    knows="interleaved is_packed_batching num_heads rotary_embedding_dim scale",
    refuses=_rotary_refusal,
)
def _rotary_embedding(call: Call, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    flat = x.ndim == 3
    if flat:
        width = call.get("rotary_embedding_dim", 0)
        heads = call.get("num_heads", 0) if width else x.shape[-1] // (2 * cos.shape[-1])
        x = heads_first(x, heads)
    if positions.numel() == 1:
        positions = positions.reshape(1, 1) + torch.arange(x.shape[2])
    result = rotate(x, cos[positions], sin[positions], bool(call.get("interleaved", 0)))
    return heads_last(result) if flat else result


def _split_heads(call: Call, query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, S, D], of three tensors or of one that holds all."""
    heads, kv_heads = call.get("num_heads"), call.get("kv_num_heads")
    if key is None or value is None:
        size = query.shape[-1] // (heads + 2 * kv_heads)
        query, key, value = query.split([heads * size, kv_heads * size, kv_heads * size], -1)
    return heads_first(query, heads), heads_first(key, kv_heads), heads_first(value, kv_heads)


def _appended(past: Tensor | None, new: Tensor, place: Tensor, total: int) -> Tensor:
    """The cache [B, H, T, D] with the new rows at `place` [B, S]; what lies behind them is not read."""
    length = max(total, 0 if past is None else past.shape[2])
    start = new.new_zeros(new.shape[0], new.shape[1], length, new.shape[3])
    if past is not None:
        start = torch.cat([past, start[:, :, past.shape[2] :]], 2)
    return start.scatter(2, place[:, None, :, None].expand(new.shape), new)


_GROUP_KNOWS = (
    "num_heads kv_num_heads do_rotary rotary_interleaved scale local_window_size softcap smooth_softmax "
    "qk_output k_quant_type v_quant_type kv_cache_bit_width"
)


def _group_refusal(call: Call) -> str:
    if call.has_input(11):
        return "head_sink is not implemented"
    if call.has_input(12) or call.has_input(13) or call.has_input(14):
        return "quantized caches and further inputs are not implemented"
    for name in ("smooth_softmax", "qk_output"):
        if call.get(name, 0) > 0:
            return f"{name} is not implemented"
    quantized = [name for name in ("k_quant_type", "v_quant_type") if call.get(name, "NONE") != "NONE"]
    return f"{', '.join(quantized)} is not implemented" if quantized else ""


@op("GroupQueryAttention", domain=MICROSOFT, knows=_GROUP_KNOWS, refuses=_group_refusal)
def _group_query_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    seqlens_k: Tensor,
    total_length: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _split_heads(call, query, key, value)
    new, total = q.shape[2], int(total_length)
    length = seqlens_k.reshape(-1, 1).to(torch.int64) + 1  # [B, 1]: keys of a row, the new ones included
    # The first prompt may be padded at its end; later rows begin right behind their past.
    past = torch.zeros_like(length) if new == total else length - new
    place = past + torch.arange(new)  # [B, S]
    if call.get("do_rotary", 0):
        assert cos is not None
        assert sin is not None
        angle = place.clamp(max=cos.shape[0] - 1) if positions is None else positions
        interleaved = bool(call.get("rotary_interleaved", 0))
        q, k = (rotate(x, cos[angle], sin[angle], interleaved) for x in (q, k))
    keys, values = _appended(past_key, k, place, total), _appended(past_value, v, place, total)
    at = torch.arange(total)
    seen = at <= place[..., None]  # [B, S, T]
    window = call.get("local_window_size", -1)
    if window > 0:
        seen = seen & (at > place[..., None] - window)
    scale = call.get("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    scores = torch.matmul(q * scale, repeated(keys[:, :, :total], q.shape[1]).mT)
    mask: Tensor = seen[:, None]
    if bias is not None:
        mask = torch.where(mask, bias[..., :total], torch.full((), -math.inf, dtype=scores.dtype))
    softcap = call.get("softcap", 0.0)
    wide = torch.promote_types(scores.dtype, torch.float32)
    result = attend(scores, repeated(values[:, :, :total], q.shape[1]), mask, softcap, wide)
    return heads_last(result), keys, values


def _multi_head_refusal(call: Call) -> str:
    if call.has_input(8) or call.has_input(9):
        return "past_sequence_length and cache_indirection are not implemented"
    return "output qk is not implemented" if call.wants(3) else ""


def _multi_heads(
    heads: int, query: Tensor, key: Tensor | None, value: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, S, D] of every form that MultiHeadAttention takes, biases added."""
    if key is None:  # [B, S, heads, 3, D]
        query, key, value = (part.flatten(2) for part in query.unbind(3))
    elif value is None:  # [B, S, heads, 2, D]
        key, value = (part.flatten(2) for part in key.unbind(3))
    assert value is not None
    if bias is not None:
        width, value_width = query.shape[-1], bias.shape[0] - 2 * query.shape[-1]
        q_bias, k_bias, v_bias = bias.split([width, width, value_width])
        query = query + q_bias
        if key.ndim == 3:
            key, value = key + k_bias, value + v_bias
    if key.ndim == 3:
        key, value = heads_first(key, heads), heads_first(value, heads)
    return heads_first(query, heads), key, value


@op(
    "MultiHeadAttention",
    domain=MICROSOFT,
    knows="num_heads mask_filter_value scale unidirectional",
    refuses=_multi_head_refusal,
)
def _multi_head_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _multi_heads(call.get("num_heads"), query, key, value, bias)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    queries, keys = q.shape[2], k.shape[2]
    added = q.new_zeros(1, 1, queries, keys) if attention_bias is None else attention_bias
    lowest = call.get("mask_filter_value", -10000.0)
    if padding is not None:
        added = added.masked_fill(_padding(padding, keys), lowest)
    if call.get("unidirectional", 0):
        future = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
        added = added + added.new_zeros(queries, keys).masked_fill(future, lowest)
    scale = call.get("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    return heads_last(attend(torch.matmul(q * scale, k.mT), v, added, 0.0, wide)), k, v


def _padding(padding: Tensor, keys: int) -> Tensor:
    """Which keys are hidden, to be broadcast to [B, H, S, T]: by a length a row, or a mask with zeros."""
    if padding.ndim == 1:
        return (torch.arange(keys) >= padding[:, None])[:, None, None]
    hidden = padding == 0
    return hidden[:, None, None] if padding.ndim == 2 else hidden[:, None]
