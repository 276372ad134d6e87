"""Rounding by trial beside GPTQ itself, and losses of many formats at once beside one after the other."""

import numpy as np
import pytest

from qcompiler.errors import NumericsError
from qcompiler.numerics.affine import WeightSpec, dequantize, min_max_grid, quantize
from qcompiler.passes import load
from qcompiler.scheme import Scheme
from qcompiler.statistics import LayerFacts
from qcompiler.trials import TrialRounding, curvature_of, row_losses
from tests.builders import context, correlated, normal

SPECS = [
    WeightSpec(bits, size, symmetric) for bits in (2, 4, 8) for size in (16, 64, 100) for symmetric in (True, False)
]
K, N, T = 100, 12, 400


def facts(tokens=T):
    mixing = normal((K, K), 7) * np.geomspace(10, 0.1, K).astype(np.float32)
    x = normal((tokens, K), 8) @ mixing
    return LayerFacts((x.T @ x).astype(np.float64), tokens)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_trial_is_what_gptq_does(spec):
    weight, measured = normal((N, K), 1), facts()
    decoded, loss = TrialRounding(sweeps=True).rounded(weight, spec, curvature_of(measured))
    result = load("gptq")(context()).quantize(weight, spec, measured)
    expected = dequantize(result.codes, result.grid.scale, result.grid.zero_point, spec.group_size)
    if spec.bits < 8:  # there no clipped grid is searched
        assert np.mean(decoded == expected) > 0.99  # the factor is kept in float32
        assert loss == pytest.approx(result.loss.sum() / T, rel=1e-2)
    assert loss < 1.3 * result.loss.sum() / T


@pytest.mark.parametrize("sweeps", [True, False])
def test_losses_of_all_formats_are_those_of_each(sweeps):
    weight, known, way = normal((N, K), 2), curvature_of(facts()), TrialRounding(sweeps)
    together = way.losses(weight, SPECS, known)
    assert together.shape == (len(SPECS), N)
    for spec, losses in zip(SPECS, together, strict=True):
        assert losses.sum() == pytest.approx(way.rounded(weight, spec, known)[1], rel=1e-6)


def test_the_loss_of_rounding_to_nearest_is_that_of_the_outputs():
    weight, spec, measured = normal((N, K), 3), WeightSpec(4, 64, False), facts()
    decoded, loss = TrialRounding(sweeps=False).rounded(weight, spec, curvature_of(measured))
    grid = min_max_grid(weight, spec)
    expected = dequantize(quantize(weight, grid, spec), grid.scale, grid.zero_point, 64)
    np.testing.assert_array_equal(decoded, expected)
    error, hessian = (weight - expected).astype(np.float64), measured.hessian / T
    plain = np.einsum("nk,kl,nl->", error, hessian, error)
    assert plain < loss < 1.1 * plain  # the rest is damping


@pytest.mark.parametrize("sweeps", [True, False])
def test_without_a_hessian_all_columns_count_alike(sweeps):
    weight, spec, way = normal((N, K), 4), WeightSpec(2, 16, False), TrialRounding(sweeps)
    decoded, loss = way.rounded(weight, spec, None)
    assert loss == pytest.approx(np.square(weight - decoded).sum(), rel=1e-5)
    assert way.losses(weight, [spec], None).sum() == pytest.approx(loss, rel=1e-5)


def test_loss_is_a_mean_over_tokens():
    known = [curvature_of(facts(tokens)) for tokens in (2000, 8000)]
    few, many = (TrialRounding(True).rounded(normal((N, K), 5), SPECS[8], each)[1] for each in known)
    assert few == pytest.approx(many, rel=0.2)


def test_groups_have_no_one_curvature_and_nonsense_cannot_be_factored():
    assert curvature_of(LayerFacts(np.ones((2, 3, 3)), 4)) is None
    with pytest.raises(NumericsError, match=r"cannot be factored even with damping 0\.5; give more calibration"):
        curvature_of(LayerFacts(-np.ones((3, 3)) * 5 + np.diag([6.0, 6, 6]), 1))


@pytest.mark.parametrize("sweeps", [True, False])
def test_formats_with_tables_are_tried_beside_others(sweeps):
    """Each loss is that of what the format makes of the weight."""
    weight = normal((32, 96), 3)
    rows = correlated(96)
    known = curvature_of(LayerFacts((rows.T @ rows).astype(np.float64), len(rows)))
    texts = ("w4a16-g32-asym", "w4a16-g32-lut", "w2a16-g32-vq2", "w3a16-g32-lut", "w8a16-g32-asym")
    specs = [Scheme.parse(text).spec(96, "float32", stream="lut" in text or "vq" in text) for text in texts]
    rounding = TrialRounding(sweeps=sweeps)
    losses = rounding.losses(weight, specs, known).sum(-1)
    for spec, loss in zip(specs, losses, strict=True):
        decoded, total = rounding.rounded(weight, spec, known)
        assert decoded.shape == weight.shape
        np.testing.assert_allclose(loss, total, rtol=1e-3)
        np.testing.assert_allclose(total, row_losses(weight - decoded, known).sum(), rtol=1e-3)
    assert losses[1] < losses[3] < losses[2]
    assert losses[4] < losses[1]
