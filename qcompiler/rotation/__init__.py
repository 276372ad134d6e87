"""Rotating channels of a model without changing what it computes.

A *mix* is an orthogonal matrix for each of several groups of channels. If what writes an activation X gives X R, and
what reads it takes X R for X, the model computes what it did: weights [N, K] become R^T W where they write, and W R
where they read. `streams` finds the activations through which all layers talk to each other, `heads` the values of an
attention, and `mixing` changes constants.
"""

from qcompiler.rotation.heads import linear_heads, mix_heads, reads_attention
from qcompiler.rotation.mixing import Changes, Mix, Order
from qcompiler.rotation.streams import Gain, Reader, Stream, find_streams

__all__ = [
    "Changes", "Gain", "Mix", "Order", "Reader", "Stream", "find_streams", "linear_heads", "mix_heads",
    "reads_attention",
]  # fmt: skip
