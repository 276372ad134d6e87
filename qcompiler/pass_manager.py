"""Runs passes in order with instruments around them."""

import logging
from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.errors import PassError, QCompilerError
from qcompiler.instruments import Instrument, MemoryMeter, Timing
from qcompiler.passes.base import QuantPass, QuantPassResult
from qcompiler.records import PassReport

__all__ = ["PassManager"]

logger = logging.getLogger(__name__)


class PassManager:
    """A pipeline of passes.

    A failing pass is named together with the pipeline text up to it: passes are deterministic, so running that text on
    the same model (`qcompile --pipeline`) reproduces the failure; with `--dump-dir` the model before it is on disk.
    """

    def __init__(self, passes: Sequence[QuantPass], instruments: Sequence[Instrument] = ()) -> None:
        """Run `passes` in the given order; instruments see them in the given order, and in reverse afterwards."""
        self.passes = list(passes)
        self.instruments = list(instruments)

    def __str__(self) -> str:
        """The pipeline's textual form."""
        return ",".join(str(step) for step in self.passes)

    def run(self, model: ir.Model, meter: MemoryMeter) -> list[PassReport]:
        """Run all passes on `model`, in place.

        Raises:
            QCompilerError: What a pass raised, with its name.
            PassError: A pass failed in a way that is not the user's to mend.
        """
        timing = Timing()
        reports = []
        for step in self.passes:
            result = self._run_one(step, model, [timing, *self.instruments], meter)
            seconds = timing.seconds[step.name]
            reports.append(PassReport(step.name, seconds, meter.lap(), result.modified, result.records))
        return reports

    def _run_one(
        self, step: QuantPass, model: ir.Model, instruments: list[Instrument], meter: MemoryMeter
    ) -> QuantPassResult:
        for instrument in instruments:
            instrument.before_pass(step, model)
        meter.lap()
        try:
            result = step(model)
            assert isinstance(result, QuantPassResult)
            for instrument in reversed(instruments):
                instrument.after_pass(step, model, result)
        except Exception as error:
            for instrument in reversed(instruments):
                instrument.pass_failed(step, model, error)
            if isinstance(error, QCompilerError):
                raise
            done = ",".join(str(p) for p in self.passes[: self.passes.index(step) + 1])
            raise PassError(
                f"{step.name}: {type(error).__name__}: {error}; reproduce with --pipeline '{done}' -vv"
            ) from error
        return result
