"""Give bad models and inputs to the operators of a library, and see that each ends in an error that names the operator,
or in a result: a process of its own, which a sanitizer may watch.

    python -m tests.fuzz_operators LIBRARY COUNT [SEED]

Prints how many models ran, were refused as they were loaded, and were refused as they ran, as JSON.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from qcompiler.kernels.library import register
from qcompiler.kernels.schemas import DOMAIN, OPERATORS
from tests.kernel_cases import OPSET, make_inputs

HUGE = (1 << 20, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 62) + 1)
LEVELS = (-1, 5, 7, 99, -(1 << 40), (1 << 62))
WRONG_TYPES = ("float64", "int8", "int64", "uint16", "bool")


def inputs_of(random):
    """A good operator's inputs, small and of any kind."""
    name = str(random.choice(list(OPERATORS)))
    entry = int(random.choice([1, 2, 4])) if "Codebook" in name else 1
    return name, make_inputs(
        name,
        tuple(random.integers(0, 20, random.integers(0, 3))),
        N=int(random.integers(1, 40)),
        K=int(random.integers(1, 300)),
        group_size=int(random.choice([1, 2, 4, 16])) * 8 * entry,
        dtype=str(random.choice(["float32", "float16"])),
        entry=entry,
        zeros=str(random.choice(["each", "one", "half"])),
        seed=int(random.integers(1 << 30)),
    )


def other_shape(array, random):
    """The array in a shape that it should not have, with other contents where sizes differ."""
    shape = list(array.shape)
    way = random.integers(6)
    if way == 0 and shape:  # one more or less
        axis = random.integers(len(shape))
        shape[axis] = max(0, shape[axis] + int(random.choice([-1, 1, 7])))
    elif way == 1 and shape:  # nothing at all, or more than there can be of nothing
        shape[random.integers(len(shape))] = 0
        if len(shape) > 1 and random.integers(2):
            free = [axis for axis, size in enumerate(shape) if size]
            if free:
                shape[random.choice(free)] = int(random.choice(HUGE))
    elif way == 2:
        shape.insert(int(random.integers(len(shape) + 1)), int(random.choice([1, 1, 2])))
    elif way == 3 and shape:
        del shape[random.integers(len(shape))]
    elif way == 4:
        random.shuffle(shape)
    else:  # another row, group or column more
        shape = [size * int(random.choice([1, 1, 2])) for size in shape]
    try:
        if np.prod(shape, dtype=object) > 1 << 20:
            return array
        return np.resize(array, shape) if array.size else np.zeros(shape, array.dtype)
    except ValueError:  # numpy knows no such shape
        return array


def other_contents(array, random):
    """Numbers that no compiler would write."""
    changed = array.copy()
    if not changed.size:
        return changed
    places = random.integers(0, changed.size, random.integers(1, 5))
    if changed.dtype.kind == "f":
        changed.flat[places] = random.choice([np.nan, np.inf, -np.inf, 0, 65504])
    elif changed.dtype == np.int32:
        changed.flat[places] = random.choice([-1, -(1 << 31), (1 << 31) - 1, 1 << 20, 9])
    else:
        changed.view(np.uint8).flat[places] = 255
    return changed


def spoiled(name, inputs, random):
    """Inputs and attributes of which some are wrong."""
    attributes = dict(OPERATORS[name].attributes)
    for _ in range(int(random.integers(1, 4))):
        at = int(random.integers(len(inputs)))
        way = random.integers(10)
        if way < 5:
            inputs[at] = other_shape(inputs[at], random)
        elif way < 8:
            inputs[at] = other_contents(inputs[at], random)
        elif way < 9 and attributes:
            attributes["accuracy_level"] = random.choice([*LEVELS, 4])
            attributes["accuracy_level"] = int(attributes["accuracy_level"])
            if random.integers(8) == 0:
                attributes = random.choice([{}, {"accuracy_level": "4"}, {"accuracy_level": 4.0}])
        else:
            inputs[at] = np.zeros(inputs[at].shape, str(random.choice(WRONG_TYPES)))
    return inputs, attributes


def model_of(name, inputs, attributes, constants):
    """A model of one node without a body; `constants` of its inputs lie in the file, the others are fed."""
    names = [each.name for each in OPERATORS[name].inputs]
    node = helper.make_node(name, names, ["Y"], name=f"the {name}", domain=DOMAIN, **attributes)

    def info(label, array):
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(label, element, [f"{label}{axis}" for axis in range(array.ndim)])

    graph = helper.make_graph(
        [node],
        "g",
        [info(label, array) for label, array in zip(names, inputs, strict=True) if label not in constants],
        [helper.make_tensor_value_info("Y", helper.np_dtype_to_tensor_dtype(inputs[0].dtype), None)],
        [
            onnx.numpy_helper.from_array(array, label)
            for label, array in zip(names, inputs, strict=True)
            if label in constants
        ],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def named(name, error, end):
    """The end, if the error names the operator."""
    if name not in str(error):
        raise AssertionError(f"{name} is not named: {error}") from error
    return end


def attempt(library, random):
    """One bad model: what became of it."""
    name, inputs = inputs_of(random)
    inputs, attributes = spoiled(name, inputs, random)
    names = [each.name for each in OPERATORS[name].inputs]
    constants = {label for label in names[1:] if random.integers(2)}
    model = model_of(name, inputs, attributes, constants).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # so that a sanitizer sees the end of each tensor
    options.intra_op_num_threads = 1
    register(options, library)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own types
        return named(name, error, "refused as it was loaded")
    feeds = {label: array for label, array in zip(names, inputs, strict=True) if label not in constants}
    try:
        (found,) = session.run(None, feeds)
    except Exception as error:
        return named(name, error, "refused as it ran")
    assert found.shape == (*inputs[0].shape[:-1], inputs[1].shape[0])
    return "ran"


def main():
    library, count = Path(sys.argv[1]), int(sys.argv[2])
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    ends = Counter(attempt(library, np.random.default_rng(seed)) for seed in range(first, first + count))
    sys.stdout.write(json.dumps(ends))


if __name__ == "__main__":
    main()
