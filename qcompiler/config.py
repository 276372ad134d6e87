"""CompileConfig: everything a compilation depends on, in one frozen object."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.errors import SchemeError
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan, parse_optional_scheme

__all__ = [
    "CALIBRATORS",
    "CUSTOM_OPS",
    "EFFORTS",
    "FORMATS_OUT",
    "KV_CACHES",
    "NORMS",
    "SYNTHETIC",
    "TARGETS",
    "CompileConfig",
]

TARGETS = ("cpu", "cuda", "tensorrt", "portable")
FORMATS_OUT = ("matmulnbits", "qdq")
EFFORTS = ("fast", "balanced", "best")
KV_CACHES = ("float", "kv8", "kv4")
SYNTHETIC, NORMS = "synthetic", "norms"
CUSTOM_OPS = ("auto", "always", "prefer", "never")
CALIBRATORS = ("auto", "minmax", "average", "percentile", "mse", "entropy")


@dataclass(frozen=True)
class CompileConfig:
    """What to do; `driver.compile_model` is a function of this and the model alone.

    Attributes:
        plan: Which site gets which scheme.
        algorithms: Weight algorithms in order, e.g. ("gptq",); pass options in braces: "gptq{percdamp=0.02}".
            Empty: what `effort` stands for.
        effort: How much time the algorithms may take: a name from `EFFORTS`; None is balanced.
        target: The kind of runtime the form is chosen for.
        output_format: ``matmulnbits`` or ``qdq``.
        accuracy_level: MatMulNBits' accuracy level; None chooses exact compute at 3 and 4 bits, level 4 at 2 and 8.
        custom_ops: Whether formats that ONNX Runtime has no kernels for may be written as our own operators, whose
            bodies run anywhere and whose library runs them fast: ``auto`` where the library is built, ``prefer`` where
            ONNX Runtime has slower kernels too.
        opset: Raise the standard opset to this; None keeps the model's where the output form allows it.
        calibration: A path, or an iterable of feeds (input name -> array), "synthetic" for data that the model makes
            itself, "norms" for what the gains of normalizations tell without any data, or None.
        tokenizer: tokenizer.json for text calibration data.
        samples: Calibration rows, evenly spaced over the data; None takes all, of synthetic ones 32.
        labels: A .npy file of labels, one for each row of the calibration data, to train on.
        sequence_length: Tokens in a row of text calibration data, or of text that the model writes.
        sequential: Take the sites of a segment in data-flow order, each seeing what the quantized prefix produces.
        provider: ONNX Runtime execution provider that calibration runs on.
        threads: Threads of ONNX Runtime and numpy; 0 takes all cores.
        calibrator: How ranges of activations are chosen: a name from `CALIBRATORS`.
        reduce_range: Use 7 of the 8 bits of weights that meet 8-bit activations, for x86 processors without VNNI.
        kv_cache: What the key-value cache of a decoder becomes: a name from `KV_CACHES`.
        float16: Whether what stays float becomes float16.
        bits_per_weight: Stored bits of the linear layers, scales included, that formats are chosen for.
        max_size: Bytes of the output that formats are chosen for.
        target_kl: Divergence of the outputs, in nats, that the smallest formats are chosen for.
        pareto: Draw what each size costs into this file, .png or .svg, where formats are chosen.
        html: Write the report as a page too.
        seed: Seeds everything random.
        max_memory: Bytes of anonymous memory past which activations and codes are spilled to disk; None is unlimited.
        verify: Whether the output is compared with the float model.
        verify_providers: Providers the output is run on.
        min_sqnr_db: Accuracy floor on the outputs' SQNR.
        max_kl: Accuracy ceiling on the KL divergence of logits.
        bench: Whether the output is timed against the float model.
        exclude_worst: Compile a second time with this many sites left float: those that added the most noise.
        require_quantized: Make a model without a quantized site an error.
        force: Overwrite an existing output.
        dump_dir: Write the model after each pass here.
        checkpoint: Store results in this folder as they are found, so that an interrupted compilation can go on; no
            byte of the output depends on it.
        checkpoint_limit: Bytes that this folder may hold in the end; what was used longest ago goes. None: no limit.
        progress: Called with (label, done, total) by whatever may take long.
    """

    plan: SchemePlan = field(default_factory=lambda: SchemePlan(Scheme(4)))
    algorithms: tuple[str, ...] = ()
    effort: str | None = None
    target: str = "cpu"
    output_format: str = "matmulnbits"
    accuracy_level: int | None = None
    custom_ops: str = "auto"
    opset: int | None = None
    calibration: str | Path | Iterable[dict[str, np.ndarray]] | None = None
    tokenizer: str | Path | None = None
    samples: int | None = None
    labels: str | Path | None = None
    sequence_length: int = 512
    sequential: bool = True
    provider: str = "CPUExecutionProvider"
    threads: int = 0
    calibrator: str = "auto"
    reduce_range: bool = False
    kv_cache: str = "float"
    float16: bool = False
    bits_per_weight: float | None = None
    max_size: int | None = None
    target_kl: float | None = None
    pareto: Path | None = None
    html: bool = False
    seed: int = 0
    max_memory: int | None = None
    verify: bool = True
    verify_providers: tuple[str, ...] = ("CPUExecutionProvider",)
    min_sqnr_db: float | None = None
    max_kl: float | None = None
    bench: bool = False
    exclude_worst: int = 0
    require_quantized: bool = False
    force: bool = False
    dump_dir: Path | None = None
    checkpoint: str | Path | None = None
    checkpoint_limit: int | None = None
    progress: Callable[[str, int, int], None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for value, known, option in (
            (self.target, TARGETS, "--target"),
            (self.output_format, FORMATS_OUT, "--format"),
            (self.calibrator, CALIBRATORS, "--calibrator"),
            (self.kv_cache, KV_CACHES, "--kv-cache"),
            (self.custom_ops, CUSTOM_OPS, "--custom-ops"),
            (self.effort, EFFORTS, "--effort"),
        ):
            if value is not None and value not in known:
                raise SchemeError(f"{option} {value} is unknown; choose one of {', '.join(known)}")
        if self.effort is not None and self.algorithms:
            raise SchemeError("--effort stands for algorithms; drop it, or --algorithm")
        if self.labels is not None and (self.calibration is None or self.keyword):
            raise SchemeError("--labels are those of the rows of --calibration; give --calibration PATH with them")
        if self.samples is not None and self.samples < 1:
            raise SchemeError(f"--samples {self.samples} leaves nothing to calibrate on; give at least 1")
        if self.threads < 0:
            raise SchemeError(f"--threads {self.threads} is less than none; give 0 for all cores")
        if self.exclude_worst < 0:
            raise SchemeError(f"--exclude-worst {self.exclude_worst} is less than none; give 0 to leave no site out")
        self._check_budget()
        if not self.verify and (self.min_sqnr_db is not None or self.max_kl is not None):
            raise SchemeError("--min-sqnr and --max-kl are checked by the verification; drop them or --no-verify")
        if self.accuracy_level is not None and not 0 <= self.accuracy_level <= 4:
            raise SchemeError(f"--accuracy-level {self.accuracy_level} does not exist; choose 0 to 4")

    @property
    def data_free(self) -> bool:
        """Whether the model is to make the calibration data itself."""
        return self.keyword == SYNTHETIC

    @property
    def from_norms(self) -> bool:
        """Whether normalizations alone tell how large activations are (see `norm_prior`)."""
        return self.keyword == NORMS

    @property
    def keyword(self) -> str:
        """What stands for calibration data, if it is one of the words that do."""
        given = str(self.calibration) if isinstance(self.calibration, str | Path) else ""
        return given if given in (SYNTHETIC, NORMS) else ""

    @property
    def own_operators(self) -> bool:
        """Whether operators of our own may be written; "auto" has been decided by then."""
        return self.custom_ops in ("always", "prefer")

    @property
    def budgets(self) -> dict[str, float]:
        """The options that have formats chosen, with what they ask for."""
        given = {
            "--bits-per-weight": self.bits_per_weight, "--max-size": self.max_size, "--target-kl": self.target_kl,
        }  # fmt: skip
        return {option: value for option, value in given.items() if value is not None}

    def _check_budget(self) -> None:
        budgets = list(self.budgets)
        if len(budgets) > 1:
            raise SchemeError(f"{budgets[0]} and {budgets[1]} are two budgets; keep one of them")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight <= 32:
            raise SchemeError(f"--bits-per-weight {self.bits_per_weight:g} is no budget; give for example 3.5")
        if self.target_kl is not None and not 0 < self.target_kl < float("inf"):
            raise SchemeError(f"--target-kl {self.target_kl:g} cannot be reached; give for example 0.02")
        if self.pareto is not None and not budgets:
            raise SchemeError("--pareto draws how formats are chosen; add --bits-per-weight, --max-size or --target-kl")
        if self.pareto is not None and self.pareto.suffix not in (".png", ".svg"):
            raise SchemeError(f"--pareto {self.pareto}: only .png and .svg are drawn")

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], **options: Any) -> "CompileConfig":
        """The configuration that `recipe` was made of, as far as that says it.

        Args:
            recipe: Plain values; keys that are missing have their defaults.
            options: Further fields.

        Raises:
            SchemeError: It has keys that are unknown, or values that mean nothing.
        """
        rest = dict(recipe)
        overrides = [text.rpartition("=")[::2] for text in rest.pop("set", ())]
        plan = SchemePlan(
            parse_optional_scheme(rest.pop("scheme")),
            overrides=tuple((Pattern(name), parse_optional_scheme(text)) for name, text in overrides),
            ignore=tuple(map(Pattern, rest.pop("ignore", ()))),
            only=tuple(map(Pattern, rest.pop("only", ()))),
        )
        if "embedding" in rest:
            plan = replace(plan, embedding=parse_optional_scheme(rest.pop("embedding")))
        if "lm_head" in rest:
            plan = replace(plan, lm_head=parse_optional_scheme(rest.pop("lm_head")))
        if "format" in rest:
            rest["output_format"] = rest.pop("format")
        rest["algorithms"] = tuple(rest.pop("algorithms", ()))
        if unknown := sorted(rest.keys() - cls.__dataclass_fields__.keys()):
            raise SchemeError(f"the recipe says '{unknown[0]}', which is unknown; it is of another version")
        return cls(plan=plan, **{**rest, **options})

    def recipe(self) -> dict[str, Any]:
        """What determines the bytes of the output, as plain values for metadata and report."""
        plan = self.plan
        used = {plan.default, plan.embedding, plan.lm_head}
        text = {scheme: "float" if scheme is None else str(scheme) for scheme in used}
        # Where all formats have kernels in ONNX Runtime, whether ours are built must not matter.
        odd = bool(self.budgets) or self.custom_ops == "prefer" or any(each.needs_operators for each in plan.schemes)
        return {
            **({"custom_ops": self.custom_ops} if odd else {}),
            **({"calibration": self.keyword} if self.keyword else {}),
            "scheme": text[plan.default],
            "embedding": text[plan.embedding],
            "lm_head": text[plan.lm_head],
            "set": [f"{p.text}={s or 'float'}" for p, s in plan.overrides],
            "ignore": [p.text for p in plan.ignore],
            "only": [p.text for p in plan.only],
            "algorithms": list(self.algorithms),
            "target": self.target,
            "format": self.output_format,
            "accuracy_level": self.accuracy_level,
            "opset": self.opset,
            "samples": self.samples,
            "sequence_length": self.sequence_length,
            "sequential": self.sequential,
            "calibrator": self.calibrator,
            "reduce_range": self.reduce_range,
            "kv_cache": self.kv_cache,
            "float16": self.float16,
            "bits_per_weight": self.bits_per_weight,
            "max_size": self.max_size,
            "target_kl": self.target_kl,
            "threads": self.threads,
            "seed": self.seed,
        }
