"""The real command on real models: one test for each file in cases/, which says what to run and what to expect."""

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.session import saturates
from tests.e2e import models
from tests.e2e.case import Case, Expected, misses, pick, read_case

FILES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
CASES = {file.stem: read_case(file) for file in FILES}

logger = logging.getLogger(__name__)


def run_command(case: Case, output: Path, more: str = "") -> subprocess.CompletedProcess[str]:
    """Type the case's command; where pairs of 8-bit products saturate, with the option that is for such processors."""
    command = Path(sys.executable).with_name("qcompile")
    source = models.MODELS[case.model]()
    data = ["--calibration", models.DATA[case.data]()] if case.data else []
    narrower = ["--reduce-range"] if "w8a8" in case.arguments and saturates() else []
    arguments = [source, *shlex.split(case.arguments), *narrower, *data, *shlex.split(more), "-o", output]
    return subprocess.run([command, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def destination(case: Case, folder: Path) -> tuple[Path, Path]:
    """What to give to -o, and the model file that it leads to; nothing else will be in that file's folder."""
    whole = models.MODELS[case.model]().is_dir()
    shutil.rmtree(folder)
    if not whole:
        folder.mkdir()
    return folder if whole else folder / "model.onnx", folder / "model.onnx"


def written(folder: Path) -> dict[str, bytes]:
    """All files but the report, which holds times."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.endswith(".report.json")}


def check_words(expect: Expected, done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the command said and how it ended."""
    ended = misses("the exit code", done.returncode, expect.exit)
    unsaid = [f"stderr lacks {text!r}" for text in expect.says if not re.search(text, done.stderr)]
    unprinted = [f"stdout lacks {text!r}" for text in expect.prints if not re.search(text, done.stdout)]
    return ended + unsaid + unprinted


def check_report(expect: Expected, model: Path) -> list[str]:
    """What the report lists."""
    report = json.loads(model.with_name("model.report.json").read_text("utf-8"))
    found = []
    if expect.quantized is not None:
        found += misses("quantized", report["quantized"], expect.quantized)
    if expect.skipped is not None and report["skipped"] != expect.skipped:
        found.append(f"skipped is {report['skipped']}")
    for path, wanted in expect.report.items():
        found += misses(path, pick(report, path), wanted)
    return found


def check_files(case: Case, model: Path) -> list[str]:
    """Sizes, and whether anything changed at all."""
    files, found = written(model.parent), []
    if case.expect.megabytes is not None:
        found += misses("megabytes", sum(map(len, files.values())) / 1e6, case.expect.megabytes)
    if case.expect.unchanged and model.read_bytes() != models.MODELS[case.model]().read_bytes():
        found.append("the output differs from the input")
    return found


def check_figures(case: Case, model: Path) -> list[str]:
    """How good the model still is."""
    source, found = models.MODELS[case.model](), []
    for name, bounds in case.expect.figures.items():
        value = models.figure(name, model, case.windows)
        logger.info("%s = %.6g", name, value)
        found += misses(name, value, bounds, lambda name=name: models.figure(name, source, case.windows))
    return found


def repeat(case: Case, folder: Path) -> list[str]:
    """Run the command again with each of the further arguments; which files differ."""
    first, found = written(folder), []
    for more in case.again:
        output, model = destination(case, folder)
        done = run_command(case, output, more)
        found += misses(f"the exit code with '{more}'", done.returncode, case.expect.exit)
        files = written(model.parent)
        found += [f"{name} differs with '{more}'" for name in first | files if first.get(name) != files.get(name)]
    return found


@pytest.mark.real
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if case.slow else name for name, case in CASES.items()]
)
def test_case(name, tmp_path):
    case = CASES[name]
    output, model = destination(case, tmp_path)
    done = run_command(case, output)
    found = check_words(case.expect, done)
    if model.exists():
        found += check_report(case.expect, model) + check_files(case, model) + check_figures(case, model)
        found += repeat(case, tmp_path) if case.again else []
    elif case.expect.exit in (0, 3):
        found.append("no model was written")
    shutil.rmtree(tmp_path, ignore_errors=True)
    assert not found, "\n".join([case.about, *found, done.stdout, done.stderr])
