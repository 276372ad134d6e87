"""Run the kernels for CUDA in Triton's interpreter on many cases and print the largest errors as JSON; a process of its
own, since Triton looks at TRITON_INTERPRET where kernels are defined.

    TRITON_INTERPRET=1 python -m tests.triton_sweep
"""

import json
import sys

import numpy as np
import torch

from qcompiler.kernels import reference
from qcompiler.kernels.schemas import OPERATORS
from qcompiler.kernels.triton import matmul
from qcompiler.kernels.triton.compiler import variants
from tests.cuda_cases import arguments, kind_of
from tests.kernel_cases import make_inputs
from tests.kernel_sweep import relative

ROWS = {1: ((1,), (3,)), 16: ((13,),), 32: ((2, 17),), 64: ((70,),)}


def cases():
    """(operator, options of `make_inputs`) that between them have every format, size of groups and kind of operand."""
    for name, each in OPERATORS.items():
        entries = (1, 2, 4) if "Codebook" in name else (1,)
        for entry in entries:
            # Groups of one octet, groups that no block divides, rows that end inside of one.
            for N, K, group_size in ((5, 72, 8 * entry), (67, 136, 96), (9, 600, 256)):
                kinds = ("each", "one", "half") if "zero_points" in [i.name for i in each.inputs] else ("each",)
                for zeros in kinds if N == 5 else kinds[:1]:
                    yield name, {"N": N, "K": K, "group_size": group_size, "entry": entry, "zeros": zeros}


def launch(variant, name, inputs):
    """The product that a variant makes of an operator's inputs."""
    found, entry = arguments(name, inputs)
    values = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in found.items()}
    constants = {"KIND": variant.kind, "BITS": variant.bits, "ENTRY": entry, "BLOCK_N": variant.block_n,
                 "BLOCK_O": variant.block_k // (8 * entry)}  # fmt: skip
    grid = -(-found["N"] // variant.block_n), -(-found["M"] // variant.block_m)
    if variant.block_m == 1:
        matmul.matmul_row[grid](*values.values(), **constants)
    else:
        matmul.matmul_tile[grid](*values.values(), **constants, BLOCK_M=variant.block_m)
    return values["y"].numpy().reshape(*inputs[0].shape[:-1], -1)


def main():
    worst = {}
    for name, options in cases():
        for variant in variants():
            same = (variant.kind, variant.bits, variant.entry) == (
                kind_of(name),
                OPERATORS[name].bits,
                options["entry"],
            )
            if not same:
                continue
            for seed, rows in enumerate(ROWS[variant.block_m]):
                inputs = make_inputs(name, rows, seed=seed, dtype=variant.floats, **options)
                expected = reference.run(name, inputs)
                error = relative(launch(variant, name, inputs), expected)
                assert np.isfinite(error), (variant.name, options)
                worst[variant.name] = max(error, worst.get(variant.name, 0.0))
    sys.stdout.write(json.dumps(worst))


if __name__ == "__main__":
    main()
