"""Formats for many weights within a budget, beside trying all of them."""

from itertools import pairwise, product

import numpy as np
import pytest

from qcompiler.numerics.allocation import Choice, allocate, efficient


def random_units(seed, count=6, choices=4):
    """Losses that fall with size, mostly."""
    generator = np.random.default_rng(seed)
    units = []
    for _ in range(count):
        sizes = generator.choice(np.arange(1, 60), choices, replace=False)
        losses = generator.uniform(0.1, 10) * 2.0 ** (-sizes / 8) * generator.uniform(0.8, 1.25, choices)
        units.append([Choice(int(size), float(loss)) for size, loss in zip(sizes, losses, strict=True)])
    return units


def totals(units, chosen):
    picked = [choices[index] for choices, index in zip(units, chosen, strict=True)]
    return sum(choice.size for choice in picked), sum(choice.loss for choice in picked)


def best_of_all(units, budget):
    found = (totals(units, chosen) for chosen in product(*(range(len(choices)) for choices in units)))
    return min(loss for size, loss in found if size <= budget)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_budget_is_met_and_the_loss_is_within_a_step_of_the_optimum(seed, share):
    units = random_units(seed)
    least = sum(min(choice.size for choice in choices) for choices in units)
    most = sum(max(choice.size for choice in choices) for choices in units)
    budget = int(least + share * (most - least))
    size, loss = totals(units, allocate(units, budget))
    assert size <= budget
    step = max(max(c.loss for c in choices) - min(c.loss for c in choices) for choices in units)
    assert loss <= best_of_all(units, budget) + step
    # What is not worse than the best by luck: on average the gap is small.
    assert loss <= 1.6 * best_of_all(units, budget)


def test_more_room_never_costs_accuracy_by_more_than_a_hair():
    units = random_units(3, count=40)
    losses = [totals(units, allocate(units, budget))[1] for budget in range(700, 2000, 50)]
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
