"""Build the library of operators from a checkout of the sources.

    python -m qcompiler.kernels.build [--cuda] [--headers DIR] [--output FILE]

It takes a C++17 compiler and CMake. Headers of ONNX Runtime are those that are installed, those that --headers names,
or are fetched. With --cuda Triton compiles kernels for GPUs too, which takes minutes and no GPU. The library lies
beside this file then, where `register` and wheels find it.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qcompiler.errors import KernelError
from qcompiler.kernels.headers import find_headers
from qcompiler.kernels.library import FILE_NAME, PLACE, cuda_targets, instruction_set

__all__ = ["build", "find_cmake", "main"]

SOURCES = Path(__file__).parent.parent
_LINES = 30  # of what a compiler says, from the first error on


def build(output: Path = PLACE, headers: Path | None = None, images: Path | None = None) -> Path:
    """Build the library.

    Args:
        output: The file to make; its folder is created, and the file replaced in one step.
        headers: A folder with the headers of ONNX Runtime; None finds or fetches them.
        images: A folder with kernels for CUDA, from `qcompiler.kernels.triton.compiler`; None builds without.

    Returns:
        The file.

    Raises:
        KernelError: Something that it takes is missing, or the compiler refuses.
    """
    if not (SOURCES / "CMakeLists.txt").is_file():
        raise KernelError("the sources of the operators are not part of the installed package; build in a checkout")
    cmake = find_cmake()
    include = find_headers(headers, PLACE.parent / "headers")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        settings = [f"-DQC_ORT_INCLUDE={include}"]
        if images is not None:
            settings.append(f"-DQC_CUDA_IMAGES={images.resolve()}")
        _run([cmake, "-S", str(SOURCES), "-B", work, *settings])
        _run([cmake, "--build", work, "--parallel"])
        draft = output.with_name(f".{output.name}.new")
        shutil.copy(Path(work) / FILE_NAME, draft)
        draft.replace(output)
    return output


def find_cmake() -> str:
    """The program, on the path or installed beside this Python; raises KernelError."""
    found = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if found is None:
        raise KernelError("CMake is needed, and not installed; pip install cmake")
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        first = next((at for at, line in enumerate(lines) if "error" in line.lower()), max(0, len(lines) - _LINES))
        told = "\n".join(lines[first : first + _LINES])
        raise KernelError(f"building the operators: {' '.join(command)} ended with {done.returncode}:\n{told}")


def _compile_for_cuda(folder: Path) -> Path:
    from qcompiler.kernels.triton.compiler import compile_all, variants, write_images

    write_images(compile_all(list(variants())), folder)
    return folder


def main() -> None:
    """Read the command line, build, and say what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headers", type=Path, metavar="DIR", help="folder that holds onnxruntime_cxx_api.h")
    parser.add_argument("--cuda", action="store_true", help="kernels for CUDA too; takes the extra `triton`")
    parser.add_argument("--output", type=Path, default=PLACE, metavar="FILE", help="default: %(default)s")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as work:
            images = _compile_for_cuda(Path(work)) if args.cuda else None
            made = build(args.output, args.headers, images)
    except KernelError as error:
        sys.exit(f"error: {error}")
    print(f"{made}: {made.stat().st_size / 1e6:.1f} MB, {instruction_set(made)} kernels on this processor")
    print(f"kernels for CUDA: {cuda_targets(made) or 'none'}")


if __name__ == "__main__":
    main()
