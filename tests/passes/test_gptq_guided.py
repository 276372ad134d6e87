"""GPTQ where tokens and outputs count by how much the model's answer hangs on them."""

import sys

import numpy as np
import pytest

from qcompiler.checkpoints import Checkpoints
from qcompiler.errors import PassError, SchemeError
from qcompiler.numerics.affine import Grid, WeightSpec, clip_grid, dequantize, round_to_grid
from qcompiler.numerics.coupled import descend_coupled, refit_coupled, sweep_coupled
from qcompiler.numerics.second_order import damped, sweep, upper_factor
from qcompiler.passes import load
from tests.builders import apply, assigned, context, correlated, decoder, normal, parse, serialized, token_batches

SPEC = WeightSpec(2, 16, False)


def problem(seed=0, N=24, K=48):
    """A weight, its grid, H and G, and the order of columns."""
    weight, hessian, curvature = normal((N, K), seed), damped(correlated(K, seed), 0.05), correlated(N, seed + 1)
    importance = np.diagonal(hessian).astype(np.float32)
    order = np.argsort(-importance, kind="stable")
    return weight, clip_grid(weight, SPEC, importance), hessian, damped(curvature, 0.1), order


def loss(weight, codes, grid, hessian, curvature):
    """tr(E H E^T G)."""
    error = weight - dequantize(codes, grid.scale, grid.zero_point, SPEC.group_size).astype(np.float64)
    return float(np.einsum("nk,kj,mj,nm->", error, hessian, error, curvature))


def coupled(weight, grid, hessian, curvatures, order, **options):
    factor = upper_factor(hessian[np.ix_(order, order)])
    return sweep_coupled(weight, factor, curvatures, grid, SPEC, order, **options)


@pytest.mark.parametrize("block", [1, 5, 32])
def test_unrelated_outputs_are_swept_as_ever(block):
    weight, grid, hessian, _, order = problem()
    expected = sweep(weight, upper_factor(hessian[np.ix_(order, order)]), grid, SPEC, order)
    parts = [np.eye(10), 3 * np.eye(14)]
    found = coupled(weight, grid, hessian, parts, order, block=block)
    assert np.array_equal(found[0], expected[0])
    assert np.allclose(found[1], expected[1], rtol=1e-4)


def test_rows_are_rounded_given_the_errors_of_those_before():
    """Against plain loops over rows and columns in double precision."""
    weight, grid, hessian, curvature, order = problem()
    codes, _ = coupled(weight, grid, hessian, [curvature], order, block=1)
    visit = np.argsort(-np.diagonal(curvature), kind="stable")
    upper = upper_factor(curvature[np.ix_(visit, visit)])
    factor = upper_factor(hessian[np.ix_(order, order)])
    error, expected = np.zeros(weight.shape), np.zeros(weight.shape)
    for n, row in enumerate(visit):
        target = weight[row] + sum((error[visit[m]] * upper[m, n] / upper[n, n] for m in range(n)), np.zeros(48))
        for k, column in enumerate(order):
            value = target[column]
            for j in range(k):
                rounded = target[order[j]] - quantized_at(expected, grid, row, order[j])
                value += rounded * factor[j, k] / factor[k, k]
            s, z = (part[row, column // 16 : column // 16 + 1] for part in (grid.scale, grid.zero_point))
            expected[row, column] = round_to_grid(np.array([value], np.float32), s, z, SPEC)[0]
        error[row] = weight[row] - quantized_at(expected, grid, row, np.arange(48))
    assert np.mean(codes == expected) > 0.99  # float32 against float64: a tie may fall the other way


def quantized_at(codes, grid, row, columns):
    return (codes[row, columns] - grid.zero_point[row, columns // 16]) * np.float64(grid.scale[row, columns // 16])


def test_what_is_lost_of_the_answer_is_less():
    ratios = []
    for seed in range(6):
        weight, grid, hessian, curvature, order = problem(seed)
        plain, _ = sweep(weight, upper_factor(hessian[np.ix_(order, order)]), grid, SPEC, order)
        found, _ = coupled(weight, grid, hessian, [curvature], order, block=4)
        ratios.append(loss(weight, found, grid, hessian, curvature) / loss(weight, plain, grid, hessian, curvature))
    assert np.mean(ratios) < 0.85


def test_parts_side_by_side_are_as_alone():
    weight, grid, hessian, curvature, order = problem()
    first, second = curvature[:10, :10], curvature[10:, 10:]
    together, losses = coupled(weight, grid, hessian, [first, second], order, block=4)
    for rows, part in ((slice(10), first), (slice(10, None), second)):
        alone, loss_alone = coupled(
            weight[rows], Grid(grid.scale[rows], grid.zero_point[rows]), hessian, [part], order, block=4
        )
        assert np.array_equal(together[rows], alone)
        assert np.allclose(losses[rows], loss_alone, rtol=1e-4)


def test_scales_are_fitted_to_the_answer_and_codes_move_on():
    """The scales are where the loss is least: a step of any one makes it larger. Each round of codes lessens it."""
    for seed in range(4):
        weight, grid, hessian, curvature, order = problem(seed)
        curvatures = [curvature[:10, :10], curvature[10:, 10:]]
        joint = np.zeros((24, 24))
        joint[:10, :10], joint[10:, 10:] = curvatures
        codes, _ = coupled(weight, grid, hessian, curvatures, order)
        found = refit_coupled(weight, codes, hessian.astype(np.float32), curvatures, grid, SPEC)
        losses = [loss(weight, codes, each, hessian, joint) for each in (grid, found)]
        assert losses[1] < 0.999 * losses[0]
        for row in (0, 9, 10, 23):  # of the last group, which has seen the others move
            for share in (0.97, 1.03):
                scale = found.scale.copy()
                scale[row, 2] *= share
                assert loss(weight, codes, Grid(scale, found.zero_point), hessian, joint) > losses[1]
        for block in (1, 8):
            moved = descend_coupled(weight, codes, hessian.astype(np.float32), curvatures, found, SPEC, block=block)
            assert loss(weight, moved, found, hessian, joint) < losses[1]


def guided(model, batches, store=None, **options):
    ctx = context(batches=batches, scheme="w2a16-g16-asym")
    if store is not None:
        ctx = type(ctx)(ctx.config, ctx.threads, ctx.calibration, None, store)
    assigned(model, "w2a16-g16-asym")
    return apply("gptq", model, ctx, guided=True, **options)


@pytest.mark.torch
def test_all_layers_are_guided_and_what_is_not_says_so():
    model = decoder(vocabulary=640)
    batches = token_batches(4, 2, 12, vocabulary=640)
    plain, found = decoder(vocabulary=640), guided(model, batches)
    apply("gptq", assigned(plain, "w2a16-g16-asym"), context(batches=batches))
    assert {record.reason for record in found.records} == {""}
    assert len(found.records) == 14
    assert serialized(model) != serialized(plain)
    again = decoder(vocabulary=640)
    guided(again, batches)
    assert serialized(again) == serialized(model)


@pytest.mark.torch
def test_refining_knows_what_relates_rows():
    batches, found = token_batches(4, 2, 12), []
    for refine in (0, 1):
        model = decoder()
        found.append(sum(record.metrics["sqnr_db"] for record in guided(model, batches, refine=refine).records))
    assert found[0] != found[1]


@pytest.mark.torch
def test_without_gradients_everything_counts_the_same():
    text = "g (float[B,16] x) => (float[B,8] y) { [fc] h = MatMul(x, w) y = Hardmax(h) }"
    weights = {"w": normal((16, 8), 0)}
    batches = [{"x": normal((9, 16), 1)}]
    model, plain = parse(text, weights), parse(text, weights)
    (record,) = guided(model, batches).records
    assert record.reason == "not guided: no gradient of the answer is known there"
    apply("gptq", assigned(plain, "w2a16-g16-asym"), context(batches=batches))
    assert serialized(model) == serialized(plain)


@pytest.mark.torch
def test_an_interrupted_run_measures_nothing_again(tmp_path, monkeypatch):
    batches = token_batches(4, 2, 12)
    model, again = decoder(), decoder()
    guided(model, batches, Checkpoints(tmp_path), drift=0.5)
    store = Checkpoints(tmp_path)
    from qcompiler import tuning

    monkeypatch.setattr(tuning, "fisher_information", lambda *_, **__: pytest.fail("measured again"))
    guided(again, batches, store, drift=0.5)
    assert serialized(again) == serialized(model)
    assert store.tally["guidance"][0] == store.tally["guidance"][1] > 0
    monkeypatch.undo()
    other = Checkpoints(tmp_path)
    guided(decoder(), batches, other, drift=0.5, draws=2)
    assert other.tally["guidance"][0] == 0
    assert other.tally["gptq"][0] == 0


def test_what_is_missing_or_contradicts_is_refused(monkeypatch):
    with pytest.raises(SchemeError, match="draws=0 and outdamp=1 have to be at least 1 and above 0"):
        load("gptq")(context(), {"guided": "true", "draws": "0"})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(PassError, match=r"gptq\{guided=true\} needs the package torch"):
        guided(decoder(), token_batches(1))
