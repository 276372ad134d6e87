"""The kernels without ONNX Runtime, built with sanitizers: no byte is read that is not theirs, no thread in the way."""

import os
import shutil
import subprocess

import pytest

from qcompiler.kernels.build import SOURCES, find_cmake

LEVELS = ("amx", "avx512", "avx2", "generic")


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """Programs that run every kernel, by sanitizer."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    made = {}
    for sanitizer in ("address", "thread"):
        folder = tmp_path_factory.mktemp(sanitizer)
        for command in (
            [find_cmake(), "-S", SOURCES, "-B", folder, f"-DQC_SANITIZE={sanitizer}"],
            [find_cmake(), "--build", folder, "--target", "qcompiler_check", "--parallel"],
        ):
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        made[sanitizer] = folder / "qcompiler_check"
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
