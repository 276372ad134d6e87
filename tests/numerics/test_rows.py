"""Rows of features and of tokens out of activations."""

import numpy as np
import pytest

from qcompiler.numerics.rows import feature_rows, split_heads, token_rows
from tests.builders import normal

MASK = np.array([[1, 1, 0], [1, 0, 0]], bool)


def test_the_last_axis_holds_the_features():
    value = normal((2, 3, 4), 0)
    assert np.array_equal(feature_rows(value), value.reshape(6, 4))
    assert np.array_equal(feature_rows(value, 2), value.reshape(6, 4))
    assert np.array_equal(feature_rows(value[0]), value[0])
    assert np.array_equal(feature_rows(value[0, 0]), value[0, :1])


def test_a_convolution_has_its_features_on_axis_1():
    value = normal((2, 3, 4, 5), 1)
    rows = feature_rows(value, 1)
    assert rows.shape == (40, 3)
    assert np.array_equal(rows[1 * 20 + 2 * 5 + 3], value[1, :, 2, 3])
    assert np.array_equal(feature_rows(value[..., 0], 1)[5], value[1, :, 1, 0])


def test_padding_is_left_out_wherever_the_tokens_run():
    """Some exporters flatten [B, S, K] before a Gemm; attention has heads in front of the tokens, or merged with B."""
    value = normal((2, 3, 4), 2)
    wanted = value[[0, 0, 1], [0, 1, 0]]
    assert np.array_equal(token_rows(value, MASK), wanted)
    assert np.array_equal(token_rows(value.reshape(6, 4), MASK), wanted)
    heads = normal((2, 5, 3, 4), 3)
    wanted = np.stack([heads[0, :, 0], heads[0, :, 1], heads[1, :, 0]])
    assert np.array_equal(token_rows(heads, MASK), wanted)
    assert np.array_equal(token_rows(heads.reshape(10, 3, 4), MASK), wanted)
    assert np.array_equal(token_rows(np.moveaxis(heads, 2, 1), MASK), wanted)
    assert np.array_equal(feature_rows(heads, -1, MASK), wanted.reshape(15, 4))


def test_padding_is_left_out_where_the_features_are_not_last():
    value = normal((2, 4, 3), 5)
    assert np.array_equal(feature_rows(value, 1, MASK), value.swapaxes(1, 2)[[0, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize("shape", [(2, 4, 4), (3, 2, 4), (5, 4), (2, 5, 4, 3), (4,), (2, 3)])
def test_a_mask_of_another_shape_masks_nothing(shape):
    value = normal(shape, 3)
    assert token_rows(value, MASK) is value
    assert np.array_equal(feature_rows(value, -1, MASK), value.reshape(-1, shape[-1]))


def test_without_a_mask_nothing_is_padding():
    value = normal((2, 3, 4), 3)
    assert token_rows(value, None) is value


def test_heads_are_told_from_rows_by_the_tokens():
    merged = normal((10, 4, 3), 6)  # keys, transposed
    assert np.array_equal(split_heads(merged, MASK), merged.reshape(2, 5, 4, 3))
    for other in (normal((10, 4, 4), 6), normal((9, 3, 4), 6), normal((2, 3, 4), 6)):
        assert split_heads(other, MASK) is other
    assert split_heads(merged, None) is merged


def test_rows_are_views_in_the_type_of_the_values():
    value = normal((2, 3, 4), 4, "float16")
    rows = feature_rows(value)
    assert rows.dtype == np.float16
    assert np.shares_memory(rows, value)
