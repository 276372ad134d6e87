"""Learning by gradient what a weight is rounded to; needs the extra `torch`."""

from qcompiler.tuning.distillation import Head, Stage, distill
from qcompiler.tuning.rounding import Example, LearnedWeight, Outcome, Settings, Start, tune_block
from qcompiler.tuning.sites import put_back, start_of, tuning_problem

__all__ = [
    "Example",
    "Head",
    "LearnedWeight",
    "Outcome",
    "Settings",
    "Stage",
    "Start",
    "distill",
    "put_back",
    "start_of",
    "tune_block",
    "tuning_problem",
]
