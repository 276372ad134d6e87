"""What the taps of a convolution meet, compared with ONNX Runtime's convolution."""

import numpy as np
import pytest

from qcompiler.convolution import Geometry, patch_rows, tap_sums
from tests.builders import normal, parse, run

# Attributes and shape of the weight; the input has four channels.
CONVOLUTIONS = {
    "kernel of one": ("", (6, 4, 1, 1)),
    "padding": ("<pads = [1, 1, 1, 1]>", (6, 4, 3, 3)),
    "uneven padding": ("<pads = [0, 2, 1, 0]>", (6, 4, 3, 2)),
    "stride": ("<strides = [2, 3]>", (6, 4, 3, 3)),
    "stride and padding": ("<strides = [2, 2], pads = [1, 1, 1, 1]>", (6, 4, 3, 3)),
    "a kernel of one with stride": ("<strides = [2, 2]>", (6, 4, 1, 1)),
    "dilation": ("<dilations = [2, 3], pads = [2, 3, 2, 3]>", (6, 4, 3, 3)),
    "groups": ("<group = 2, pads = [1, 1, 1, 1]>", (6, 2, 3, 3)),
    "depthwise": ("<group = 4, pads = [1, 1, 1, 1], strides = [2, 1]>", (4, 1, 3, 3)),
    "depthwise with a multiplier": ("<group = 4>", (8, 1, 3, 3)),
    "same upper": ('<auto_pad = "SAME_UPPER", strides = [2, 2]>', (6, 4, 4, 4)),
    "same lower": ('<auto_pad = "SAME_LOWER", strides = [2, 2]>', (6, 4, 4, 4)),
    "valid": ('<auto_pad = "VALID">', (6, 4, 3, 3)),
    "one dimension": ("<pads = [2, 2], strides = [2]>", (6, 4, 5)),
    "three dimensions": ("<pads = [1, 0, 1, 1, 1, 0]>", (6, 4, 3, 2, 3)),
    "a kernel larger than the input": ("<pads = [4, 4, 4, 4], dilations = [1, 4]>", (6, 4, 9, 3)),
}


def conv_model(attributes, shape):
    dims = ",".join("BCHWD"[: len(shape)])
    text = f"g (float[{dims}] x) => (float y) {{ [conv] y = Conv {attributes} (x, w) }}"
    return parse(text, {"w": normal(shape, 1)})


def case_of(case):
    """A convolution's model, geometry and weight float32 [groups, N, K], and a batch for it."""
    attributes, shape = CONVOLUTIONS[case]
    model = conv_model(attributes, shape)
    groups = model.graph[0].attributes.get_int("group", 1)
    weight = model.graph.initializers["w"].const_value.numpy().reshape(groups, shape[0] // groups, -1)
    x = normal((3, 4, *(9, 7, 5)[: len(shape) - 2]), 3) + 2 * normal((1, 4) + (1,) * (len(shape) - 2), 4)
    return model, Geometry.of(model.graph[0]), weight, x


def positions(y):
    """A convolution's result as rows [T, N]."""
    return np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_rows_times_the_weight_are_the_convolution(case):
    model, geometry, weight, x = case_of(case)
    want = positions(run(model, {"x": x})[0])
    rows = patch_rows(x, geometry, len(weight), 10**6)
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    assert rows.shape == (len(weight), len(want), weight.shape[2])
    got = np.concatenate([part @ kernel.T for part, kernel in zip(rows, weight, strict=True)], axis=1)
    assert np.allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_limit_takes_evenly_spaced_positions_of_each_sample(case):
    model, geometry, weight, x = case_of(case)
    every = patch_rows(x, geometry, len(weight), 10**6)
    sizes = run(model, {"x": x})[0].shape[2:]
    places = np.arange(every.shape[1]).reshape(len(x), *sizes)
    for limit in (1, len(x), every.shape[1] // 3, every.shape[1] - 1):
        rows = patch_rows(x, geometry, len(weight), limit)
        steps = [step for step in range(1, 100) if len(x) * np.prod([-(-n // step) for n in sizes]) == rows.shape[1]]
        chosen = [places[(slice(None), *[slice(None, None, step)] * len(sizes))].reshape(-1) for step in steps]
        assert any(np.array_equal(rows, every[:, some]) for some in chosen)
        # "About": each axis is rounded up, and every sample has a row.
        assert rows.shape[1] <= max(len(x), limit * 2 ** len(sizes))
        assert rows.shape[1] < every.shape[1] or every.shape[1] == len(x)


def test_half_precision_becomes_float32():
    _, geometry, _, x = case_of("padding")
    rows = patch_rows(x.astype(np.float16), geometry, 1, 10**6)
    assert rows.dtype == np.float32
    assert np.array_equal(rows, patch_rows(x.astype(np.float16).astype(np.float32), geometry, 1, 10**6))


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_sums_of_what_the_taps_meet_give_the_mean_of_the_convolution(case):
    model, geometry, weight, x = case_of(case)
    want = positions(run(model, {"x": x})[0])
    sums, count = tap_sums(x, geometry)
    assert sums.dtype == np.float64
    assert count == len(want)
    sums = sums.reshape(len(weight), -1)  # [C, taps] -> [groups, K]
    got = np.einsum("gnk,gk->gn", weight.astype(np.float64), sums).reshape(-1) / count
    assert np.abs(got - want.mean(0, dtype=np.float64)).max() < 1e-6 * np.abs(want).max()


def test_taps_that_never_meet_the_input_have_no_sum():
    geometry = Geometry((5,), (1,), (1,), (4, 4))
    sums, count = tap_sums(np.array([[[1.0]]]), geometry)
    assert (sums.tolist(), count) == ([[1.0] * 5], 5)
    sums, count = tap_sums(np.array([[[1.0]]]), Geometry((3,), (2,), (1,), (1, 1)))
    assert (sums.tolist(), count) == ([[0.0, 1.0, 0.0]], 1)
