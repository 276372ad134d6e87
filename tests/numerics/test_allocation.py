"""Formats for many weights within a budget, beside trying all of them."""

from itertools import pairwise, product

import numpy as np
import pytest

from qcompiler.numerics.allocation import Choice, allocate, cheapest, efficient, frontier, swapped, totals


def random_units(seed, count=6, choices=4):
    """Losses that fall with size, mostly."""
    generator = np.random.default_rng(seed)
    units = []
    for _ in range(count):
        sizes = generator.choice(np.arange(1, 60), choices, replace=False)
        losses = generator.uniform(0.1, 10) * 2.0 ** (-sizes / 8) * generator.uniform(0.8, 1.25, choices)
        units.append([Choice(int(size), float(loss)) for size, loss in zip(sizes, losses, strict=True)])
    return units


def best_of_all(units, budget):
    found = (totals(units, chosen) for chosen in product(*(range(len(choices)) for choices in units)))
    return min(plan.loss for plan in found if plan.size <= budget)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_budget_is_met_and_the_loss_is_within_a_step_of_the_optimum(seed, share):
    units = random_units(seed)
    least = sum(min(choice.size for choice in choices) for choices in units)
    most = sum(max(choice.size for choice in choices) for choices in units)
    budget = int(least + share * (most - least))
    plan = totals(units, allocate(units, budget))
    assert plan.size <= budget
    step = max(max(c.loss for c in choices) - min(c.loss for c in choices) for choices in units)
    assert plan.loss <= best_of_all(units, budget) + step
    # What is not worse than the best by luck: on average the gap is small.
    assert plan.loss <= 1.6 * best_of_all(units, budget)


def test_more_room_never_costs_accuracy_by_more_than_a_hair():
    units = random_units(3, count=40)
    losses = [totals(units, allocate(units, budget)).loss for budget in range(700, 2000, 50)]
    assert all(later <= 1.02 * earlier for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0] / 3


def test_the_smallest_choices_where_nothing_fits_and_the_best_where_all_does():
    units = [[Choice(4, 1.0), Choice(2, 3.0)], [Choice(8, 0.0), Choice(3, 9.0)]]
    assert allocate(units, 0) == [1, 1]
    assert allocate(units, 12) == [0, 0]
    assert allocate(units, 11) == [1, 0]


def test_what_room_is_left_is_used_off_the_hull_too():
    units = [[Choice(1, 10.0), Choice(5, 8.0), Choice(9, 0.0)]]
    assert efficient(units[0]) == [0, 2]
    assert allocate(units, 6) == [1]


def test_larger_choices_without_gain_are_no_choices():
    assert efficient([Choice(1, 2.0), Choice(2, 2.0), Choice(3, 1.0), Choice(4, 1.5)]) == [0, 2]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_the_cheapest_plan_keeps_to_the_loss_and_nothing_in_it_can_be_made_smaller(seed, share):
    units = random_units(seed)
    least = sum(min(choice.loss for choice in choices) for choices in units)
    most = sum(min(choices, key=lambda choice: choice.size).loss for choices in units)
    limit = least + share * (most - least)
    chosen = cheapest(units, limit)
    plan = totals(units, chosen)
    assert plan.loss <= limit
    for unit, choices in enumerate(units):
        for choice in choices:
            smaller = choice.size < choices[chosen[unit]].size
            assert not (smaller and plan.loss - choices[chosen[unit]].loss + choice.loss <= limit - 1e-9)
    plans = (totals(units, each) for each in product(*(range(len(choices)) for choices in units)))
    step = max(max(c.size for c in choices) - min(c.size for c in choices) for choices in units)
    assert plan.size <= min(each.size for each in plans if each.loss <= limit) + step


def test_a_loss_that_cannot_be_had_gives_the_best_there_is():
    units = [[Choice(4, 1.0), Choice(2, 3.0)], [Choice(8, 0.5), Choice(3, 9.0)]]
    assert cheapest(units, 0.0) == [0, 0]
    assert cheapest(units, 100.0) == [1, 1]


def test_the_frontier_runs_from_the_smallest_to_the_best_plan_and_no_budget_beats_it():
    units = random_units(5, count=30)
    points = frontier(units, 12)
    assert points[0].size == sum(min(choice.size for choice in choices) for choices in units)
    assert points[-1].loss == pytest.approx(sum(min(choice.loss for choice in choices) for choices in units))
    assert 8 <= len(points) <= 13
    for point, later in pairwise(points):
        assert (later.size > point.size, later.loss < point.loss) == (True, True)
    for point in points:  # on the convex hull, so that a budget of its size gives no better plan
        assert totals(units, allocate(units, point.size)).loss == pytest.approx(point.loss)


def test_the_frontier_of_units_without_a_choice_is_a_point():
    assert frontier([[Choice(3, 1.0)], [Choice(4, 2.0)]], 9) == [Choice(7, 3.0)]


# Swaps.


def other_truth(units, seed):
    """Losses as they really are: those of the model, each unit's wrong by a factor of its own."""
    factors = np.random.default_rng(seed).uniform(0.2, 5, len(units))
    return lambda plan: sum(f * choices[at].loss for f, choices, at in zip(factors, units, plan, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_swaps_end_within_the_budget_and_never_worse_than_they_began(seed):
    units = random_units(seed, count=20)
    budget = 20 * 25
    chosen = allocate(units, budget)
    truth = other_truth(units, seed)
    found = swapped(units, chosen, budget, truth, 15)
    assert totals(units, found.chosen).size <= budget
    assert (found.before, found.after) == (truth(chosen), truth(found.chosen))
    assert found.after <= found.before
    assert found.runs <= 16


def test_swaps_win_back_part_of_what_a_wrong_model_lost():
    gained = []
    for seed in range(8):
        units, truth = random_units(seed, count=20), other_truth(random_units(seed, count=20), seed)
        found = swapped(units, allocate(units, 500), 500, truth, 30)
        gained.append(1 - found.after / found.before)
    assert np.mean(gained) > 0.05


def test_a_measure_that_only_grows_keeps_the_plan():
    units = random_units(1, count=12)
    chosen = allocate(units, 300)
    measured = iter(range(100))
    found = swapped(units, chosen, 300, lambda plan: next(measured), 10)
    assert found.chosen == chosen
    assert (found.kept, found.before, found.after, found.runs) == (0, 0, 0, 11)


def test_no_tries_measure_the_plan_alone():
    units = random_units(1, count=4)
    seen = []
    found = swapped(units, allocate(units, 120), 120, lambda plan: seen.append(plan) or 1.0, 0)
    assert (len(seen), found.runs) == (1, 1)
