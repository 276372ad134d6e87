"""The command, stopped by signals and started again, writes what it writes undisturbed.

It compiles the language model of examples/. It is stopped right after it has stored its N-th checkpoint, with every
boundary and every state of the descent stored, so that places are the same on every machine.
"""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "austen"
# The command, which sends itself a signal when it has stored so many checkpoints.
STOPPED = """
import os, sys
from qcompiler import checkpoints, waypoints
from qcompiler.cli import qcompile
from qcompiler.passes import learned_rounding

waypoints._PATIENCE = learned_rounding._SECONDS = 0.0
checkpoints._SHARE = 0
left, signal = int(sys.argv.pop(1)), int(sys.argv.pop(1))
put = checkpoints.Checkpoints.put

def counting(*arguments):
    global left
    put(*arguments)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal)

checkpoints.Checkpoints.put = counting
qcompile()
"""
GPTQ = ("--scheme", "w4a16-g32", "--samples", 4, "--sequence-length", 64)
LEARNED = (
    "--samples", 8, "--sequence-length", 32, "--algorithm",
    "gptq{drift=0.5},learned_rounding{steps=3,narrow=2,distill=4,both=true}", "--scheme", "w4a16-g32",
)  # fmt: skip
# How many checkpoints they store: of 17 groups of sites and the 16 boundaries between these; then of 3 blocks and the 3
# boundaries in front of them; then 4 boundaries, 4 states of the descent, and its result.
GPTQ_STORES, LEARNED_STORES = 33, 48
MESSAGE = "Error: interrupted; nothing was written but checkpoints in {}, from which the same command goes on\n"
COMMAND = ("-m", "qcompiler", "compile")


def start(folder, output, *flags, program=COMMAND, checkpoint=True):
    """Start the command; its temporary files go to a folder of their own."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, *program, EXAMPLE / "model.onnx", "--calibration", EXAMPLE / "calibration.txt",
        "--tokenizer", EXAMPLE / "tokenizer.json", "-o", folder / output, "--threads", 1, "--no-verify", *flags,
        *(("--checkpoint", folder / "checkpoints") if checkpoint else ()),
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


def finished(process):
    """Exit code and what was written to stderr."""
    _, errors = process.communicate()
    return process.returncode, errors


def report_of(path):
    return json.loads(path.with_name(f"{path.stem}.report.json").read_text("utf-8"))


def places(count, last):
    """Numbers of checkpoints to stop behind, spread at random."""
    return sorted(np.random.default_rng(0).choice(np.arange(1, last), count, replace=False).tolist())


def stop_and_go(folder, flags, stops):
    """Stop behind some checkpoints, by turns with either signal, then let the command end; checks what is left.

    Returns:
        The report of the last start.
    """
    assert finished(start(folder, "whole.onnx", *flags, checkpoint=False)) == (0, "")
    for turn, (before, stop) in enumerate(pairwise([0, *stops])):
        sign = (signal.SIGKILL, signal.SIGTERM)[turn % 2]
        program = ("-c", STOPPED, stop - before, int(sign))
        expected = (-9, "") if sign == signal.SIGKILL else (143, MESSAGE.format(folder / "checkpoints"))
        assert finished(start(folder, "parts.onnx", *flags, program=program)) == expected
        assert not (folder / "parts.onnx").exists()
        if sign == signal.SIGTERM:
            assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert finished(start(folder, "parts.onnx", *flags, program=("-c", STOPPED, 0, 0))) == (0, "")
    assert (folder / "parts.onnx").read_bytes() == (folder / "whole.onnx").read_bytes()
    whole, parts = report_of(folder / "whole.onnx"), report_of(folder / "parts.onnx")
    assert parts["sites"] == whole["sites"]
    assert parts["recipe"] == whole["recipe"]
    assert whole["checkpoints"] == {}
    return parts


@pytest.mark.parametrize("stops", [[3, 18], pytest.param(places(10, GPTQ_STORES), marks=pytest.mark.slow)], ids=str)
def test_gptq_that_was_stopped_writes_the_same_bytes(tmp_path, stops):
    """Stopped behind the codes of a group, and behind a boundary."""
    report = stop_and_go(tmp_path, GPTQ, stops)
    tally = report["checkpoints"]["gptq"]
    assert 0 < tally["recalled"] <= tally["sites"]
    # One file a group of sites is left: no boundary, nothing half written.
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert all(name.endswith(".checkpoint") for name in left)
    assert len(left) == GPTQ_STORES // 2 + 1


@pytest.mark.torch
@pytest.mark.parametrize(
    "stops", [[30, 37, 45], pytest.param(places(10, LEARNED_STORES), marks=pytest.mark.slow)], ids=str
)
def test_learned_rounding_that_was_stopped_writes_the_same_bytes(tmp_path, stops):
    """In the levels of GPTQ with two streams, between blocks, and in the descent through the whole model."""
    report = stop_and_go(tmp_path, LEARNED, stops)
    assert set(report["checkpoints"]) == {"gptq", "learned_rounding", "distillation"}
    for name in ("gptq", "learned_rounding"):
        assert report["checkpoints"][name]["recalled"] == report["checkpoints"][name]["sites"]
    assert report["checkpoints"]["distillation"]["recalled"] == 0
    # With the options of the command itself, which finds everything.
    assert finished(start(tmp_path, "again.onnx", *LEARNED)) == (0, "")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    again = report_of(tmp_path / "again.onnx")["checkpoints"]
    assert all(tally["recalled"] == tally["sites"] for tally in again.values())


def test_the_command_itself_can_be_terminated_at_any_time(tmp_path):
    """Not by its own hand: from outside, once the first checkpoints are there."""
    process = start(tmp_path, "out.onnx", *GPTQ)
    while process.poll() is None and len(list(tmp_path.glob("checkpoints/*.checkpoint"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert finished(process) == (143, MESSAGE.format(tmp_path / "checkpoints"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "tmp"}
    assert not list((tmp_path / "tmp").glob("qcompiler-*"))
