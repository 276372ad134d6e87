"""What a verification finds: how close a compiled model is, in every way of running it, and what runs."""

from dataclasses import dataclass

from qcompiler.verify_integers import IntegerAudit, Unfused
from qcompiler.verify_outputs import Closeness, OutputMetrics

__all__ = ["AccuracyLevelCost", "RunResult", "Verification"]


@dataclass(frozen=True)
class RunResult:
    """One way of running the compiled model on the short row, and how close that was."""

    provider: str
    optimized: bool
    close: Closeness


@dataclass(frozen=True)
class AccuracyLevelCost:
    """What int8 activations inside MatMulNBits cost, on the short row.

    Attributes:
        nodes: MatMulNBits at accuracy level 4.
        written: The model as it is.
        exact: The model with those nodes at level 0.
    """

    nodes: int
    written: Closeness
    exact: Closeness


@dataclass(frozen=True)
class Verification:
    """How close a compiled model is to the float model.

    Attributes:
        outputs: Figures of every output over all rows.
        runs: Every provider, with optimizations off and on, on the short row.
        sqnr_db: SQNR of the worst output in dB; infinite if nothing differs, None without a float output.
        kl: KL divergence of the worst output, mean over positions, nats; None without logits.
        top1: Top-1 agreement of the worst output; None without logits.
        accuracy_level: None where no node is at level 4, or it was not measured.
        fused: Provider that was asked for -> operator -> number of nodes that ran, for operators that matter for speed.
        rows: Held-out rows that were run.
        short_positions: Positions of the short row; 0 if it is a row as it came.
        remarks: What a user should know.
        seconds: Wall-clock time.
        peak_bytes: Peak anonymous memory of the process meanwhile.
        synthetic: Whether the rows are made up.
        integers: What became of encoders and decoders of activations, on the first provider; None where the model has
            none, or the provider does not show it.
        unfused: Those that are left, and operators that run in float but were meant to be integer, or the other way.
    """

    outputs: tuple[OutputMetrics, ...]
    runs: tuple[RunResult, ...]
    sqnr_db: float | None
    kl: float | None
    top1: float | None
    accuracy_level: AccuracyLevelCost | None
    fused: dict[str, dict[str, int]]
    rows: int
    short_positions: int
    remarks: tuple[str, ...]
    seconds: float
    peak_bytes: int
    synthetic: bool
    integers: IntegerAudit | None = None
    unfused: tuple[Unfused, ...] = ()

    def floor_failures(self, min_sqnr_db: float | None, max_kl: float | None) -> list[str]:
        """What misses the floors, in words; a floor on a figure that no output has is missed."""
        failures = []
        if min_sqnr_db is not None:
            if self.sqnr_db is None:
                failures.append("no output is a float, whose SQNR could be compared with --min-sqnr")
            elif self.sqnr_db < min_sqnr_db:
                worst = min((m for m in self.outputs if m.sqnr_db is not None), key=lambda m: m.sqnr_db or 0.0)
                failures.append(f"SQNR of '{worst.name}' is {self.sqnr_db:.2f} dB, below {min_sqnr_db:g} dB")
            for run in self.runs:
                found = run.close.sqnr_db
                if run.optimized and run is not self._first and found is not None and found < min_sqnr_db:
                    failures.append(f"SQNR on {run.provider} is {found:.2f} dB, below {min_sqnr_db:g} dB")
        if max_kl is not None:
            if self.kl is None:
                failures.append("no output looks like logits, whose KL divergence could be compared with --max-kl")
            elif not self.kl <= max_kl:
                failures.append(f"KL divergence is {self.kl:.4g} nats, above {max_kl:g} nats")
        return failures

    @property
    def _first(self) -> RunResult | None:
        return next((run for run in self.runs if run.optimized), None)
