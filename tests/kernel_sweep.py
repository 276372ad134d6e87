"""Run every case of `kernel_cases` through a library and print the largest errors as JSON; a process of its own, since
the library looks at QCOMPILER_CPU once.

    python -m tests.kernel_sweep LIBRARY
"""

import json
import sys
from pathlib import Path

import numpy as np

from qcompiler.kernels import reference
from qcompiler.kernels.library import instruction_set
from qcompiler.kernels.schemas import OPERATORS
from qcompiler.session import OrtRunner
from tests.kernel_cases import cases, make_inputs, model_of

# Rows of activations: one, a few, more than registers take at a time, a ragged number of tiles, many.
ROWS = ((1,), (2, 3), (13,), (65,), (2, 128))


def relative(found, expected):
    size = np.abs(expected.astype(np.float64)).max() or 1.0
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max() / size)


def main():
    library = Path(sys.argv[1])
    worst = {}
    for name, options in cases():
        for seed, rows in enumerate(ROWS):
            inputs = make_inputs(name, rows, seed=seed, **options)
            exact = reference.run(name, inputs)
            for level in (0, 4) if "accuracy_level" in OPERATORS[name].attributes else (0,):
                attributes = {"accuracy_level": level} if level else {}
                model = model_of(name, inputs, body=seed % 2 == 0, **attributes)
                with OrtRunner(model.SerializeToString(), threads=1 + seed % 2, custom_ops=library) as runner:
                    found = runner.run({"A": inputs[0]})["Y"]
                    same = reference.run(name, inputs, accuracy_level=level)
                    assert found.shape == same.shape, (name, options, rows)
                    errors = [relative(found, same), relative(found, exact)]
                key = f"{name} {level}"
                worst[key] = [max(pair) for pair in zip(errors, worst.get(key, [0, 0]), strict=True)]
    sys.stdout.write(json.dumps({"instruction set": instruction_set(library), "worst": worst}))


if __name__ == "__main__":
    main()
