"""What bandwidth and tensor cores allow our kernels for CUDA: predicted, nothing is run.

    python -m benchmarks.roofline [--size N K] [--rows M ...]

For each format a product of M rows of float16 activations and a weight [N, K] in groups of 64: bytes that have to be
read and written, operations, and the time that either takes at the published peak of a GPU, whichever is longer. A
kernel can be slower and not faster.
"""

import argparse
from dataclasses import dataclass

from benchmarks.rows import markdown

GROUP = 64
HALF = 2  # bytes
ROWS = (1, 16, 128, 2048)


@dataclass(frozen=True)
class Gpu:
    """Peaks out of data sheets: GB/s of memory, and 10^12 operations/s of float16 on tensor cores, dense."""

    name: str
    bandwidth: float
    operations: float


GPUS = (Gpu("A100 80 GB", 2039, 312), Gpu("H100 SXM", 3350, 989), Gpu("L4", 300, 121))


@dataclass(frozen=True)
class Format:
    """Bits of a weight: of its codes, and of what each group has beside them; and bytes of tables."""

    name: str
    code_bits: float
    group_bits: int
    table_bytes: int = 0


FORMATS = (
    Format("float16", 16, 0),
    Format("MatMul4Bits", 4, 24),  # a scale of 16 bits and a zero point of 8
    Format("MatMul3Bits", 3, 24),
    Format("MatMul2Bits", 2, 24),
    Format("MatMul1Bit", 1, 16),
    Format("MatMulCodebook16", 4, 16, 16 * HALF),
    Format("MatMulCodebook8", 3, 16, 8 * HALF),
    Format("MatMulCodebook256, 4 columns", 2, 16, 256 * 4 * HALF),
    Format("MatMulSigns", 1, 16),
)


def moved_bytes(form: Format, M: int, N: int, K: int) -> float:
    """Bytes that a product reads and writes if it touches each operand once."""
    weight = N * K * form.code_bits / 8 + N * (K / GROUP) * form.group_bits / 8 + form.table_bytes
    return weight + HALF * (M * K + M * N + N)


def predicted(form: Format, gpu: Gpu, M: int, N: int, K: int) -> float:
    """Microseconds."""
    return max(moved_bytes(form, M, N, K) / (gpu.bandwidth * 1e3), 2 * M * N * K / (gpu.operations * 1e6))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M")
    args = parser.parse_args()
    N, K = args.size
    rows = [
        [form.name, str(M), f"{moved_bytes(form, M, N, K) / 1e6:.2f}", f"{2 * M * N * K / 1e9:.2f}",
         *(f"{predicted(form, gpu, M, N, K):.1f}" for gpu in GPUS)]
        for M in args.rows for form in FORMATS
    ]  # fmt: skip
    print(f"Predicted, not measured: least microseconds of a product with a weight [{N}, {K}].\n")
    titles = ["weight", "rows", "MB", "10^9 operations", *(gpu.name for gpu in GPUS)]
    print(markdown(titles, rows, 1))


if __name__ == "__main__":
    main()
