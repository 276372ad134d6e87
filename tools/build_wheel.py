#!/usr/bin/env python3
"""Build the wheel from a fresh copy of the tree, so that files left in `build/` by an earlier build cannot slip in.

    build_wheel.py OUTPUT_FOLDER

Uses the setuptools of the running Python (the extra `dev` has it) and needs no network. It carries the library of
operators if `python -m qcompiler.kernels.build` has made it, and is named for this kind of machine then.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "qcompiler", "passes", "kernels")


def copy_tree(folder: Path) -> None:
    """Copy what the package is built from into an existing folder."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, folder / name)


def build_wheel(output: Path) -> Path:
    """Build into `output` and return the wheel's path."""
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output)]
        if list((ROOT / "kernels/python/lib").glob("*.so")):  # what is compiled runs on one kind of machine
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            options.append(f"--config-settings=--build-option=--plat-name={platform}")
        subprocess.run([sys.executable, "-m", "pip", "wheel", *options, folder], check=True, stdin=subprocess.DEVNULL)
    return max(output.glob("onnx_qcompiler-*.whl"), key=lambda path: path.stat().st_mtime)


if __name__ == "__main__":
    print(build_wheel(Path(sys.argv[1])))
