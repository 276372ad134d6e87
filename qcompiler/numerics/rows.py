"""Activations as rows: which axis runs along tokens, which along features, and which tokens are padding."""

import numpy as np

__all__ = ["feature_rows", "split_heads", "token_rows"]


def feature_rows(values: np.ndarray, axis: int = -1, mask: np.ndarray | None = None) -> np.ndarray:
    """An activation as rows of features, without those of padding.

    Args:
        values: Any rank; `axis` runs along K.
        axis: The feature axis.
        mask: See `token_rows`.

    Returns:
        ``[T, K]`` in the dtype of the values, a view where that can be.
    """
    last = values if axis in (-1, values.ndim - 1) else np.moveaxis(values, axis, -1)
    rows = token_rows(last, mask)
    return np.asarray(rows.reshape(-1, rows.shape[-1]))


def token_rows(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """An activation without what belongs to padding; its last axis stays the last.

    Args:
        values: Any shape.
        mask: bool ``[B, S]``, False where a token is padding, or None.

    Returns:
        ``[T, ...]`` for values ``[B, S, ..., K]`` or ``[B * S, K]``, ``[T, H, K]`` for ``[B, H, S, K]`` or
        ``[B * H, S, K]``; anything else as it is.
    """
    if mask is None:
        return values
    if values.ndim > 2 and values.shape[:2] == mask.shape:
        return np.asarray(values[mask])
    if values.ndim == 2 and len(values) == mask.size:
        return np.asarray(values[mask.reshape(-1)])
    heads = split_heads(values, mask)
    if heads.ndim == 4 and (heads.shape[0], heads.shape[2]) == mask.shape:
        return np.asarray(np.moveaxis(heads, 2, 1)[mask])
    return values


def split_heads(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """``[B, H, ...]`` for values ``[B * H, ...]`` of three axes, one of them along the S tokens; others as they are."""
    if mask is None or values.ndim != 3 or values.shape[:2] == mask.shape:
        return values
    rows, length = mask.shape
    if values.shape[0] <= rows or values.shape[0] % rows or length not in values.shape[1:]:
        return values
    return values.reshape(rows, -1, *values.shape[1:])
