"""Learning by gradient what a weight is rounded to; needs the extra `torch`."""

from qcompiler.torch_graph.devices import find_device
from qcompiler.tuning.directions import Adam, Momentum, Pace
from qcompiler.tuning.distillation import Head, Stage, distill, time_of_step
from qcompiler.tuning.fisher import fisher_information
from qcompiler.tuning.learned_vector import LearnedVector, put_back_vectors
from qcompiler.tuning.learned_weight import LearnedWeight, Start
from qcompiler.tuning.lessons import Lessons, row_batches
from qcompiler.tuning.losses import LOSSES, Example
from qcompiler.tuning.rounding import Outcome, Settings, fast_bfloat16, parted, tune_block
from qcompiler.tuning.sites import addition_problem, outcome_arrays, outcome_of, put_back, start_of, tuning_problem
from qcompiler.tuning.student import METHODS, Method, Student, put_back_all
from qcompiler.tuning.whole import learn_whole, whole_problem

__all__ = [
    "LOSSES",
    "METHODS",
    "Adam",
    "Example",
    "Head",
    "LearnedVector",
    "LearnedWeight",
    "Lessons",
    "Method",
    "Momentum",
    "Outcome",
    "Pace",
    "Settings",
    "Stage",
    "Start",
    "Student",
    "addition_problem",
    "distill",
    "fast_bfloat16",
    "find_device",
    "fisher_information",
    "learn_whole",
    "outcome_arrays",
    "outcome_of",
    "parted",
    "put_back",
    "put_back_all",
    "put_back_vectors",
    "row_batches",
    "start_of",
    "time_of_step",
    "tune_block",
    "tuning_problem",
    "whole_problem",
]
