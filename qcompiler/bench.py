"""Latency of several models, timed in turns in one process: what slows the machine down slows all of them down."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qcompiler.calibration_inputs import fitted
from qcompiler.errors import KernelError
from qcompiler.session import Feeds, OrtRunner, operators_of

__all__ = ["BenchResult", "Latency", "bench"]

# Rounds that are timed whatever they take.
_FEWEST = 3


@dataclass(frozen=True)
class BenchResult:
    """How fast a compiled model is beside the float model it was made of.

    Attributes:
        data: What was run, in words.
        inputs: Shapes of the inputs.
        float_ms: Median time of the float model, in milliseconds.
        compiled_ms: Median time of the compiled model.
        ratio: Median over the rounds of the compiled model's time to the float model's in the same round.
        ratio_low: Lower quartile of that ratio.
        ratio_high: Upper quartile.
    """

    data: str
    inputs: dict[str, list[int]]
    float_ms: float
    compiled_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


class Latency(NamedTuple):
    """How long one run of a model takes.

    Attributes:
        seconds: Median.
        ratio: Median over the rounds of this model's time to the first model's in the same round; 1 for the first.
        ratio_low: Lower quartile of that ratio.
        ratio_high: Upper quartile.
    """

    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


def bench(
    models: Sequence[Path | bytes],
    feeds: Feeds,
    repeat: int = 10,
    *,
    warmup: int = 2,
    provider: str = "CPUExecutionProvider",
    threads: int = 0,
    seconds: float | None = None,
) -> list[Latency]:
    """Time models on the same inputs.

    In every round each model runs once, in an order that rotates from round to round; ratios are taken within a round.
    All models are in memory at the same time.

    Args:
        models: Files, or bytes that hold all weights.
        feeds: Inputs; a model is fed those that it has.
        repeat: Rounds that are timed.
        warmup: Rounds before them.
        provider: Execution provider.
        threads: Threads; 0 takes all cores.
        seconds: No further round begins after this time, once three are timed; None is unlimited.

    Returns:
        One entry a model, in order.

    Raises:
        KernelError: A model that cannot be loaded or run, or that needs an input which `feeds` lacks.
    """
    runners = [OrtRunner(model, provider=provider, threads=threads, custom_ops=_operators(model)) for model in models]
    inputs = []
    for model, runner in zip(models, runners, strict=True):
        missing = [spec.name for spec in runner.inputs if spec.name not in feeds]
        if missing:
            name = model.name if isinstance(model, Path) else "a model"
            raise KernelError(f"{name} needs the input '{missing[0]}', which the first model does not have")
        fed = fitted(feeds, runner.inputs)
        inputs.append({spec.name: fed[spec.name] for spec in runner.inputs})
    taken: list[list[float]] = [[] for _ in runners]
    began = time.perf_counter()
    for turn in range(warmup + repeat):
        if seconds is not None and turn >= warmup + _FEWEST and time.perf_counter() - began > seconds:
            break
        for place in range(len(runners)):
            which = (place + turn) % len(runners)
            started = time.perf_counter()
            runners[which].run(inputs[which])
            if turn >= warmup:
                taken[which].append(time.perf_counter() - started)
    return [_latency(times, taken[0]) for times in taken]


def _operators(model: Path | bytes) -> Path | None:
    """The library that a model's operators are in, if that is built."""
    import onnx

    proto = onnx.load(model, load_external_data=False) if isinstance(model, Path) else onnx.ModelProto.FromString(model)
    return operators_of(proto.opset_import)


def _latency(times: Sequence[float], first: Sequence[float]) -> Latency:
    ratios = [mine / other for mine, other in zip(times, first, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Latency(statistics.median(times), middle, low, high)
