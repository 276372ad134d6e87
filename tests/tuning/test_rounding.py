"""Descent on one linear layer and on a decoder's block: what is learned, what is ignored, what stays as it was."""

import numpy as np
import pytest

from qcompiler.numerics.affine import Grid, WeightSpec, clip_grid, dequantize, quantize, stored_scale
from tests.builders import linear_model, normal, parse

pytestmark = pytest.mark.torch

SPECS = [
    WeightSpec(4, 16, False),
    WeightSpec(4, 16, True),
    WeightSpec(4, 16, True, signed_scale=False),
    WeightSpec(2, 16, False),
    WeightSpec(4, 20, False),  # the last group is ragged
    WeightSpec(4, 16, False, scale_dtype="float16"),
]


def start_of(weight, spec, layout="KN", name="w"):
    from qcompiler.tuning import Start

    grid = clip_grid(weight, spec)
    return Start(name, weight, quantize(weight, grid, spec), grid, spec, layout)


def examples_of(weight, count=8, tokens=40, seed=0, mask=None):
    """A few directions carry most of the energy, so that errors of some weights can make up for those of others."""
    from qcompiler.tuning import Example

    mixing = normal((6, weight.shape[1]), seed + 100)
    made = []
    for index in range(count):
        x = normal((tokens, 6), seed + index) @ mixing + 0.1 * normal((tokens, weight.shape[1]), seed + index + 50)
        made.append(Example({"x": x}, {"y": x @ weight.T}, mask))
    return made


def graph_of(model, outputs=("y",)):
    from qcompiler.torch_graph import TorchGraph

    return TorchGraph(list(model.graph), model.opset_imports, outputs)


def learned(spec, seed=0, layout="KN", **settings):
    from qcompiler.tuning import Settings, tune_block

    weight = normal((24, 48), 3)
    model = linear_model(48, 24) if layout == "KN" else linear_model(48, 24, op="Gemm")
    examples = examples_of(weight)
    start = start_of(weight, spec, layout)
    options = {"steps": 150, "batch": 2, "rate": 0.02, "seed": seed, **settings}
    outcome = tune_block(graph_of(model), [start], examples[:6], examples[6:], Settings(**options))
    return start, outcome, examples


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_error_on_other_data_falls_by_a_third_at_least(spec):
    """Rounding to nearest knows nothing of the data; six directions carry them."""
    start, outcome, examples = learned(spec)
    assert outcome.after < 0.67 * outcome.before
    (codes,), (grid,) = outcome.codes, outcome.grids
    assert codes.dtype == np.uint8
    assert codes.min() >= spec.limits[0]
    assert codes.max() <= spec.limits[1]
    assert np.array_equal(grid.zero_point, start.grid.zero_point)
    assert np.array_equal(grid.scale, stored_scale(grid.scale, spec))
    # The figure is that of the codes, computed anew.
    for figure, (c, g) in ((outcome.before, (start.codes, start.grid)), (outcome.after, (codes, grid))):
        values = dequantize(c, g.scale, g.zero_point, spec.group_size)
        losses = []
        for example in examples[6:]:
            x, y = example.feeds["x"].astype(np.float64), example.targets["y"].astype(np.float64)
            energy = np.square(y).mean(-1)
            middle = np.sort(energy)[(len(energy) - 1) // 2]
            losses.append((np.square(x @ values.T - y).mean(-1) / (energy + 0.1 * middle)).mean())
        assert figure == pytest.approx(np.mean(losses), rel=1e-3)


def test_both_orientations_learn_the_same():
    kn, nk = learned(SPECS[0])[1], learned(SPECS[0], layout="NK")[1]
    assert np.mean(kn.codes[0] != nk.codes[0]) < 0.01
    assert kn.after == pytest.approx(nk.after, rel=0.05)


def test_the_same_seed_learns_the_same_and_another_one_something_else():
    first, again, other = (learned(SPECS[0], seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first.codes[0], again.codes[0])
    assert np.array_equal(first.grids[0].scale, again.grids[0].scale)
    assert not np.array_equal(first.codes[0], other.codes[0])


def test_without_steps_of_scales_these_stay_and_without_any_nothing_changes():
    start, outcome, _ = learned(SPECS[0], scale_rate=0.0)
    assert np.array_equal(outcome.grids[0].scale, start.grid.scale)
    assert not np.array_equal(outcome.codes[0], start.codes)
    start, outcome, _ = learned(SPECS[0], rate=0.0, scale_rate=0.0)
    assert np.array_equal(outcome.codes[0], start.codes)
    assert outcome.after == outcome.before


def test_codes_that_are_not_the_nearest_are_where_descent_starts():
    """GPTQ's codes, for example; the latent lies within their cells."""
    from qcompiler.tuning import Settings, Start, tune_block

    weight, spec = normal((24, 48), 3), SPECS[0]
    nearest = start_of(weight, spec)
    codes = (nearest.codes.astype(int) + np.random.default_rng(0).integers(-2, 3, nearest.codes.shape)).clip(0, 15)
    start = Start("w", weight, codes.astype(np.uint8), nearest.grid, spec, "KN")
    examples = examples_of(weight, 3)
    still = Settings(steps=2, rate=0.0, scale_rate=0.0)
    outcome = tune_block(graph_of(linear_model(48, 24)), [start], examples[:2], examples[2:], still)
    assert np.array_equal(outcome.codes[0], codes)


def test_padding_is_ignored():
    from qcompiler.tuning import Example, Settings, tune_block

    model = parse("g (float[B,S,48] x) => (float[B,S,24] y) { [fc] y = MatMul(x, w) }", {"w": normal((48, 24), 0)})
    weight = normal((24, 48), 3)
    mask = np.ones((2, 20), bool)
    mask[:, 15:] = False
    results = []
    for fill in (0.0, 1e4):
        examples = []
        for example in examples_of(weight, 4):
            x, y = (array.reshape(2, 20, -1).copy() for array in (example.feeds["x"], example.targets["y"]))
            y[~mask] = fill
            examples.append(Example({"x": x}, {"y": y}, mask))
        settings = Settings(steps=20, rate=0.02)
        results.append(tune_block(graph_of(model), [start_of(weight, SPECS[0])], examples[:3], examples[3:], settings))
    assert np.array_equal(results[0].codes[0], results[1].codes[0])
    assert results[0].after == results[1].after


def test_rows_of_a_head_keep_one_scale():
    spec = WeightSpec(4, 48, False, head_size=4)
    _, outcome, _ = learned(spec)
    scale = outcome.grids[0].scale.reshape(6, 4)
    assert (scale == scale[:, :1]).all()
    assert outcome.after < outcome.before


def test_a_weight_that_the_outputs_do_not_depend_on_stays():
    from qcompiler.tuning import Settings, tune_block

    weight = normal((24, 48), 3)
    text = "g (float[B,48] x) => (float[B,24] y, float[B,24] z) { y = MatMul(x, w) z = MatMul(x, v) }"
    model = parse(text, {"w": normal((48, 24), 0), "v": normal((48, 24), 1)})
    starts = [start_of(weight, SPECS[0], name="w"), start_of(weight, SPECS[0], name="v")]
    examples = examples_of(weight, 3)
    outcome = tune_block(graph_of(model), starts, examples[:2], examples[2:], Settings(rate=0.02))
    assert not np.array_equal(outcome.codes[0], starts[0].codes)
    assert np.array_equal(outcome.codes[1], starts[1].codes)


def test_the_number_of_threads_is_given_back():
    import torch

    before = torch.get_num_threads()
    learned(SPECS[0], threads=before + 1, steps=1)
    assert torch.get_num_threads() == before


def test_progress_is_told():
    from qcompiler.tuning import Settings, tune_block

    weight, seen = normal((24, 48), 3), []
    examples = examples_of(weight, 2)
    tune_block(
        graph_of(linear_model(48, 24)), [start_of(weight, SPECS[0])], examples, examples, Settings(steps=3),
        lambda *told: seen.append(told),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_grids_are_whole():
    _, outcome, _ = learned(SPECS[4])
    assert isinstance(outcome.grids[0], Grid)
    assert outcome.grids[0].scale.shape == (24, 3)
