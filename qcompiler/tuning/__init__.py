"""Learning by gradient what a weight is rounded to; needs the extra `torch`."""

from qcompiler.tuning.distillation import Head, Stage, distill
from qcompiler.tuning.learned_vector import LearnedVector, learnable_vectors
from qcompiler.tuning.learned_weight import LearnedWeight, Pace, Start
from qcompiler.tuning.rounding import Example, Outcome, Settings, fast_bfloat16, tune_block
from qcompiler.tuning.sites import put_back, start_of, tuning_problem

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
    "learnable_vectors",
    "put_back",
    "start_of",
    "tune_block",
    "tuning_problem",
]
