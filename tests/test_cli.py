"""The command line: what it prints where, what it writes, and how it exits."""

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

import qcompiler
from qcompiler import cli, driver
from qcompiler.cli import main, qcompile
from qcompiler.cli_output import default_output
from qcompiler.errors import ModelError
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern

SUBCOMMANDS = (
    "bench",
    "cache",
    "compare",
    "compile",
    "diff",
    "inspect",
    "passes",
    "report",
    "reproduce",
    "schemes",
    "tune",
)


def run(command, *arguments):
    """Run a command in this process."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def files(folder):
    return {path.name for path in folder.iterdir()}


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBCOMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself_and_its_options(name, flag):
    done = run(main, name, flag)
    assert done.exit_code == 0
    assert done.stdout.startswith(f"Usage: main {name}")
    options = [option for option in main.commands[name].params if option.param_type_name == "option"]
    assert not [option.name for option in options if not option.help]


def test_the_group_lists_its_commands_in_whole_sentences():
    done = run(main, "--help")
    lines = re.findall(r"^  (\w+) +(.*)$", done.stdout.partition("Commands:")[2], re.M)
    assert tuple(name for name, _ in lines) == SUBCOMMANDS
    assert all(text.endswith(".") and not text.endswith("..") for _, text in lines)


@pytest.mark.parametrize("command", [main, qcompile])
def test_version(command):
    done = run(command, "--version")
    assert done.exit_code == 0
    assert done.stdout.strip().endswith(qcompiler.__version__)


@pytest.mark.parametrize("command", [[], ["compile"]])
def test_a_command_without_arguments_is_a_usage_error(command):
    done = run(main, *command)
    assert done.exit_code == 2
    assert "Usage:" in done.stderr


def test_the_installed_commands_and_the_module_are_the_same():
    folder = Path(sys.executable).parent
    for command in ([folder / "qcompile"], [folder / "qcompiler", "compile"], [sys.executable, "-m", "qcompiler"]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("Usage:")


# --- compile ----------------------------------------------------------------------------------------------------------


def test_compile_writes_model_and_report_and_prints_the_report(linear_file, tmp_path):
    output = tmp_path / "small.onnx"
    done = run(qcompile, linear_file, "-o", output)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "w4a16-g64-asym" in done.stdout
    assert done.stdout.endswith(f"wrote {output}\nwrote {tmp_path / 'small.report.json'}\n")
    report = json.loads((tmp_path / "small.report.json").read_text("utf-8"))
    assert (report["quantized"], report["recipe"]["scheme"]) == (1, "w4a16")


def test_the_subcommand_does_the_same(linear_file, tmp_path):
    assert run(main, "compile", linear_file, "--scheme", "w8a16").exit_code == 0
    assert files(tmp_path) == {"model.onnx", "model-w8a16.onnx", "model-w8a16.report.json"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("model.onnx", "model-w4a16.onnx"), ("some.model", "some-w4a16.model"), ("bare", "bare-w4a16")],
)
def test_the_default_output_is_beside_the_model(tmp_path, name, expected):
    assert default_output(tmp_path / name, "w4a16") == tmp_path / expected


def test_a_folder_leads_to_a_folder(decoder_file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    decoder_file.rename(folder / "model.onnx")
    (folder / "genai_config.json").write_text(
        json.dumps({"model": {"decoder": {"filename": "model.onnx", "head_size": 32}}}), "utf-8"
    )
    done = run(qcompile, folder, "--scheme", "w8a16")
    assert done.exit_code == 0, done.stderr
    assert files(tmp_path) == {"folder", "folder-w8a16"}
    assert files(tmp_path / "folder-w8a16") == {"genai_config.json", "model.onnx", "model.report.json"}


def test_calibration_data_means_gptq(decoder_file, token_file, tmp_path):
    done = run(qcompile, decoder_file, "--calibration", token_file, "--samples", 8, "-o", tmp_path / "out.onnx")
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "out.report.json").read_text("utf-8"))
    assert report["recipe"]["algorithms"] == ["gptq{drift=0.5}"]
    assert report["calibration"]["description"].startswith("8 rows")
    assert report["verification"]["synthetic"] is False


def test_quiet_prints_nothing(linear_file):
    done = run(qcompile, linear_file, "-q")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_verbose_lists_sites_and_logs_each_pass_to_stderr(linear_file):
    done = run(qcompile, linear_file, "-v")
    assert re.search(r"^fc +w4a16-g64-asym", done.stdout, re.M)
    assert re.search(r"^Info: rtn: ", done.stderr, re.M)
    assert "Debug" not in done.stderr
    assert re.search(r"^ *[0-9.]+ s  Debug: ", run(qcompile, linear_file, "-vv", "--force").stderr, re.M)


def test_a_dry_run_shows_every_site_and_writes_nothing(decoder_file, tmp_path):
    done = run(qcompile, decoder_file, "--dry-run", "--set", "re:gate=w8a16-g32", "--ignore", "l0_down")
    assert (done.exit_code, done.stderr) == (0, "")
    assert files(tmp_path) == {"decoder.onnx"}
    assert re.search(r"^l0_gate +│ 48 x 32 +│ w8a16-g32-asym +│ MatMulNBits +│ 0.002", done.stdout, re.M)
    assert re.search(r"^l0_down +│ 32 x 48 +│ float: ignored \(--ignore l0_down\) +│ MatMul ", done.stdout, re.M)
    assert "passes: canonicalize,assign_scheme,rtn,fuse_gather,fuse_matmul_nbits,cleanup" in done.stdout


def test_patterns_reach_the_plan(decoder_file, tmp_path):
    done = run(
        qcompile, decoder_file, "--scheme", "w4a16-g32-sym", "--embedding", "float", "--lm-head", "w8a16",
        "--set", "re:l0_[qk]=w8a16-g16", "--set", "l0_k=float", "--ignore", "l0_v", "-o", tmp_path / "out.onnx",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    sites = json.loads((tmp_path / "out.report.json").read_text("utf-8"))["sites"]
    found = {row["site"]: row["scheme"] for row in sites}
    assert found == {
        "embed": "", "l0_q": "w8a16-g16-asym", "l0_k": "", "l0_v": "", "l0_o": "w4a16-g32-sym",
        "l0_gate": "w4a16-g32-sym", "l0_up": "w4a16-g32-sym", "l0_down": "w4a16-g32-sym", "head": "w8a16-g64-asym",
    }  # fmt: skip


@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
@pytest.mark.parametrize(
    "algorithm", ["rtn", "hqq", "gptq", "obq", "awq,gptq", "gptq,low_rank{rank=2}", "gptq,learned_rounding{steps=2}"]
)
def test_three_bits_go_through_every_algorithm_and_the_report_counts_four(
    algorithm, form, decoder_file, token_file, tmp_path
):
    if "learned" in algorithm:
        pytest.importorskip("torch")
    done = run(
        qcompile, decoder_file, "--scheme", "w3a16-g32-sym", "--embedding", "w3a16-g32-asym", "--lm-head", "w3a16",
        "--algorithm", algorithm, "--calibration", token_file, "--format", form, "-o", tmp_path / "out.onnx",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "3-bit codes stored in 4 bits" in done.stdout
    report = json.loads((tmp_path / "out.report.json").read_text("utf-8"))
    rows = {row["site"]: row for row in report["sites"]}
    assert all(row["action"] == "quantized" for name, row in rows.items() if name != "embed")
    assert (rows["embed"]["action"], rows["embed"]["scheme"]) == (
        ("quantized", "w3a16-g32-asym") if form == "matmulnbits" else ("skipped", "")
    )
    for row in rows.values():
        if row["action"] == "quantized":
            assert "holding 3-bit codes" in row["form"]
            assert row["sqnr_db"] > 8  # where awq scales, that of the weight is not what it looks at
            assert row["bits_per_weight"] >= 4 + 32 / 64
    (output,) = report["verification"]["outputs"]
    assert output["sqnr_db"] > 5


def test_a_compilation_can_be_timed(decoder_file, token_file, tmp_path):
    output = tmp_path / "out.onnx"
    done = run(qcompile, decoder_file, "--bench", "--calibration", token_file, "--samples", 4, "-o", output)
    assert done.exit_code == 0, done.stderr
    assert re.search(r"^one row +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+ to [0-9.]+$", done.stdout, re.M)
    report = json.loads((tmp_path / "out.report.json").read_text("utf-8"))
    one, batch = report["bench"]
    assert (one["inputs"]["input_ids"], batch["inputs"]["input_ids"]) == ([1, 7], [2, 7])
    assert one["ratio_low"] <= one["ratio"] <= one["ratio_high"]
    assert "bench" not in report["recipe"]
    plain = tmp_path / "plain.onnx"
    assert run(qcompile, decoder_file, "--calibration", token_file, "--samples", 4, "-o", plain).exit_code == 0
    assert plain.read_bytes() == output.read_bytes()
    assert json.loads((tmp_path / "plain.report.json").read_text("utf-8"))["bench"] == []


def test_the_worst_sites_can_be_left_float(decoder_file, token_file, tmp_path):
    output, again = tmp_path / "out.onnx", tmp_path / "again.onnx"
    options = [decoder_file, "--scheme", "w8a8", "--algorithm", "rtn", "--calibration", token_file]
    done = run(qcompile, *options, "--exclude-worst", 2, "-o", output)
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "out.report.json").read_text("utf-8"))
    names = [row["site"] for row in report["excluded"]]
    assert len(names) == 2
    assert report["excluded"][0]["added"] >= report["excluded"][1]["added"] > 0
    assert report["recipe"]["ignore"] == names
    assert {row["site"]: row["reason"] for row in report["sites"] if row["site"] in names} == {
        name: f"ignored (--ignore {name})" for name in names
    }
    assert re.search(rf"^{re.escape(names[0])} +\S+ +[0-9.]+ +[0-9.]+ %$", done.stdout, re.M)
    ignored = [word for name in names for word in ("--ignore", name)]
    assert run(qcompile, *options, *ignored, "-o", again).exit_code == 0
    assert again.read_bytes() == output.read_bytes()
    assert json.loads((tmp_path / "again.report.json").read_text("utf-8"))["excluded"] == []


def test_an_output_that_exists_is_noticed_before_the_first_compilation(linear_file, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "worst_sites", lambda *_: pytest.fail("compiled"))
    (tmp_path / "model-w4a16.onnx").write_bytes(b"")
    done = run(qcompile, linear_file, "--exclude-worst", 1)
    assert done.exit_code == 1
    assert "exists already" in done.stderr


def test_where_nothing_is_quantized_nothing_is_left_out(linear_file):
    done = run(qcompile, linear_file, "--exclude-worst", 1, "--ignore", "fc", "-q")
    assert done.exit_code == 0, done.stderr


def test_every_pass_can_be_dumped(linear_file, tmp_path):
    assert run(qcompile, linear_file, "--dump-dir", tmp_path / "dump").exit_code == 0
    assert "00-canonicalize.onnx" in files(tmp_path / "dump")


def test_an_explicit_pipeline_is_run_as_it_stands(linear_file, tmp_path):
    text = "canonicalize,assign_scheme,rtn{clip=true}"
    assert run(qcompile, linear_file, "-o", tmp_path / "out.onnx", "--pipeline", text).exit_code == 0
    passes = json.loads((tmp_path / "out.report.json").read_text("utf-8"))["passes"]
    assert [done["name"] for done in passes] == ["canonicalize", "assign_scheme", "rtn"]


def test_options_become_the_configuration(monkeypatch, tmp_path):
    seen = {}

    def capture(model, *, config, output, pipeline_text, progress):
        seen.update(model=model, config=config, output=output, pipeline=pipeline_text)
        raise ModelError("enough")

    monkeypatch.setattr(driver, "compile_model", capture)
    run(
        qcompile, "m.onnx", "-o", "o.onnx", "--scheme", "w2a16", "--algorithm", "rtn", "--calibration", "c.npy",
        "--tokenizer", "t.json", "--samples", 3, "--sequence-length", 99, "--force", "--set", "a=float", "--ignore",
        "b", "--only", "re:c", "--embedding", "float", "--lm-head", "w4a16", "--target", "cuda", "--format", "qdq",
        "--accuracy-level", 1, "--opset", 22, "--no-sequential", "--provider", "X", "--provider", "Y", "--threads", 2,
        "--seed", 5, "--max-memory", "1.5GiB", "--min-sqnr", 9, "--max-kl", 0.5, "--require-quantized", "--dump-dir",
        "d", "--pipeline", "rtn", "--calibrator", "mse", "--reduce-range", "--bench", "--html",
        "--exclude-worst", 2, "--kv-cache", "kv4", "--float16", "--checkpoint", "k", "--custom-ops", "never",
        "--labels", "y.npy",
    )  # fmt: skip
    config = seen["config"]
    assert (seen["model"], seen["output"], seen["pipeline"]) == (Path("m.onnx"), Path("o.onnx"), "rtn")
    plan = config.plan
    assert (plan.default, plan.embedding, plan.lm_head) == (Scheme(2), None, Scheme(4))
    assert (plan.overrides, plan.ignore, plan.only) == (((Pattern("a"), None),), (Pattern("b"),), (Pattern("re:c"),))
    given = {
        "algorithms": ("rtn",), "calibration": Path("c.npy"), "tokenizer": Path("t.json"), "samples": 3,
        "sequence_length": 99, "force": True, "target": "cuda", "output_format": "qdq", "accuracy_level": 1,
        "opset": 22, "sequential": False, "provider": "X", "verify_providers": ("X", "Y"), "threads": 2, "seed": 5,
        "max_memory": 3 << 29, "verify": True, "min_sqnr_db": 9.0, "max_kl": 0.5, "require_quantized": True,
        "dump_dir": Path("d"), "calibrator": "mse", "reduce_range": True, "bench": True, "html": True,
        "exclude_worst": 2, "kv_cache": "kv4", "float16": True, "checkpoint": Path("k"), "custom_ops": "never",
        "labels": Path("y.npy"),
    }  # fmt: skip
    assert {name: getattr(config, name) for name in given} == given
    # Which do not go with each other, or with algorithms.
    apart = {"bits_per_weight", "max_size", "target_kl", "pareto", "effort", "checkpoint_limit"}
    assert {*given, *apart, "plan", "progress"} == set(type(config).__dataclass_fields__)
    run(qcompile, "m.onnx", "--bits-per-weight", 3.5, "--pareto", "curve.svg")
    assert (seen["config"].bits_per_weight, seen["config"].pareto) == (3.5, Path("curve.svg"))
    run(qcompile, "m.onnx", "--target-kl", 0.02)
    assert seen["config"].target_kl == 0.02
    run(qcompile, "m.onnx", "--effort", "best")
    assert seen["config"].effort == "best"
    run(qcompile, "m.onnx", "--max-size", "90MB")
    assert seen["config"].max_size == 90_000_000


@pytest.mark.parametrize(
    ("text", "expected"), [("2GB", 2e9), ("1.5 gib", 3 << 29), ("800MB", 8e8), ("4096", 4096), ("7B", 7), (None, None)]
)
def test_sizes(text, expected):
    assert cli._bytes(text, "--max-memory") == expected


# --- exit codes -------------------------------------------------------------------------------------------------------

USAGE = {
    "no scheme": (["--scheme", "w5a16"], "weights of 5 bits are not available"),
    "scheme of an override": (["--set", "fc=w4"], "'w4' is not understood"),
    "override without a scheme": (["--set", "fc"], "--set fc is not understood"),
    "broken expression": (["--ignore", "re:("], "unterminated subpattern"),
    "pattern that selects nothing": (["--ignore", "gc"], "pattern 'gc' selects no site"),
    "no algorithm": (["--algorithm", "cleanup"], "'cleanup' is not an algorithm"),
    "no pass": (["--algorithm", "gptqq"], "no pass is called 'gptqq'"),
    "no option of the pass": (["--algorithm", "rtn{a=1}"], "pass rtn has no option 'a'"),
    "no value of the option": (["--algorithm", "gptq{percdamp=x}"], "percdamp=x is not a float"),
    "broken pipeline": (["--pipeline", "rtn{"], "'rtn{' is not understood"),
    "no target": (["--target", "gpu"], "--target gpu is unknown"),
    "no format": (["--format", "qdq2"], "--format qdq2 is unknown"),
    "no level": (["--accuracy-level", 5], "--accuracy-level 5 does not exist"),
    "no effort": (["--effort", "more"], "--effort more is unknown; choose one of fast, balanced, best"),
    "effort and algorithm": (["--effort", "fast", "--algorithm", "rtn"], "drop it, or --algorithm"),
    "best without data": (["--effort", "best"], "--effort best learns from data"),
    "no budget": (["--bits-per-weight", 0], "--bits-per-weight 0 is no budget"),
    "two budgets": (["--bits-per-weight", 4, "--max-size", "9MB"], "--bits-per-weight and --max-size are two budgets"),
    "divergence and size": (["--target-kl", 1, "--max-size", "9MB"], "--max-size and --target-kl are two budgets"),
    "no divergence": (["--target-kl", 0], "--target-kl 0 cannot be reached"),
    "curve without a budget": (["--pareto", "a.png"], "--pareto draws how formats are chosen; add"),
    "curve of another kind": (["--pareto", "a.pdf", "--max-size", "9MB"], "only .png and .svg are drawn"),
    "no size of the output": (["--max-size", "small"], "--max-size small is not a size"),
    "no rows": (["--samples", 0], "--samples 0"),
    "no threads": (["--threads", -1], "-1 is not in the range"),
    "no size": (["--max-memory", "much"], "--max-memory much is not a size"),
    "less than no size": (["--max-memory", "-1GB"], "--max-memory -1GB is not a size"),
    "no seed": (["--seed", -1], "-1 is not in the range"),
    "no opset": (["--opset", 99], "--opset 99"),
    "floor without verification": (["--max-kl", 1, "--no-verify"], "drop them or --no-verify"),
    "no option": (["--nothing"], "No such option"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors_exit_with_2_and_write_nothing(linear_file, tmp_path, name):
    arguments, message = USAGE[name]
    done = run(qcompile, linear_file, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert re.search(r"^Error: ", done.stderr, re.M)
    assert files(tmp_path) == {"model.onnx"}


FAILURES = {
    "no model": (["missing.onnx"], "missing.onnx: the model does not exist"),
    "no model in it": (["text.txt"], "is text, not an ONNX model"),
    "no data": (["model.onnx", "--calibration", "missing.npy"], "'missing.npy' does not exist"),
    "no folder": (["model.onnx", "-o", "missing/out.onnx"], "its folder 'missing' does not exist"),
    "the input itself": (["model.onnx", "-o", "model.onnx", "--force"], "is the input itself"),
    "an output that exists": (["model.onnx", "-o", "text.txt"], "text.txt: exists already; add --force"),
    "gptq without data": (["model.onnx", "--algorithm", "gptq"], "gptq needs calibration data"),
    "no provider": (["model.onnx", "--provider", "NoProvider"], "provider NoProvider is not in this ONNX Runtime"),
    "nothing to do": (["model.onnx", "--ignore", "fc", "--require-quantized"], "nothing was quantized"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_exit_with_1_and_one_line(linear_file, tmp_path, monkeypatch, name):
    arguments, message = FAILURES[name]
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("text", "utf-8")
    done = run(qcompile, *arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(r"Error: [^\n]+\n", done.stderr)
    assert message in done.stderr
    assert files(tmp_path) == {"model.onnx", "text.txt"}


def test_force_overwrites(linear_file, tmp_path):
    output = tmp_path / "out.onnx"
    output.write_bytes(b"old")
    assert run(qcompile, linear_file, "-o", output, "--force").exit_code == 0
    assert output.stat().st_size > 100


@pytest.mark.parametrize("floor", [["--min-sqnr", 200], ["--max-kl", 0.1]])
def test_below_a_floor_the_exit_code_is_3_and_the_output_is_there(linear_file, tmp_path, floor):
    done = run(qcompile, linear_file, *floor, "-q")
    assert done.exit_code == 3
    assert re.fullmatch(r"Below the floor: [^\n]+\n", done.stderr)
    assert "model-w4a16.onnx" in files(tmp_path)


def test_above_the_floor_all_is_well(decoder_file):
    done = run(qcompile, decoder_file, "--scheme", "w8a16", "--min-sqnr", 5, "--max-kl", 1, "-q")
    assert (done.exit_code, done.stderr) == (0, "")


def test_a_model_without_sites_is_copied_with_a_warning(linear_file, tmp_path):
    done = run(qcompile, linear_file, "--ignore", "fc")
    assert done.exit_code == 0
    assert re.fullmatch(r"Warning: model\.onnx: nothing was quantized [^\n]+ copied unchanged\n", done.stderr)
    assert (tmp_path / "model-w4a16.onnx").read_bytes() == linear_file.read_bytes()


CRASHES = {
    "a bug": (ZeroDivisionError("by zero"), 1, "internal error: ZeroDivisionError: by zero"),
    "memory": (MemoryError(), 1, "out of memory; give --max-memory"),
    "disk": (OSError(28, "No space left on device", "out.onnx"), 1, "out.onnx: No space left on device"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
}


def test_an_interrupted_command_says_where_it_would_go_on(linear_file, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "compile_model", fail)
    done = run(qcompile, linear_file, "--checkpoint", tmp_path / "k")
    assert done.exit_code == 130
    folder = tmp_path / "k"
    assert done.stderr == (
        f"Error: interrupted; nothing was written but checkpoints in {folder}, from which the same command goes on\n"
    )


def test_a_terminated_command_ends_like_an_interrupted_one(linear_file, monkeypatch):
    """And the handler is the caller's again afterwards."""
    before = signal.getsignal(signal.SIGTERM)

    def terminate(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("goes on after SIGTERM")

    monkeypatch.setattr(driver, "compile_model", terminate)
    done = run(qcompile, linear_file)
    assert (done.exit_code, done.stderr) == (143, "Error: interrupted; nothing was written\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_commands_outside_of_the_main_thread_leave_signals_alone(linear_file):
    before, codes = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: codes.append(run(qcompile, linear_file, "-q").exit_code))
    thread.start()
    thread.join()
    assert (codes, signal.getsignal(signal.SIGTERM)) == ([0], before)


@pytest.mark.parametrize("name", CRASHES)
def test_what_nobody_expected_is_one_line_too(linear_file, monkeypatch, name):
    error, code, message = CRASHES[name]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(driver, "compile_model", fail)
    done = run(qcompile, linear_file)
    assert (done.exit_code, done.stdout) == (code, "")
    assert re.fullmatch(r"Error: [^\n]+\n", done.stderr)
    assert message in done.stderr
    assert "Traceback" in run(qcompile, linear_file, "-vv").stderr
