"""Learning by gradient what a weight is rounded to; needs the extra `torch`."""

from qcompiler.tuning.distillation import Head, Stage, distill
from qcompiler.tuning.fisher import fisher_information
from qcompiler.tuning.learned_vector import LearnedVector
from qcompiler.tuning.learned_weight import LearnedWeight, Pace, Start
from qcompiler.tuning.rounding import Example, Outcome, Settings, fast_bfloat16, parted, tune_block
from qcompiler.tuning.sites import outcome_arrays, outcome_of, put_back, start_of, tuning_problem
from qcompiler.tuning.whole import learn_whole, put_back_vectors, whole_problem

__all__ = [
    "Example",
    "Head",
    "LearnedVector",
    "LearnedWeight",
    "Outcome",
    "Pace",
    "Settings",
    "Stage",
    "Start",
    "distill",
    "fast_bfloat16",
    "fisher_information",
    "learn_whole",
    "outcome_arrays",
    "outcome_of",
    "parted",
    "put_back",
    "put_back_vectors",
    "start_of",
    "tune_block",
    "tuning_problem",
    "whole_problem",
]
