"""From names to ordered passes and back: ``canonicalize,assign_scheme,gptq{percdamp=0.02},...`` round-trips."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qcompiler import passes
from qcompiler.config import CompileConfig
from qcompiler.errors import SchemeError
from qcompiler.kernels.library import cuda_targets, library_path
from qcompiler.passes.base import WEIGHTS, PassContext, QuantPass, Stage, quantizes_activations

__all__ = ["build", "default_algorithms", "parse", "pass_names", "settled", "with_algorithms", "with_operators"]

Step = tuple[str, dict[str, str]]
_STEP = re.compile(r"\s*([a-z_][a-z0-9_]*)\s*(?:\{([^{}]*)\})?\s*(,|$)")
# What stands behind --effort where weights alone are quantized: what earned its time on SmolLM2-135M, see
# docs/schemes.md. The rest can be named with --algorithm.
_EFFORTS = {
    "fast": ("rtn",),
    "balanced": ("gptq{drift=0.5}",),
    "best": ("awq", "reorder{gather=false}", "gptq{drift=0.8,guided=true,percdamp=0.2,refine=1}"),
}


def parse(text: str) -> list[Step]:
    """Read ``name{option=value,...},name,...`` into (name, options) pairs; raises SchemeError at the place it fails."""
    steps: list[Step] = []
    position = 0
    while position < len(text):
        match = _STEP.match(text, position)
        if not match:
            raise SchemeError(
                f"'{text[position:]}' is not understood; expected name or name{{option=value,...}}, comma-separated"
            )
        options = {}
        for part in (match[2] or "").split(","):
            key, equals, value = part.partition("=")
            if part.strip() and not (equals and value.strip()):
                raise SchemeError(f"option '{part.strip()}' of {match[1]} has no value; write option=value")
            if part.strip():
                options[key.strip()] = value.strip()
        passes.load(match[1])
        steps.append((match[1], options))
        position = match.end()
    return steps


def pass_names() -> list[str]:
    """All passes in the order in which a pipeline would run them."""
    return [name for name, _ in order([(name, {}) for name in passes.names()])]


def order(steps: Sequence[Step]) -> list[Step]:
    """Stable sort by stage, then by what each pass says it comes after."""
    ranked = sorted(steps, key=lambda step: passes.load(step[0]).stage)
    placed: list[Step] = []
    while ranked:
        waiting = {name for name, _ in ranked}
        waiting |= {WEIGHTS for name in waiting if passes.load(name).chooses_weights}
        # The first whose predecessors are placed; a circle of "after" is a bug of the passes, not of the user.
        ready = next(step for step in ranked if not waiting & set(passes.load(step[0]).after))
        placed.append(ready)
        ranked.remove(ready)
    return placed


def with_operators(config: CompileConfig) -> CompileConfig:
    """The configuration with "auto" decided: our own operators are used where their library is built."""
    if config.custom_ops != "auto":
        return config
    library = library_path()
    runs = library is not None and (config.target != "cuda" or bool(cuda_targets(library)))
    return replace(config, custom_ops="always" if runs else "never")


def with_algorithms(config: CompileConfig, *, calibrated: bool) -> CompileConfig:
    """The configuration with the algorithms that an effort stands for spelled out."""
    algorithms = config.algorithms or default_algorithms(config, calibrated=calibrated)
    return replace(config, algorithms=algorithms, effort=None)


def settled(config: CompileConfig, chosen: Mapping[str, str]) -> CompileConfig:
    """The configuration with what passes chose by the clock in the place of how they were written."""
    if not chosen:
        return config
    steps = parse(",".join(config.algorithms))
    return replace(config, algorithms=tuple(chosen.get(name) or _written(name, options) for name, options in steps))


def _written(name: str, options: Mapping[str, str]) -> str:
    return name + ("{" + ",".join(f"{key}={value}" for key, value in options.items()) + "}" if options else "")


def default_algorithms(config: CompileConfig, *, calibrated: bool) -> tuple[str, ...]:
    """The algorithms where the user names none: what the effort stands for."""
    if not calibrated or config.from_norms:
        if config.effort == "best":
            raise SchemeError("--effort best learns from data; give --calibration PATH, or another effort")
        return ("gptq",) if config.from_norms and config.effort != "fast" else ("rtn",)
    if quantizes_activations(config):
        # At 8 bits nothing is left to learn; activations make the error.
        return ("smoothquant", "rtn" if config.effort == "fast" else "gptq", "correct_bias")
    return _EFFORTS[config.effort or "balanced"]


def build(config: CompileConfig, context: PassContext, *, text: str | None = None) -> list[QuantPass]:
    """The passes of a compilation.

    Args:
        config: Decides which passes apply and names the algorithms.
        context: Given to each pass.
        text: An explicit pipeline that is taken as it stands.

    Returns:
        Passes ready to run, in order.

    Raises:
        SchemeError: An unknown pass or option, or an algorithm that is none.
    """
    if text is not None:
        return [passes.load(name)(context, options) for name, options in parse(text)]
    algorithms = parse(",".join(config.algorithms))
    for name, _ in algorithms:
        if passes.load(name).stage not in (Stage.TRANSFORM, Stage.QUANTIZE):
            known = [n for n in passes.names() if passes.load(n).stage in (Stage.TRANSFORM, Stage.QUANTIZE)]
            raise SchemeError(f"'{name}' is not an algorithm; known algorithms: {', '.join(known)}")
    named = {name for name, _ in algorithms}  # a pass that runs anyway can be named to give it options
    always: list[Step] = [
        (name, {}) for name in passes.names() if name not in named and passes.load(name).applies(config)
    ]
    # So that the place of one that runs anyway does not depend on whether it is named.
    algorithms.sort(key=lambda step: not passes.load(step[0]).applies(config))
    return [passes.load(name)(context, options) for name, options in order([*always, *algorithms])]
