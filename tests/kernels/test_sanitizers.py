"""The kernels without ONNX Runtime, built with sanitizers: no byte is read that is not theirs, no thread in the way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.kernels.build import SOURCES, find_cmake
from qcompiler.kernels.headers import find_headers
from qcompiler.kernels.library import FILE_NAME, PLACE

ROOT = Path(__file__).parent.parent.parent

LEVELS = ("amx", "avx512", "avx2", "generic")


def built(folder, target, *settings):
    """The folder, with a target built in it."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    for command in (
        [find_cmake(), "-S", SOURCES, "-B", folder, *settings],
        [find_cmake(), "--build", folder, "--target", target, "--parallel"],
    ):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """Programs that run every kernel, by sanitizer."""
    made = {}
    for sanitizer in ("address", "thread"):
        folder = tmp_path_factory.mktemp(sanitizer)
        made[sanitizer] = built(folder, "qcompiler_check", f"-DQC_SANITIZE={sanitizer}") / "qcompiler_check"
    return made


# What threads share is the same for all kernels: two of the levels are enough there.
@pytest.mark.parametrize(
    ("sanitizer", "level"), [*(("address", level) for level in LEVELS), ("thread", "amx"), ("thread", "avx2")]
)
def test_kernels_are_clean(checks, sanitizer, level):
    done = subprocess.run(
        [checks[sanitizer]], capture_output=True, text=True, check=False, env=os.environ | {"QCOMPILER_CPU": level}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "0 of" in done.stdout
    assert "Sanitizer" not in done.stderr


def test_bad_models_end_in_errors(tmp_path):
    """Each of 10,000: wrong shapes, packings, attributes, types and contents, as constants and as inputs."""
    settings = ("-DQC_SANITIZE=address", f"-DQC_ORT_INCLUDE={find_headers(None, PLACE.parent / 'headers')}")
    library = built(tmp_path, "qcompiler_ops", *settings) / FILE_NAME
    # Python and ONNX Runtime know nothing of the sanitizer, which has to be there before them, as do exceptions for it
    # to see them; and they keep memory at the end.
    files = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(files), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.fuzz_operators", str(library), "10000"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ends = json.loads(done.stdout)
    assert sum(ends.values()) == 10_000
    assert min(ends.values()) > 1000, ends  # of each kind
