"""Recipes: what `--print-recipe` says, and that `--recipe` means the same."""

import json

import pytest
from click.testing import CliRunner

from qcompiler import driver
from qcompiler.cli import qcompile
from qcompiler.errors import ModelError

EVERY = [
    "--scheme", "w2a16", "--algorithm", "gptq{drift=0.5,refine=1},learned_rounding", "--calibration", "c.npy",
    "--tokenizer", "t.json", "--samples", "3", "--sequence-length", "99", "--force", "--set", "a=float", "--set",
    "re:b.*=w8a16", "--ignore", "b", "--only", "re:c", "--embedding", "float", "--lm-head", "w4a16", "--target", "cuda",
    "--accuracy-level", "1", "--opset", "22", "--no-sequential", "--provider", "X", "--provider", "Y", "--threads", "2",
    "--seed", "5", "--max-memory", "1.5GiB", "--min-sqnr", "9", "--max-kl", "0.5", "--require-quantized", "--dump-dir",
    "d", "--calibrator", "mse", "--reduce-range", "--bench", "--exclude-worst", "2", "--kv-cache", "kv4", "--float16",
    "--bits-per-weight", "3.5", "-o", "o.onnx",
]  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(qcompile, ["m.onnx", *map(str, arguments)])


def printed(*arguments):
    done = run(*arguments, "--print-recipe")
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def compiled(monkeypatch):
    """What the compiler is called with."""
    calls = []

    def capture(model, **how):
        calls.append(how)
        raise ModelError("enough")

    monkeypatch.setattr(driver, "compile_model", capture)
    return calls


@pytest.mark.parametrize(
    "flags",
    [[], ["--scheme", "w8a16-g32-sym", "--no-verify"], ["--effort", "fast"], EVERY, ["--max-size", "90MB"]],
    ids=["nothing", "some", "effort", "every option", "a size"],
)
def test_a_printed_recipe_says_the_same_as_the_flags(flags, compiled, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(printed(*flags), "utf-8")
    explicit = flags if "--effort" not in flags else ["--algorithm", "rtn"]
    run(*explicit) if "--algorithm" in explicit else run(*explicit, "--algorithm", "rtn")
    run("--recipe", recipe)
    wanted, found = ({name: value for name, value in call.items() if name != "progress"} for call in compiled)
    assert found == wanted
    assert printed("--recipe", recipe) == recipe.read_text("utf-8")


def test_a_recipe_names_the_algorithms_that_an_effort_stands_for():
    assert printed() == "scheme: w4a16\nalgorithm: rtn\n"
    best = printed("--effort", "best", "--calibration", "c.npy")
    assert "effort" not in best
    assert "gptq{drift=0.8,guided=true,percdamp=0.2,refine=1}" in best


def test_the_command_line_comes_before_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: w8a16\nsamples: 5\nignore: [a, b]\n", "utf-8")
    assert printed("--recipe", recipe, "--samples", 7, "--ignore", "c") == (
        "scheme: w8a16\nalgorithm: rtn\nsamples: 7\nignore:\n- c\n"
    )


def test_a_model_is_compiled_by_a_recipe(linear_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"scheme: w8a16-g32-sym\nalgorithm: rtn{{clip=true}}\noutput: {tmp_path / 'out.onnx'}\n", "utf-8")
    done = CliRunner().invoke(qcompile, [str(linear_file), "--recipe", str(recipe)])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.report.json").read_text("utf-8"))
    assert report["recipe"]["scheme"] == "w8a16-g32-sym"
    assert report["recipe"]["algorithms"] == ["rtn{clip=true}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense: 3", "'nonsense' is no option of a recipe; known are accuracy-level, algorithm,"),
        ("verbose: 3", "'verbose' is no option"),
        ("samples: many", "samples: Invalid value"),
        ("samples: true", "samples takes text or a number, not True"),
        ("samples: -4.5", "samples: Invalid value"),
        ("verify: 7", "verify takes true or false, not 7"),
        ("scheme: [w4a16]", "scheme takes one value, not ['w4a16']"),
        ("set: a=float", "set takes a list, an item a line, not 'a=float'"),
        ("target:", "target takes text or a number, not None"),
        ("scheme", "a recipe holds lines of 'option: value'"),
        ("", "a recipe holds lines of 'option: value'"),
        ("{", "this is no YAML"),
        ("effort: best\nalgorithm: rtn", "--effort stands for algorithms"),
    ],
)
def test_a_bad_recipe_is_a_usage_error_that_names_it(text, message, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, "utf-8")
    done = run("--recipe", recipe)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "recipe.yaml" in done.stderr or "--effort" in message


def test_a_recipe_that_is_not_there(tmp_path):
    done = run("--recipe", tmp_path / "none.yaml")
    assert done.exit_code == 2
    assert "none.yaml: the recipe cannot be read" in done.stderr
