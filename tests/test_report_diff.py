"""What is told of two reports: differences alone, with the figures of both; nothing of a name is markup."""

import copy
import io
import json

import onnx
import pytest
from click.testing import CliRunner
from rich.console import Console

from qcompiler import compile_model
from qcompiler.cli import main
from qcompiler.errors import OutputError
from qcompiler.report_diff import print_diff, report_of
from tests.builders import decoder, serialized, token_batches


def told(first, second, **options):
    console = Console(file=io.StringIO(), width=160)
    print_diff(first, second, console, **options)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two models, by GPTQ and by RTN with one layer in 8 bits."""
    folder = tmp_path_factory.mktemp("diff")
    onnx.save(serialized(decoder()), folder / "in.onnx")
    data = token_batches(4, 2, 16, vocabulary=512)
    compile_model(folder / "in.onnx", "w4a16-g16-asym", calibration=data, output=folder / "a.onnx")
    from qcompiler.config import CompileConfig
    from qcompiler.scheme import Scheme
    from qcompiler.scheme_plan import Pattern, SchemePlan

    plan = SchemePlan(
        Scheme.parse("w4a16-g16-asym"),
        overrides=((Pattern("l1_o"), Scheme.parse("w8a16-g16")),),
        ignore=(Pattern("l0_q"),),
    )
    config = CompileConfig(plan=plan, algorithms=("rtn",))
    compile_model(folder / "in.onnx", calibration=data, output=folder / "b.onnx", config=config)
    return folder


def test_nothing_is_told_of_what_is_the_same(made):
    report = report_of(made / "a.onnx")
    text = told(report, report)
    assert "the recipes are the same" in text
    assert f"none of {len(report['sites'])} sites differs" in text


def test_differences_are_told_with_the_figures_of_both(made):
    first, second = report_of(made / "a.onnx"), report_of(made / "b.report.json")
    text = told(first, second, every_site=True)
    lines = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert "rtn" in lines["algorithms"]
    assert "gptq{drift=0.5}" in lines["algorithms"]
    assert lines["l1_o"].split()[1:3] == ["w8a16-g16-asym", "w4a16-g16-asym"]
    assert lines["l0_q"].split()[1:3] == ["float", "w4a16-g16-asym"]
    kl = [report["verification"]["kl"] for report in (first, second)]
    assert all(f"{each:.6g}" in lines["KL,"] for each in kl)
    assert f"{100 * (kl[1] / kl[0] - 1):+.1f} %" in lines["KL,"]
    assert "scheme" not in {line.split()[0] for line in text.split("figure")[0].splitlines()[2:] if line.split()}


def test_the_largest_differences_come_first(made):
    first = report_of(made / "a.onnx")
    second = copy.deepcopy(first)
    sites = [site for site in second["sites"] if site["relative_loss"] is not None]
    many = [dict(site, site=f"{site['site']}_{at}") for at in range(4) for site in sites]
    first["sites"], second["sites"] = copy.deepcopy(many), many
    for at, site in enumerate(second["sites"]):
        site["relative_loss"] *= 2 + at
    text = told(first, second)
    assert f"{len(many)} of {len(many)} sites differ; {len(many) - 15} more with -v" in text
    assert many[-1]["site"] in text
    assert f"{many[0]['site']} " not in text
    assert "more with" not in told(first, second, every_site=True)


def test_other_sites_and_odd_names_are_told(made):
    first = report_of(made / "a.onnx")
    second = copy.deepcopy(first)
    second["sites"][3]["site"] = "[bold]odd[/]\x1b[2J"
    text = told(first, second)
    assert "1 site is in the first alone" in text
    assert "[bold]odd[/]" in text
    assert "\x1b[2J" not in text


def test_the_command(made, tmp_path):
    done = CliRunner().invoke(main, ["diff", str(made / "a.onnx"), str(made / "b.onnx")])
    assert done.exit_code == 0
    assert "KL, nats" in done.stdout
    done = CliRunner().invoke(main, ["diff", str(made / "a.onnx"), str(made / "in.onnx")])
    assert done.exit_code == 1
    assert "no report there (in.report.json)" in done.stderr
    (tmp_path / "x.json").write_text(json.dumps({"schema": 2}))
    with pytest.raises(OutputError):
        report_of(tmp_path / "x.json")
