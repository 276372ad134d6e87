"""Quantizers that are trained through: their values, and their gradients against finite differences of what stands for
them on the way back."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qcompiler.numerics.affine import Grid, WeightSpec, dequantize, quantize  # noqa: E402
from qcompiler.tuning import binary, lsq, pact, qat, ternary  # noqa: E402
from tests.builders import normal  # noqa: E402

pytestmark = pytest.mark.torch
STEP = 1e-6


def tensor(shape, seed, scale=1.0):
    return torch.from_numpy(normal(shape, seed).astype(np.float64) * scale)


def differences(function, x):
    """The gradient of a sum by central differences."""
    found = torch.zeros_like(x)
    for at in range(x.numel()):
        ends = []
        for sign in (1, -1):
            moved = x.clone()
            moved.view(-1)[at] += sign * STEP
            ends.append(float(function(moved)))
        found.view(-1)[at] = (ends[0] - ends[1]) / (2 * STEP)
    return found


def gradient(function, x):
    x = x.clone().requires_grad_(True)
    function(x).backward()
    return x.grad


def test_fake_quantization_is_what_the_codes_say():
    """The same codes and values as `numerics`, and so as ONNX Runtime's."""
    weight = normal((6, 64), 0)
    spec = WeightSpec(4, 64, False)
    scale = np.linspace(0.1, 0.4, 6, dtype=np.float32)[:, None]
    zero = np.array([[7], [8], [6], [8], [9], [5]], np.float32)
    expected = dequantize(quantize(weight, Grid(scale, zero), spec), scale, zero, 64)
    found = qat.fake_quantize(torch.from_numpy(weight), torch.from_numpy(scale), torch.from_numpy(zero), 0, 15)
    assert np.array_equal(found.numpy(), expected)


def test_the_straight_through_gradient_is_that_of_clipping():
    x, weights = tensor(200, 1, 3.0), tensor(200, 2)
    scale, zero = torch.tensor(0.3, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    low, high = (0 - 2) * 0.3, (7 - 2) * 0.3
    found = gradient(lambda v: (qat.fake_quantize(v, scale, zero, 0, 7) * weights).sum(), x)
    expected = differences(lambda v: (torch.clamp(v, low, high) * weights).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert 0 < int((found == 0).sum()) < 200


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (0, 15), (-2, 1), (-1, 1)])
def test_lsq_gradients(low, high):
    """Those of the values with what rounding adds held fixed, the step's times g."""
    x, weights, step = tensor(120, 3, 2.0), tensor(120, 4), torch.tensor(0.37, dtype=torch.float64)
    clipped = torch.clamp(x / step, low, high)
    added = torch.round(clipped) - clipped

    def surrogate(values, s):
        return ((torch.clamp(values / s, low, high) + added) * s * weights).sum()

    found = gradient(lambda v: (lsq.learned_step(v, step, low, high) * weights).sum(), x)
    torch.testing.assert_close(found, differences(lambda v: surrogate(v, step), x), rtol=1e-6, atol=1e-6)
    of_step = gradient(lambda s: (lsq.learned_step(x, s, low, high, 0.25) * weights).sum(), step)
    torch.testing.assert_close(of_step, 0.25 * differences(lambda s: surrogate(x, s), step), rtol=1e-5, atol=1e-6)


def test_lsq_gradients_are_those_of_the_paper():
    x = torch.tensor([-5.0, -0.6, 0.2, 0.74, 3.0], dtype=torch.float64)
    step = torch.tensor(0.5, dtype=torch.float64)
    each = []
    for value in x:
        each.append(float(gradient(lambda s, v=value: lsq.learned_step(v, s, -2, 1), step)))
    # Below and above -Qn and Qp, inside round(v / s) - v / s.
    assert each == pytest.approx([-2, -1 + 1.2, 0 - 0.4, 1, 1])
    assert lsq.gradient_scale(100, 4) == pytest.approx(1 / 20)


def test_pact():
    """The gradients of the paper, for a step of alpha / 7."""
    x, weights, step = tensor(150, 5, 2.0), tensor(150, 6), torch.tensor(1.1 / 7, dtype=torch.float64)
    y = pact.clipped(x, step, 0, 7)
    torch.testing.assert_close(y / step, torch.round(y / step))
    assert float(y.min()) == 0
    assert float(y.max()) == pytest.approx(1.1)

    def surrogate(values, s):
        return (torch.minimum(torch.relu(values), 7 * s) * weights).sum()

    found = gradient(lambda v: (pact.clipped(v, step, 0, 7) * weights).sum(), x)
    torch.testing.assert_close(found, differences(lambda v: surrogate(v, step), x), rtol=1e-6, atol=1e-6)
    of_step = gradient(lambda s: (pact.clipped(x, s, 0, 7) * weights).sum(), step)
    torch.testing.assert_close(of_step, differences(lambda s: surrogate(x, s), step), rtol=1e-6, atol=1e-6)
    assert float(of_step) == pytest.approx(7 * float(weights[x >= 1.1].sum()))


def test_pact_with_a_zero_point_moves_both_ends():
    x, weights, step = tensor(150, 7, 2.0), tensor(150, 8), torch.tensor(0.3, dtype=torch.float64)

    def surrogate(values, s):
        return (torch.maximum(torch.minimum(values, 5 * s), -2 * s) * weights).sum()

    for of, moved in ((0, x), (1, step)):

        def value(v, of=of):
            return (pact.clipped(*((v, step), (x, v))[of], -2, 5) * weights).sum()

        expected = differences(lambda v, of=of: surrogate(*((v, step), (x, v))[of]), moved)
        torch.testing.assert_close(gradient(value, moved), expected, rtol=1e-6, atol=1e-6)


def test_binaryconnect():
    weight, weights = tensor((4, 50), 9), tensor((4, 50), 10)
    assert torch.equal(binary.binary_weight(weight), torch.where(weight >= 0, 1.0, -1.0).double())
    assert float(binary.binary_weight(torch.zeros(1))) == 1
    assert torch.equal(gradient(lambda v: (binary.binary_weight(v) * weights).sum(), weight), weights)
    level = torch.full((20000,), 0.3)
    drawn = binary.binary_weight(level, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {-1.0, 1.0}
    assert float(drawn.mean()) == pytest.approx(0.3, abs=0.02)  # (1 + w) / 2 of them are plus one
    assert torch.equal(drawn, binary.binary_weight(level, torch.Generator().manual_seed(0)))
    assert float(binary.binary_weight(torch.tensor([2.0]), torch.Generator().manual_seed(1))) == 1


def test_signs_of_activations():
    x, weights = tensor((3, 40), 11), tensor((3, 40), 12)
    assert torch.equal(binary.sign_activations(x), torch.where(x >= 0, 1.0, -1.0).double())
    expected = differences(lambda v: (torch.clamp(v, -1, 1) * weights).sum(), x)
    found = gradient(lambda v: (binary.sign_activations(v) * weights).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_xnor_weights():
    weight, weights = tensor((5, 30), 13), tensor((5, 30), 14)
    alpha = weight.abs().mean(-1, keepdim=True)
    torch.testing.assert_close(binary.xnor_weight(weight), alpha * torch.where(weight >= 0, 1.0, -1.0))
    found = gradient(lambda v: (binary.xnor_weight(v) * weights).sum(), weight)
    torch.testing.assert_close(found, weights * (1 / 30 + alpha * (weight.abs() <= 1)))


def loss(weight, codes, scale):
    return float((weight - codes * scale).square().sum())


def test_twn():
    weight = tensor((6, 64), 15)
    codes, scale = ternary.twn_ternary(weight)
    threshold = 0.7 * weight.abs().mean(-1, keepdim=True)
    assert torch.equal(
        codes, torch.where(weight > threshold, 1.0, torch.where(weight < -threshold, -1.0, 0.0)).double()
    )
    for row in range(6):
        sizes, tried = weight[row].abs(), []
        for level in sizes:  # every threshold there is
            used = sizes >= level
            alpha = sizes[used].mean()
            tried.append(float((weight[row] - torch.sign(weight[row]) * used * alpha).square().sum()))
        assert min(tried) <= loss(weight[row], codes[row], scale[row]) < 1.1 * min(tried)
    codes, scale = ternary.twn_ternary(torch.zeros(2, 8))
    assert not codes.any()
    assert torch.isfinite(scale).all()


def test_absmean_weights():
    weight, weights = tensor((4, 32), 16), tensor((4, 32), 17)
    scale = weight.abs().mean(-1, keepdim=True)
    found = ternary.absmean_weight(weight)
    torch.testing.assert_close(found, torch.clamp(torch.round(weight / scale), -1, 1) * scale)
    assert torch.equal(gradient(lambda v: (ternary.absmean_weight(v) * weights).sum(), weight), weights)


def test_trained_ternary_weights():
    weight, weights = tensor((4, 32), 18), tensor((4, 32), 19)
    up, down = torch.tensor(0.8, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
    level = 0.05 * weight.abs().amax(-1, keepdim=True)
    above, below = weight > level, weight < -level
    found = ternary.trained_ternary(weight, up, down)
    torch.testing.assert_close(found, (0.8 * above - 1.3 * below).double())
    of_up = gradient(lambda v: (ternary.trained_ternary(weight, v, down) * weights).sum(), up)
    of_down = gradient(lambda v: (ternary.trained_ternary(weight, up, v) * weights).sum(), down)
    assert float(of_up) == pytest.approx(float(weights[above].sum()))
    assert float(of_down) == pytest.approx(-float(weights[below].sum()))
    of_weight = gradient(lambda v: (ternary.trained_ternary(v, up, down) * weights).sum(), weight)
    torch.testing.assert_close(of_weight, weights * torch.where(above, 0.8, torch.where(below, 1.3, 1.0)).double())
