"""Our operators beside ONNX Runtime's MatMulNBits, in turns in one process: time, and what of it is allowed.

    python -m benchmarks.bench_kernels [--size 4096] [--layers 4] [--rounds 60] [--threads 1] [--only TEXT]
                                       [--save FILE.jsonl]

Weights are N = K = size, groups of 128 (of a whole row for signs). A model is a chain of layers with weights of their
own, and times are those of one: to run a session takes 0.05 ms by itself, half of what a product of signs does. For one
row of activations each operator runs beside the narrowest MatMulNBits that computes as it does: int8 forms beside
accuracy level 4, exact ones beside level 0; for 128 rows 4-bit codes with 8-bit activations run beside both levels, of
which the faster one counts. In every round each runs once, in an order that rotates; ratios are taken within a round,
and their median is printed with its quartiles. The error of an operator is that of one layer, root mean square, as a
share of the exact result. The library is the one that `python -m qcompiler.kernels.build` made, or that QCOMPILER_OPS
names. The exit code is 1 if a ratio or an error is larger than it may be.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from onnx import helper

from benchmarks.rows import collect, markdown, row_options
from qcompiler.kernels import reference
from qcompiler.kernels.library import instruction_set, library_path
from qcompiler.kernels.schemas import DOMAIN, OPERATORS, function_proto
from qcompiler.session import OrtRunner

GROUP = 128
OPSET = 21
MOST_ERROR = {0: 1e-5, 4: 1e-2}  # by accuracy level
# Name of a MatMulNBits -> (bits, accuracy level).
BESIDE = {"4 bits, level 4": (4, 4), "4 bits, level 0": (4, 0), "2 bits, level 4": (2, 4)}


@dataclass(frozen=True)
class Case:
    """An operator with what it runs beside, and how much of its time it may take.

    Attributes:
        operator: Its name.
        level: Its accuracy level.
        rows: Of activations.
        beside: Names of `BESIDE`; the fastest of them counts.
        most: The largest ratio that is allowed.
    """

    operator: str
    level: int
    rows: int
    beside: tuple[str, ...]
    most: float


CASES = (
    Case("MatMul3Bits", 4, 1, ("4 bits, level 4",), 1.0),
    Case("MatMul2Bits", 4, 1, ("2 bits, level 4",), 1.0),  # ternary weights
    Case("MatMul1Bit", 4, 1, ("2 bits, level 4",), 1.0),
    Case("MatMul4Bits", 4, 1, ("4 bits, level 4",), 1.0),
    Case("MatMulSigns", 0, 1, ("2 bits, level 4",), 0.5),
    Case("MatMul3Bits", 0, 1, ("4 bits, level 0",), 1.3),
    Case("MatMulCodebook8", 0, 1, ("4 bits, level 0",), 1.3),
    Case("MatMulCodebook16", 0, 1, ("4 bits, level 0",), 1.3),
    Case("MatMul2Bits", 0, 1, ("4 bits, level 0",), 1.0),
    Case("MatMul1Bit", 0, 1, ("4 bits, level 0",), 1.0),
    Case("MatMul4Bits", 4, 128, ("4 bits, level 4", "4 bits, level 0"), 0.35),
)


@dataclass(frozen=True)
class Result:
    """A row of the table; times in milliseconds, ratios of the operator's time to that of what it ran beside.

    `error` is that of the operator's result, as a share of it.
    """

    operator: str
    level: int
    rows: int
    beside: str
    ms: float
    beside_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    most: float
    error: float


def _model(
    layers: Sequence[tuple[onnx.NodeProto, dict[str, np.ndarray]]], rows: int, size: int, *, body: bool
) -> bytes:
    """A chain of nodes that read A and constants, whose names get the layer's number."""
    for at, (node, _) in enumerate(layers):
        node.input[:] = [f"A{at}" if at else "A", *(f"{name}{at}" for name in node.input[1:])]
        node.output[:] = ["Y" if at + 1 == len(layers) else f"A{at + 1}"]
    node = layers[0][0]
    graph = helper.make_graph(
        [node for node, _ in layers],
        "g",
        [helper.make_tensor_value_info("A", onnx.TensorProto.FLOAT, [rows, size])],
        [helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, [rows, size])],
        [
            onnx.numpy_helper.from_array(array, f"{name}{at}")
            for at, (_, constants) in enumerate(layers)
            for name, array in constants.items()
        ],
    )
    opsets = [
        helper.make_opsetid(domain, version) for domain, version in (("", OPSET), (DOMAIN, 1), ("com.microsoft", 1))
    ]
    functions = [function_proto(node.op_type, OPSET)] if body else []
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return bytes(model.SerializeToString())


def ours(case: Case, size: int, layers: int, random: np.random.Generator) -> bytes:
    """A model of one of our operators."""
    return _model([_our_layer(case, size, random) for _ in range(layers)], case.rows, size, body=True)


def _our_layer(case: Case, size: int, random: np.random.Generator) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    """A node, and constants that are anything."""
    contract = OPERATORS[case.operator]
    group = size if case.operator == "MatMulSigns" else GROUP
    constants: dict[str, np.ndarray] = {}
    for operand in contract.inputs[1:]:
        name = operand.name
        if name == "B":
            shape = size, size // group, group * contract.bits // 8
            constants[name] = random.integers(0, 256, shape).astype(np.uint8)
        elif name == "scales":
            constants[name] = random.uniform(0.5, 1.5, (size, size // group, 1)).astype(np.float32)
        elif name == "zero_points":
            constants[name] = random.integers(0, 1 << contract.bits, (size, size // group, 1)).astype(np.uint8)
        elif name == "codebook":
            constants[name] = random.standard_normal((1 << contract.bits, 1)).astype(np.float32)
        else:
            constants[name] = np.zeros(
                (1, 1, 1) if name == "starts" else 1, np.int32 if name == "starts" else np.float32
            )
    attributes = {"accuracy_level": case.level} if contract.attributes else {}
    return helper.make_node(case.operator, ["A", *constants], ["Y"], domain=DOMAIN, **attributes), constants


def theirs(name: str, rows: int, size: int, layers: int, random: np.random.Generator) -> bytes:
    """A model of MatMulNBits."""
    return _model([_their_layer(name, size, random) for _ in range(layers)], rows, size, body=False)


def _their_layer(name: str, size: int, random: np.random.Generator) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    bits, level = BESIDE[name]
    constants = {
        "B": random.integers(0, 256, (size, size // GROUP, GROUP * bits // 8)).astype(np.uint8),
        "scales": random.uniform(0.5, 1.5, (size, size // GROUP)).astype(np.float32),
        "zero_points": random.integers(0, 256, (size, -(-size // GROUP * bits // 8))).astype(np.uint8),
    }
    attributes = {"K": size, "N": size, "bits": bits, "block_size": GROUP, "accuracy_level": level}
    return helper.make_node("MatMulNBits", ["A", *constants], ["Y"], domain="com.microsoft", **attributes), constants


def measure(case: Case, size: int, layers: int, rounds: int, threads: int) -> Result:
    """Run a case in turns with what it runs beside."""
    random = np.random.default_rng(0)
    feeds = {"A": random.standard_normal((case.rows, size)).astype(np.float32)}
    models = [ours(case, size, layers, random)]
    models += [theirs(name, case.rows, size, layers, random) for name in case.beside]
    library = library_path()
    runners = [OrtRunner(model, threads=threads, custom_ops=library) for model in models]
    taken: list[list[float]] = [[] for _ in runners]
    for turn in range(rounds + 3):
        for place in range(len(runners)):
            which = (place + turn) % len(runners)
            started = time.perf_counter()
            runners[which].run(feeds)
            if turn >= 3:
                taken[which].append((time.perf_counter() - started) / layers)
    fastest = min(range(1, len(runners)), key=lambda at: statistics.median(taken[at]))
    ratios = [mine / other for mine, other in zip(taken[0], taken[fastest], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    mine, other = (1e3 * statistics.median(taken[at]) for at in (0, fastest))
    named = case.operator, case.level, case.rows, case.beside[fastest - 1]
    return Result(*named, mine, other, ratio, low, high, case.most, error(case, size))


def error(case: Case, size: int) -> float:
    """How far the operator's result is from the exact one, root mean square, as a share of it."""
    random = np.random.default_rng(1)
    node, constants = _our_layer(case, size, random)
    rows = random.standard_normal((case.rows, size)).astype(np.float32)
    exact = reference.run(case.operator, [rows, *constants.values()]).astype(np.float64)
    model = _model([(node, constants)], case.rows, size, body=True)
    with OrtRunner(model, threads=1, custom_ops=library_path()) as runner:
        found = runner.run({"A": rows})["Y"]
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def ways(size: int, layers: int, rounds: int, threads: int) -> Iterator[tuple[str, partial[Result]]]:
    """What each row is called, and how to get it."""
    for case in CASES:
        name = f"{case.operator} level {case.level} rows {case.rows}"
        yield name, partial(measure, case, size, layers, rounds, threads)


def table(results: Sequence[Result]) -> str:
    """The rows as Markdown."""
    titles = [
        "operator",
        "beside MatMulNBits",
        "level",
        "rows",
        "ms",
        "beside, ms",
        "ratio",
        "quartiles",
        "at most",
        "error",
    ]
    rows = [
        [r.operator, r.beside, str(r.level), str(r.rows), f"{r.ms:.3f}", f"{r.beside_ms:.3f}", f"{r.ratio:.2f}",
         f"{r.ratio_low:.2f}-{r.ratio_high:.2f}", f"{r.most:.2f}", f"{r.error:.1e}"]
        for r in results
    ]  # fmt: skip
    return markdown(titles, rows, 2)


def main() -> None:
    """Measure the rows asked for, print the table and what is too slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    row_options(parser, "3Bits or 'level 0'")
    parser.add_argument("--size", type=int, default=4096, help="N and K (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of each model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="that are timed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each session (default: %(default)s)")
    args = parser.parse_args()
    print(f"N = K = {args.size}, {args.layers} layers, {args.threads} thread(s), {instruction_set()}", file=sys.stderr)
    results = collect(ways(args.size, args.layers, args.rounds, args.threads), args.only, args.save)
    print(table(results))
    problems = [f"takes {r.ratio:.2f} of {r.beside}" if r.ratio > r.most else "" for r in results]
    problems += [f"is wrong by {r.error:.1e}" if r.error > MOST_ERROR[r.level] else "" for r in results]
    for r, problem in zip(2 * results, problems, strict=True):
        if problem:
            print(f"FAILS: {r.operator} at level {r.level} with {r.rows} rows {problem}")
    sys.exit(any(problems))


if __name__ == "__main__":
    main()
