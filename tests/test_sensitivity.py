"""What replacing weights changes, against plain runs of the changed model."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.numerics.metrics import kl_divergence
from qcompiler.sensitivity import Sensitivity, first_tokens
from tests.builders import decoder, linear_model, normal, run, token_batches

CPU = "CPUExecutionProvider"
# Of `decoder(hidden=64)`: small enough for the test, large enough to be fed.
NAMES = ("table", "wq0", "wd0", "wo1", "wg1", "wh")


def model():
    return decoder(layers=2, hidden=64, inner=96)


def replaced(changed, name, array):
    changed.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return changed


def noisy(name, seed=0):
    exact = model().graph.initializers[name].const_value.numpy()
    return (exact + normal(exact.shape, seed, scale=0.1 * exact.std())).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_the_divergence_is_that_of_the_changed_model(name):
    feeds = token_batches(2, padded=False)
    found = Sensitivity(model(), feeds, provider=CPU)
    assert name in found.weights
    changed = replaced(model(), name, noisy(name))
    each = [kl_divergence(run(model(), one)[0], run(changed, one)[0]) for one in feeds]
    assert found.change({name: noisy(name)}) == pytest.approx(np.mean(each), rel=1e-3)


def test_several_weights_at_once_and_nothing_left_behind():
    feeds = token_batches(2, padded=False)
    found = Sensitivity(model(), feeds, provider=CPU)
    weights = {name: noisy(name, seed) for seed, name in enumerate(NAMES)}
    changed = model()
    for name, array in weights.items():
        replaced(changed, name, array)
    each = [kl_divergence(run(model(), one)[0], run(changed, one)[0]) for one in feeds]
    together = found.change(weights)
    assert together == pytest.approx(np.mean(each), rel=1e-3)
    assert found.change({}) == 0
    assert found.change({"nothing": np.zeros(3, np.float32)}) == 0
    assert found.change(weights) == together
    assert found.change(weights, threads=2) == together


def test_padding_is_not_compared():
    padded = token_batches(1, rows=2, length=7, seed=3)
    found = Sensitivity(model(), padded, provider=CPU).change({"wq0": noisy("wq0")})
    mask = padded[0]["attention_mask"].astype(bool)
    changed = replaced(model(), "wq0", noisy("wq0"))
    each = kl_divergence(run(model(), padded[0])[0], run(changed, padded[0])[0])
    assert found == pytest.approx(each[mask].mean(), rel=1e-3)


def test_without_logits_the_noise_counts():
    plain, feeds = linear_model(K=128, N=64), [{"x": normal((8, 128), 5)}]
    exact = plain.graph.initializers["w"].const_value.numpy()
    wrong = (exact + normal(exact.shape, 1, scale=0.05)).astype(np.float32)
    expected, got = feeds[0]["x"] @ exact, feeds[0]["x"] @ wrong
    share = np.square(expected - got).sum() / np.square(expected).sum()
    assert Sensitivity(plain, feeds, provider=CPU).change({"w": wrong}) == pytest.approx(share, rel=1e-4)


def test_first_tokens():
    ids = np.arange(24).reshape(3, 8)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    np.testing.assert_array_equal(first_tokens(feeds, 2, 5)["input_ids"], ids[:2, :5])
    left = {"input_ids": ids, "attention_mask": (np.arange(8) >= 6).astype(np.int64) * np.ones_like(ids)}
    np.testing.assert_array_equal(first_tokens(left, 1, 5)["input_ids"], ids[:1, 3:])
    cache = feeds | {"past_key_values.0.key": np.zeros((3, 2, 0, 4), np.float32)}
    cut = first_tokens(cache, 1, 5)
    assert (cut["input_ids"].shape, cut["past_key_values.0.key"].shape) == ((1, 5), (1, 2, 0, 4))


def test_what_is_no_token_stays_whole():
    pictures = {"x": normal((4, 3, 8, 8), 1)}
    assert first_tokens(pictures, 2, 5)["x"].shape == (2, 3, 8, 8)
    odd = {"x": normal((4, 8), 1), "y": normal((3, 8), 1)}
    assert first_tokens(odd, 1, 5)["x"].shape == (4, 8)
    mixed = {"ids": np.ones((4, 8), np.int64), "features": normal((4, 8), 1)}
    assert first_tokens(mixed, 1, 5)["ids"].shape == (1, 8)
