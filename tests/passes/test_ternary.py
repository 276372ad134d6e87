"""Ternary weights, w1.58a16: every algorithm leaves three values a group, which ONNX Runtime's 2-bit kernel runs."""

import numpy as np
import pytest

from qcompiler.numerics.metrics import sqnr_db
from tests.builders import apply, context, linear_model, normal, quantized, run, the_site


def ternary_by_brute_force(row):
    """The least squared error of a group: for each number of values that are not zero, the largest are kept."""
    sizes = np.sort(np.abs(row))[::-1].astype(np.float64)
    kept = np.cumsum(sizes) ** 2 / np.arange(1, len(sizes) + 1)
    return float(np.square(sizes).sum() - kept.max())


@pytest.mark.parametrize("algorithm", ["rtn", "hqq", "gptq", "obq"])
def test_three_values_in_a_group(algorithm):
    batches = [{"x": normal((64, 64), seed)} for seed in range(3)]
    ctx = context(scheme="w1.58a16-g32", batches=batches)
    model = quantized(linear_model(64, 24), ctx, algorithm)
    tensor = the_site(model).quantized
    assert set(np.unique(tensor.codes())) == {1, 2, 3}
    assert tensor.zero_point is None
    assert (tensor.scale > 0).all()
    weight = tensor.dequantized()
    for group in weight.reshape(24, 2, 32).reshape(-1, 32):
        assert len(np.unique(np.abs(group))) <= 2
    apply("fuse_matmul_nbits", model, ctx)
    (found,) = run(model, batches[0])
    assert sqnr_db(batches[0]["x"] @ weight.T, found) > 30  # activations of 8 bits inside the product


def test_clipped_grids_are_near_the_best_there_is():
    model = quantized(linear_model(64, 48), context(scheme="w1.58a16-g32"), "rtn", clip="true")
    weight = normal((64, 48), 0).T
    error = np.square(weight - the_site(model).quantized.dequantized(), dtype=np.float64).reshape(-1, 32).sum(-1)
    best = np.array([ternary_by_brute_force(row) for row in weight.reshape(-1, 32)])
    assert (error >= best - 1e-6).all()
    assert error.sum() <= 1.02 * best.sum()
