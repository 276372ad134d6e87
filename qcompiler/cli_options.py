"""The options of the commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qcompiler.cli_recipe import use_recipe

__all__ = ["COUNT", "compile_options", "tune_options", "verbosity"]

COUNT = click.IntRange(min=1)


def _all_of(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


verbosity = _all_of(
    click.option("-v", "--verbose", count=True, help="Say more: -v lists every site, -vv logs what happens."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
)

compile_options = _all_of(
    click.argument("model", type=click.Path(path_type=Path)),
    click.option("--scheme", default="w4a16", show_default=True, help="What weights become: see 'qcompiler schemes'."),
    click.option(
        "--algorithm",
        default="",
        help="Weight algorithms, comma-separated, options in braces: gptq{percdamp=0.02}. "
        "Default: what --effort stands for with calibration data, rtn without.",
    ),
    click.option(
        "--effort",
        help="What stands for --algorithm: fast (seconds), balanced (minutes, the default with calibration data), or "
        "best (several times as long; needs torch). docs/schemes.md says what they hold, and --print-recipe spells it.",
    ),
    click.option(
        "--calibration",
        type=click.Path(path_type=Path),
        help="Data to measure on: .npz, folder of .npz, .npy of token ids, .jsonl or text; or synthetic: what the "
        "model makes itself, from its batch normalizations or as text; or norms: gains of normalizations alone.",
    ),
    click.option(
        "--labels",
        type=click.Path(path_type=Path),
        help="To train on (see the pass tune): .npy of integers, one for each row of --calibration.",
    ),
    click.option(
        "--calibrator",
        default="auto",
        show_default=True,
        help="Ranges of activations: minmax, average, percentile, mse, entropy, or auto: the least error of each.",
    ),
    click.option(
        "--reduce-range", is_flag=True, help="7-bit weights under 8-bit activations, for x86 processors without VNNI."
    ),
    click.option(
        "--kv-cache",
        default="float",
        show_default=True,
        help="What a decoder's key-value cache becomes: float, kv8 (int8) or kv4 (int4).",
    ),
    click.option("--float16", is_flag=True, help="Make float16 of what stays float; inputs and outputs stay float32."),
    click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json for text calibration data."),
    click.option(
        "--samples",
        type=int,
        help="Rows of calibration data to use, evenly spaced; N/8 others verify. Default: all, or 32 synthetic ones.",
    ),
    click.option(
        "--sequence-length", type=COUNT, default=512, show_default=True, help="Tokens in a row of calibration text."
    ),
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        help="Output file (folder for a folder). Default: beside the model.",
    ),
    click.option("--force", is_flag=True, help="Overwrite an existing output."),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="PATTERN=SCHEME",
        help="Scheme of the sites that match; the last match wins.",
    ),
    click.option(
        "--ignore",
        multiple=True,
        metavar="PATTERN",
        help="Leave matching sites float. 're:' begins a regular expression.",
    ),
    click.option("--only", multiple=True, metavar="PATTERN", help="Leave all other sites float."),
    click.option(
        "--embedding", default="w8a16", show_default=True, metavar="SCHEME|float", help="Scheme of lookup tables."
    ),
    click.option(
        "--lm-head",
        default="w8a16",
        show_default=True,
        metavar="SCHEME|float",
        help="Scheme of the projection to the vocabulary.",
    ),
    click.option(
        "--target",
        default="cpu",
        show_default=True,
        help="What the form is chosen for: cpu, cuda, tensorrt or portable.",
    ),
    click.option(
        "--format",
        "output_format",
        default="matmulnbits",
        show_default=True,
        help="matmulnbits (fast) or qdq (standard operators).",
    ),
    click.option(
        "--accuracy-level",
        type=int,
        help="MatMulNBits accuracy level. Default: 0 (exact) at 3 and 4 bits, 4 at 2 and 8 bits.",
    ),
    click.option(
        "--custom-ops",
        default="auto",
        show_default=True,
        help="Use our own operators for formats that ONNX Runtime has no kernels for (3 bits): always, never, or auto: "
        "where they are built; prefer: where it has slower kernels too (w4a8). Their bodies run anywhere.",
    ),
    click.option("--opset", type=int, help="Raise the opset to this. Default: only where the output form needs it."),
    click.option(
        "--sequential/--no-sequential",
        default=True,
        show_default=True,
        help="Calibrate each site on what the quantized sites before it produce, or on the float model.",
    ),
    click.option(
        "--provider",
        "providers",
        multiple=True,
        help="Execution provider(s); the first one calibrates. Default: CPUExecutionProvider.",
    ),
    click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads. Default: all cores."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seeds everything random."),
    click.option(
        "--bits-per-weight",
        type=float,
        help="Choose a format for each linear layer, so that all of them take this many bits a weight with scales.",
    ),
    click.option("--max-size", help="Choose a format for each weight, so that the output is no larger, e.g. 90MB."),
    click.option(
        "--target-kl",
        type=float,
        help="Choose the smallest formats that keep the divergence of the logits, in nats, at this, e.g. 0.02.",
    ),
    click.option(
        "--pareto",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Draw what each size costs, for formats chosen by one of these three (.png, .svg).",
    ),
    click.option("--html", is_flag=True, help="Write the report as a page too, MODEL.report.html (extra `report`)."),
    click.option("--max-memory", help="Memory past which activations go to disk, for example 2GB."),
    click.option(
        "--verify/--no-verify", default=True, show_default=True, help="Compare the output with the float model."
    ),
    click.option("--min-sqnr", type=float, help="Exit with code 3 if an output's SQNR in dB is below this."),
    click.option("--max-kl", type=float, help="Exit with code 3 if the KL divergence of the logits is above this."),
    click.option("--bench", is_flag=True, help="Time the output and the float model in turns."),
    click.option(
        "--exclude-worst",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="N",
        help="Compile twice: the second time without the N sites that added the most noise.",
    ),
    click.option("--require-quantized", is_flag=True, help="Fail if there is nothing to quantize."),
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option("--dump-dir", type=click.Path(path_type=Path), help="Write the model after each pass here."),
    click.option(
        "--checkpoint",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder for results on the way: an interrupted command goes on where it stopped when it is given again.",
    ),
    click.option("--cache", is_flag=True, help="The same in the user's cache folder: see `qcompiler cache`."),
    click.option(
        "--pipeline", "pipeline_text", help="Run exactly these passes, for example one that a failure printed."
    ),
    click.option(
        "--recipe",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=use_recipe,
        help="YAML file of options by these names, one a line; what is given beside it comes first.",
    ),
    click.option("--print-recipe", is_flag=True, help="Print the recipe that says the same as the options, and stop."),
    verbosity,
)

tune_options = _all_of(
    click.option(
        "--method",
        default="lsq",
        show_default=True,
        help="How: qat, lsq, pact, bitfit, or for weights of two or three values (w1.58) binaryconnect, bnn, xnor, "
        "twn, absmean, or ttq. See docs/methods.md.",
    ),
    click.option("--steps", type=COUNT, help="Steps of descent. Default: 200."),
    click.option(
        "--minutes", type=float, help="As many steps as this takes; the recipe in the output names their number."
    ),
    click.option(
        "--loss",
        type=click.Choice(["auto", "kl", "mse", "labels", "next"]),
        default="auto",
        show_default=True,
        help="kl and mse: distance to the float model; labels; next: of token ids, the next.",
    ),
    click.option(
        "--rows", type=COUNT, help="Rows of --calibration to learn from; --samples are those that all passes see."
    ),
    click.option("--batch", type=COUNT, help="Rows in a step. Default: 1 of token ids, 32 of anything else."),
    click.option("--rate", type=float, help="First step of weights, in steps between two codes. Default: 0.01."),
    click.option(
        "--optimizer",
        type=click.Choice(["adamw", "sgd"]),
        default="adamw",
        show_default=True,
        help="Adam with weight decay, or stochastic gradients with momentum.",
    ),
    click.option(
        "--options", "more", default="", help="More options of the pass, e.g. check=20,patience=3: see 'passes'."
    ),
)
