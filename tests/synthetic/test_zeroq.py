"""Inputs that have the statistics of batch normalizations."""

import numpy as np
import pytest

from tests.builders import run, with_outputs
from tests.synthetic.models import network, pictures

pytestmark = pytest.mark.torch

ROWS = 32
VALUES = ["a0", "a2", "b0", "b2", "c0", "sum"]


def made(model, rows=ROWS, seed=0, size=12, **settings):
    from qcompiler.synthetic.zeroq import Settings, batch_norms, distil

    settings = Settings(**{"batch": ROWS, **settings})
    return distil(
        model, batch_norms(model), "image", (3, size, size), rows, settings,
        seed=seed, threads=1, tick=lambda done, total: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return network(pictures(256))


@pytest.fixture(scope="module")
def distilled(model):
    return made(model)


def widths(model, rows):
    """high - low of values of the network."""
    found = run(with_outputs(model, VALUES), {"image": rows}, outputs=VALUES)
    return np.array([np.ptp(array) for array in found])


def loss(model, rows):
    """The loss of the paper a channel, by the plain definition."""
    from qcompiler.synthetic.zeroq import batch_norms

    total, channels = 0.0, 0
    for norm in batch_norms(model):
        (x,) = run(with_outputs(model, [norm.name]), {"image": rows}, outputs=[norm.name])
        total += np.square(x.mean((0, 2, 3)) - norm.mean).sum() + np.square(x.std((0, 2, 3)) - norm.deviation).sum()
        channels += len(norm.mean)
    return total / channels


def test_statistics_of_the_network_are_found(model):
    from qcompiler.synthetic.zeroq import batch_norms

    norms = batch_norms(model)
    assert [norm.name for norm in norms] == ["a0", "b0", "c0"]
    data = pictures(256)
    (x,) = run(with_outputs(model, ["b0"]), {"image": data}, outputs=["b0"])
    np.testing.assert_allclose(norms[1].deviation, x.std((0, 2, 3)), rtol=1e-3)


def test_statistics_are_met_far_better_than_by_noise(model, distilled):
    noise = np.random.default_rng(0).standard_normal((ROWS, 3, 12, 12), np.float32)
    assert loss(model, pictures(256)) < 1e-4
    assert distilled.last == pytest.approx(loss(model, distilled.rows), rel=1e-2, abs=1e-6)
    assert distilled.last < 0.01 * loss(model, noise)
    assert distilled.last < 0.01 * distilled.first


def test_ranges_are_near_those_of_real_data(model, distilled):
    real = widths(model, pictures(ROWS, seed=9))
    noise = np.random.default_rng(0).standard_normal((ROWS, 3, 12, 12), np.float32)
    apart = np.abs(widths(model, distilled.rows) - real) / real
    assert apart.mean() < 0.25
    assert np.mean(np.abs(widths(model, noise) - real) / real) > 1


def test_the_same_seed_makes_the_same_rows(model, distilled):
    np.testing.assert_array_equal(made(model).rows, distilled.rows)
    assert (made(model, seed=1).rows != distilled.rows).mean() > 0.9


def test_rows_are_made_in_batches():
    model = network(pictures(64))
    found = made(model, rows=5, batch=2, steps=3)
    assert found.rows.shape == (5, 3, 12, 12)
    np.testing.assert_array_equal(found.rows[:2], made(model, rows=2, batch=2, steps=3).rows)


def test_rows_alone_can_be_made_to_have_the_statistics(model):
    from qcompiler.synthetic.zeroq import batch_norms

    found = made(model, by_row=True, rows=4)
    norm = batch_norms(model)[0]
    (x,) = run(with_outputs(model, [norm.name]), {"image": found.rows}, outputs=[norm.name])
    noise = np.random.default_rng(0).standard_normal((4, 3, 12, 12), np.float32)
    (y,) = run(with_outputs(model, [norm.name]), {"image": noise}, outputs=[norm.name])
    off = [np.square(each.std((2, 3)) - norm.deviation).mean() for each in (x, y)]
    assert off[0] < 0.1 * off[1]
