"""What the commands that measure and list print, and how reports and plans look where there is no terminal."""

import logging
import re

import pytest
from click.testing import CliRunner

from qcompiler import cli_output, passes
from qcompiler.cli import main, qcompile
from tests.builders import linear_model, normal, parse, serialized


def run(command, *arguments):
    """Run a command in this process."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_names_stay_in_one_piece_however_long(tmp_path):
    name = "layers." + "inner." * 40 + "down_proj"
    graph = linear_model(64, 24)
    graph.graph[0].name = name
    path = tmp_path / "model.onnx"
    path.write_bytes(serialized(graph))
    for command in ((qcompile, path, "--dry-run"), (qcompile, path, "-v"), (main, "inspect", path, "--sites")):
        assert name in run(*command).stdout


def test_a_dry_run_says_what_cannot_be_quantized_and_takes_a_pipeline(tmp_path):
    path = tmp_path / "model.onnx"
    text = "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { y = Conv(x, w) }"
    path.write_bytes(serialized(parse(text, {"w": normal((4, 3, 3, 3), 0)})))
    done = run(qcompile, path, "--dry-run", "--pipeline", "canonicalize,rtn")
    assert re.search(r"^1 +│ a convolution with a kernel of \[3, 3\]", done.stdout, re.M)
    assert done.stdout.startswith("nothing to quantize")
    assert done.stdout.endswith("passes: canonicalize,rtn\n")


def test_inspect_counts_sites_and_lists_them(decoder_file):
    done = run(main, "inspect", decoder_file)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "9 sites that can be quantized" in done.stdout
    assert re.search(r"^linear +│ MatMul +│ 7 +│ 0.035 +│ float", done.stdout, re.M)
    done = run(main, "inspect", decoder_file, "--sites")
    assert re.search(r"^head +│ lm_head +│ 512 x 32 +│ float +│ head, wh", done.stdout, re.M)


def test_inspect_knows_what_was_quantized(linear_file):
    run(qcompile, linear_file)
    done = run(main, "inspect", linear_file.with_name("model-w4a16.onnx"))
    assert "0 sites that can be quantized" in done.stdout
    assert re.search(r"^1 +│ quantized already: MatMulNBits", done.stdout, re.M)
    assert "Sites by kind" not in done.stdout


def test_compare_on_random_inputs_and_on_data(decoder_file, token_file):
    output = decoder_file.with_name("decoder-w4a16.onnx")
    assert run(qcompile, decoder_file, "-q").exit_code == 0
    done = run(main, "compare", decoder_file, output)
    assert done.exit_code == 0, done.stderr
    assert "compared with the float model on 2 rows of random inputs" in done.stdout
    done = run(main, "compare", decoder_file, output, "--calibration", token_file, "--samples", 5)
    assert done.exit_code == 0, done.stderr
    assert "compared with the float model on 5 rows\n" in done.stdout


def test_compare_layer_by_layer(decoder_file, token_file):
    output = decoder_file.with_name("decoder-w4a16.onnx")
    assert run(qcompile, decoder_file, "-q").exit_code == 0
    done = run(main, "compare", decoder_file, output, "--layers", "--worst", 2, "--calibration", token_file)
    assert done.exit_code == 0, done.stderr
    first, second = done.stdout.split("adds the most noise")
    assert re.search(r"^\d+ of \d+ float tensors compared on 8 rows$", first, re.M)
    names = ["l0_q", "l0_k", "l0_v", "l0_o", "l0_gate", "l0_up", "l0_down", "head"]
    assert re.findall(r"^(embed|l0_\w+|head) ", first, re.M) == names
    assert "Softmax" not in first
    worst = re.findall(r"^(\S+) +(?:MatMul|Gather) .* (\S+) %", second, re.M)
    assert len(worst) == 2
    assert float(worst[0][1]) >= float(worst[1][1]) > 0
    done = run(main, "compare", decoder_file, output, "--layers", "-v")
    assert "2 rows of random inputs" in done.stdout
    assert re.search(r" Softmax +[0-9.]+ +[0-9.]+ ", done.stdout)


def test_compare_of_equal_models_names_no_layer(decoder_file):
    done = run(main, "compare", decoder_file, decoder_file, "--layers")
    assert done.exit_code == 0, done.stderr
    assert "no quantized layer adds noise" in done.stdout


def test_compare_of_different_models_is_an_error(linear_file, decoder_file):
    done = run(main, "compare", decoder_file, linear_file)
    assert done.exit_code == 1
    assert "model.onnx has the input 'x', which" in done.stderr
    assert run(main, "compare", decoder_file, linear_file, "--layers").stderr == done.stderr


def test_bench_times_models_in_one_table(decoder_file, token_file):
    assert run(qcompile, decoder_file, "-q").exit_code == 0
    models = (decoder_file, decoder_file.with_name("decoder-w4a16.onnx"))
    for options in (["--rows", 2, "--length", 5], ["--calibration", token_file]):
        done = run(main, "bench", *models, "--repeat", 2, *options)
        assert done.exit_code == 0, done.stderr
        first, second = (re.search(rf"{path.name} +│ [0-9.]+ +│ ([0-9.]+) \(", done.stdout) for path in models)
        assert first[1] == "1.00"
        assert float(second[1]) > 0


def test_schemes_lists_every_width_and_alias():
    done = run(main, "schemes")
    assert done.exit_code == 0
    # 4 bits, and in a group of 64 a scale of 32 bits and a zero point of 4.
    assert re.search(r"^w4a16-g64 +│ 4.500 +│ 4.250 +│ 4.562 +│ 4.312", done.stdout, re.M)
    # What lies in the file counts.
    assert re.search(r"^w3a16-g64 +│ 4.500 +│ 4.250 +│ 4.562 +│ 4.312", done.stdout, re.M)
    assert "3-bit codes are stored in 4 bits" in done.stdout
    assert re.search(r"^int8 +│ w8a16", done.stdout, re.M)


def test_passes_lists_every_pass_with_its_options():
    done = run(main, "passes")
    assert done.exit_code == 0
    for name in passes.names():
        assert re.search(rf"^{name} ", done.stdout, re.M)
    assert "clip=False: search the fraction" in done.stdout


# --- progress and logs ------------------------------------------------------------------------------------------------


def advance(monkeypatch, label="gptq", **options):
    """Report ten steps of a second each, and return what that printed on a terminal or none."""
    clock = iter(range(100))
    monkeypatch.setattr(cli_output.time, "monotonic", lambda: float(next(clock)))
    with cli_output.Progress(**options) as progress:
        for done in range(11):
            progress(label.format(done), done, 10)


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    advance(monkeypatch)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    advance(monkeypatch, hidden=True)
    assert capsys.readouterr() == ("", "")
    advance(monkeypatch)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "gptq" in shown.err


def test_progress_says_how_it_goes_in_one_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    advance(monkeypatch, "tune, loss 0.{}")
    assert "tune, loss 0." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verbose", "quiet", "expected"),
    [(0, False, ["Warning"]), (1, False, ["Info", "Warning"]), (2, False, ["Debug", "Info", "Warning"]), (2, True, [])],
)
def test_verbosity_chooses_what_is_logged(capsys, verbose, quiet, expected):
    cli_output.set_up_logging(verbose, quiet)
    logger = logging.getLogger("qcompiler.anything")
    logger.debug("site %s", "a")
    logger.info("pass %s", "b")
    logger.warning("model %s", "c" * 200)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.findall(r"(?:^| )([A-Z][a-z]+): (?:site a|pass b|model c{200})$", err, re.M) == expected
    assert all(re.match(r" *\d+\.\d\d s  [A-Z]", line) for line in err.splitlines()) == (verbose > 1 or quiet)
