"""Pruning against the papers' recursions on explicit inverses, and against exact optima."""

import itertools

import numpy as np
import pytest

from qcompiler.errors import NumericsError
from qcompiler.numerics.pruning import Sparsity, cheapest, made_up_for, prune_greedily, prune_swept
from qcompiler.numerics.second_order import damped, row_losses, upper_factor
from tests.builders import correlated, normal

K, N = 24, 6
PATTERNS = pytest.mark.parametrize("text", ["50", "25", "2:4", "1:4", "4:8", "3:5"])


def hessian(seed=0, columns=K):
    rows = correlated(columns, seed).astype(np.float64)
    return damped(rows.T @ rows / len(rows), 0.05)


def loss(weight, pruned, matrix):
    return row_losses((weight - pruned).astype(np.float64), matrix).sum()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50", Sparsity(0.5)), ("12.5", Sparsity(0.125)), ("2:4", Sparsity(0.5, 2, 4)), ("1:8", Sparsity(0.875, 1, 8))],
)
def test_patterns_are_read_and_written(text, expected):
    assert Sparsity.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["", "0", "100", "4:4", "0:4", "5:4", "half", "2:", "-3"])
def test_what_is_no_pattern(text):
    with pytest.raises(NumericsError, match="give a share in percent, such as 50, or runs, such as 2:4"):
        Sparsity.parse(text)


@PATTERNS
def test_masks_have_the_pattern_and_the_least_cost(text):
    sparsity, costs = Sparsity.parse(text), np.square(normal((N, K), 1))
    mask = cheapest(costs, sparsity)
    if not sparsity.of:
        assert mask.sum() == round(sparsity.share * N * K)
        assert costs[mask].max() <= costs[~mask].min()
        return
    for row, start in itertools.product(range(N), range(0, K, sparsity.of)):
        part, gone = costs[row, start : start + sparsity.of], mask[row, start : start + sparsity.of]
        assert (~gone).sum() == min(sparsity.kept, len(part))
        assert not gone.any() or part[gone].max() <= part[~gone].min()


def test_ties_go_to_the_first():
    assert cheapest(np.ones((1, 8)), Sparsity.parse("2:4")).tolist() == [[True, True, False, False] * 2]


def test_made_up_for_is_the_constrained_optimum():
    """The gradient of the loss vanishes at the values that stay, and no other choice of them has less."""
    weight, matrix = normal((N, K), 2), hessian(3)
    mask = cheapest(np.square(weight), Sparsity.parse("50"))
    found = made_up_for(weight, mask, matrix)
    assert not found[mask].any()
    gradient = (found - weight).astype(np.float64) @ matrix
    assert np.abs(gradient[~mask]).max() <= 1e-5 * np.abs(weight @ matrix).max()
    assert loss(weight, found, matrix) < loss(weight, np.where(mask, 0, weight), matrix)


def by_inverting_what_is_left(values, matrix, sparsity):
    """OBS of one row: what goes, in order, and what each costs; the Hessian is inverted anew before each step."""
    values, gone, costs = values.astype(np.float64), [], []
    while True:
        free = [k for k in range(len(values)) if k not in gone]
        lengths = {k // sparsity.of: 0 for k in free} if sparsity.of else {}
        for k in free:
            if sparsity.of:
                lengths[k // sparsity.of] += 1
        open_ones = [k for k in free if not sparsity.of or lengths[k // sparsity.of] > sparsity.kept]
        if not open_ones:
            return gone, costs
        inverse = np.linalg.inv(matrix[np.ix_(free, free)])
        cost = {k: values[k] ** 2 / inverse[free.index(k), free.index(k)] for k in open_ones}
        chosen = min(cost, key=cost.get)
        at = free.index(chosen)
        for i, k in enumerate(free):
            if k != chosen:
                values[k] -= values[chosen] / inverse[at, at] * inverse[i, at]
        values[chosen] = 0
        gone.append(chosen)
        costs.append(cost[chosen])


@PATTERNS
@pytest.mark.parametrize("seed", range(2))
def test_greedy_pruning_is_the_recursion_of_the_papers(text, seed):
    sparsity, weight, matrix = Sparsity.parse(text), normal((N, K), seed), hessian(seed + 5)
    found, mask = prune_greedily(weight, matrix, sparsity)
    each = [by_inverting_what_is_left(row, matrix, sparsity) for row in weight]
    expected = np.zeros((N, K), bool)
    if sparsity.of:
        for row, (gone, _) in enumerate(each):
            expected[row, gone] = True
    else:
        steps = [
            (max(costs[: turn + 1]), row, turn) for row, (_, costs) in enumerate(each) for turn in range(len(costs))
        ]
        for _, row, turn in sorted(steps)[: round(sparsity.share * N * K)]:
            expected[row, each[row][0][turn]] = True
    assert np.array_equal(mask, expected)
    np.testing.assert_allclose(found, made_up_for(weight, mask, matrix), rtol=1e-5, atol=1e-6)
    # What OBS says each step costs is what is lost in the end.
    costs = sum(sum(costs[: int(gone.sum())]) for (_, costs), gone in zip(each, mask, strict=True))
    np.testing.assert_allclose(loss(weight, found, matrix), costs, rtol=1e-5)


def test_deleting_one_value_is_best_where_obs_says():
    weight, matrix = normal((1, 12), 8), hessian(9, 12)
    one = Sparsity(1 / 12)
    found, mask = prune_greedily(weight, matrix, one)
    tried = []
    for k in range(12):
        only = np.zeros((1, 12), bool)
        only[0, k] = True
        tried.append(loss(weight, made_up_for(weight, only, matrix), matrix))
    assert mask[0].argmax() == int(np.argmin(tried))
    np.testing.assert_allclose(loss(weight, found, matrix), min(tried), rtol=1e-5)


@PATTERNS
def test_where_columns_are_unrelated_obs_is_obd(text):
    sparsity, weight = Sparsity.parse(text), normal((N, K), 3)
    loudness = np.square(normal(K, 4)) + 0.1
    expected = cheapest(np.square(weight) * loudness, sparsity)
    found, mask = prune_greedily(weight, np.diag(loudness).astype(np.float64), sparsity)
    assert np.array_equal(mask, expected)
    np.testing.assert_allclose(found, np.where(expected, 0, weight))
    swept, also = prune_swept(weight, np.diag(np.sqrt(loudness)), sparsity, 240)
    assert np.array_equal(also, expected)
    np.testing.assert_allclose(swept, found)


@PATTERNS
def test_the_more_is_known_the_less_is_lost(text):
    """Over layers: OBS one value at a time, OBS in sweeps, OBD, magnitudes."""
    sparsity, means = Sparsity.parse(text), np.zeros(4)
    for seed in range(8):
        weight, matrix = normal((N, 40), seed), hessian(seed, 40)
        energy = loss(weight, np.zeros_like(weight), matrix)
        greedy, _ = prune_greedily(weight, matrix, sparsity)
        swept, mask = prune_swept(weight, upper_factor(matrix), sparsity)
        assert not swept[mask].any()
        assert np.array_equal(cheapest(np.where(mask, 0.0, 1.0), sparsity), mask)
        diagonal = np.where(cheapest(np.square(weight) * np.diagonal(matrix), sparsity), 0, weight)
        plain = np.where(cheapest(np.square(weight), sparsity), 0, weight)
        means += [loss(weight, each, matrix) / energy for each in (greedy, swept, diagonal, plain)]
    assert (np.diff(means) > 0).all(), means


def test_a_sweep_makes_up_as_well_as_its_order_allows():
    """Values of later columns, given those before, are the conditional optimum of `second_order.sweep`."""
    weight, matrix = normal((N, K), 6), hessian(7)
    found, mask = prune_swept(weight, upper_factor(matrix), Sparsity.parse("50"))
    # Deleting nothing more behind the last deleted column, later values are what makes up for all of it exactly.
    for row in range(N):
        last = int(np.flatnonzero(mask[row]).max())
        behind = np.arange(K) > last
        if behind.any():
            gradient = (found[row] - weight[row]).astype(np.float64) @ matrix
            assert np.abs(gradient[behind]).max() <= 1e-4 * np.abs(weight[row] @ matrix).max()


def test_a_matrix_that_is_not_positive_definite_is_refused():
    with pytest.raises(NumericsError, match="the Hessian is not positive definite"):
        prune_greedily(normal((2, 4), 0), np.zeros((4, 4)), Sparsity(0.5))


def test_threads_do_not_matter():
    weight, matrix = normal((40, K), 1), hessian(2)
    one, two = (prune_greedily(weight, matrix, Sparsity.parse("50"), threads) for threads in (1, 2))
    assert np.array_equal(one[0], two[0])
