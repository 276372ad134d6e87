"""The command `tune` as options of `qcompile`: an algorithm more, behind the others."""

from typing import Any

from qcompiler.errors import SchemeError

__all__ = ["with_training"]

# Training moves biases itself, and starts from original weights, which this pass drops.
_NOT_BEFORE = "correct_bias"


def with_training(algorithm: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of `qcompile` that do what those of `tune` say.

    Args:
        algorithm: What comes first; empty for what the effort stands for.
        options: Of the command; those of training are taken out.
    """
    from qcompiler.config import CompileConfig
    from qcompiler.pipeline import default_algorithms
    from qcompiler.scheme import Scheme
    from qcompiler.scheme_plan import SchemePlan

    rest = dict(options)
    steps, minutes, more = rest.pop("steps"), rest.pop("minutes"), rest.pop("more")
    given = {name: rest.pop(name) for name in ("method", "loss", "rows", "batch", "rate", "optimizer")}
    if rest["calibration"] is None:
        raise SchemeError("tune learns from data; give --calibration PATH")
    if steps is not None and minutes is not None:
        raise SchemeError("--steps and --minutes both say how long to train; keep one of them")
    if algorithm and rest["effort"] is not None:
        raise SchemeError("--effort stands for algorithms; drop it, or --algorithm")
    if not algorithm:
        plain = CompileConfig(plan=SchemePlan(Scheme.parse(rest["scheme"])), effort=rest.pop("effort"))
        chosen = [name for name in default_algorithms(plain, calibrated=True) if name != _NOT_BEFORE]
        algorithm = ",".join(chosen)
    given.update(steps=steps, minutes=minutes)
    texts = [f"{name}={value}" for name, value in given.items() if value is not None]
    training = ",".join([*texts, *(part.strip() for part in more.split(",") if part.strip())])
    return {**rest, "effort": None, "algorithm": f"{algorithm},tune{{{training}}}"}
