"""What kernels for CUDA take of a processor, as the compiler reports it: no GPU is needed.

    python -m benchmarks.cuda_resources [--only TEXT] > benchmarks/cuda_resources.md

A line for each kernel, a column for each processor: registers of a thread / kB of shared memory of a program. Fails if
any kernel keeps registers in memory.
"""

import argparse
import sys

from benchmarks.rows import markdown
from qcompiler.kernels.triton.compiler import TARGETS, Image, compile_all, variants


def table(images: list[Image]) -> str:
    """The images as Markdown, a line for each variant."""
    cells: dict[str, list[str]] = {}
    for image in images:
        shared = f"{image.shared / 1024:.0f}"
        spilled = f", {image.stack} bytes spilled" if image.stack else ""
        cells.setdefault(image.variant.name, []).append(f"{image.registers} / {shared}{spilled}")
    return markdown(
        ["kernel", *(f"sm_{target}" for target in TARGETS)], [[name, *row] for name, row in cells.items()], 1
    )


def main() -> None:
    """Compile, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name holds TEXT")
    args = parser.parse_args()
    images = compile_all([each for each in variants() if args.only in each.name], TARGETS)
    print(
        "Registers of a thread / kB of shared memory of a program, as ptxas allots them. Made by "
        "`python -m benchmarks.cuda_resources`.\n"
    )
    print(table(images))
    spilled = [f"{image.variant.name}, sm_{image.target}: {image.stack} bytes" for image in images if image.stack]
    if spilled:
        sys.exit("registers are kept in memory: " + "; ".join(spilled))


if __name__ == "__main__":
    main()
