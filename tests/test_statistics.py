"""Second moments of activations."""

import numpy as np
import pytest

from qcompiler.errors import NumericsError
from qcompiler.statistics import Hessian
from tests.builders import normal


def test_rows_of_any_float_type_are_summed_in_float32():
    rows = normal((3, 4), 4, "float16")
    product, tokens = Hessian(4).product(rows)
    assert (product.dtype, tokens) == (np.float32, 3)
    assert np.allclose(product, rows.astype(np.float32).T @ rows.astype(np.float32), rtol=1e-6)


def test_second_moments_are_summed_over_batches():
    hessian = Hessian(5)
    batches = [normal((n, 5), n) for n in (7, 1, 12)]
    for rows in batches:
        hessian.add(*hessian.product(rows))
    facts = hessian.facts("site")
    everything = np.concatenate(batches).astype(np.float64)
    assert facts.tokens == 20
    assert facts.hessian.dtype == np.float64
    assert np.allclose(facts.hessian, everything.T @ everything, rtol=1e-5)


def test_many_small_batches_lose_nothing_beside_a_large_one():
    """Across batches sums are float64: 1000 times 1e-4 beside 1e8 would be lost in float32."""
    hessian = Hessian(1)
    hessian.add(*hessian.product(np.full((1, 1), 1e4, np.float32)))
    for _ in range(1000):
        hessian.add(*hessian.product(np.full((1, 1), 1e-2, np.float32)))
    assert hessian.total[0, 0] - 1e8 == pytest.approx(0.1, rel=1e-4)


def test_no_rows_add_nothing():
    hessian = Hessian(3)
    hessian.add(*hessian.product(np.zeros((0, 3), np.float32)))
    facts = hessian.facts("site")
    assert facts.tokens == 0
    assert not facts.hessian.any()


def test_features_that_do_not_fit_the_weight_are_an_error_with_both_figures():
    with pytest.raises(NumericsError, match=r"an activation has 4 features where the weight has K = 5"):
        Hessian(5).product(np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_an_error_that_names_the_site(bad):
    hessian = Hessian(2)
    rows = normal((4, 2), 5)
    rows[2, 1] = bad
    with np.errstate(invalid="ignore"):
        hessian.add(*hessian.product(rows))
    with pytest.raises(NumericsError, match=r"the activation that 'mlp.down' reads holds NaN or infinity"):
        hessian.facts("mlp.down")
