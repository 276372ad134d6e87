"""Compile the device code for every format and processor, without a GPU: cubins, and PTX for processors to come.

An image is one kernel of `matmul` for one format of weights, one type of activations and one shape of blocks. The
library holds all of them, and takes the smallest shape that holds all rows of activations, or the largest there is.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qcompiler.errors import KernelError

__all__ = ["PTX", "TARGETS", "Image", "Variant", "compile_all", "compile_image", "variants", "write_images"]

# Compute capabilities, times ten, with code of their own: A100, A10 and RTX 30, L4 and RTX 40, H100, B200, RTX 50.
TARGETS = (80, 86, 89, 90, 100, 120)
# Stands for a target: text that a driver compiles for processors that are not among them.
PTX = 0
_PTX_TARGET = 80
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Variant:
    """One kernel for one format.

    Attributes:
        kind: Of the operator: uniform, codebook or signs.
        bits: Width of a code.
        entry: Columns that a code stands for.
        floats: Type of activations, float32 or float16.
        block_m: Rows of activations of a program; 1 is `matmul_row`.
        block_n: Rows of the weight of a program.
        block_k: Columns that a program decodes at a time.
        warps: Of a program.
        stages: Of its loop over columns.
    """

    kind: str
    bits: int
    entry: int
    floats: str
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """For people."""
        entry = f" of {self.entry}" if self.kind == "codebook" else ""
        return f"{self.kind} {self.bits} bits{entry}, {self.floats}, {self.block_m} rows"


@dataclass(frozen=True)
class Image:
    """What a variant becomes for a target.

    Attributes:
        variant: What it was made of.
        target: An element of TARGETS, or PTX.
        code: The cubin, or the text with a zero at its end.
        symbol: The kernel's name in it.
        shared: Bytes of shared memory that a launch has to ask for.
        registers: Of a thread; 0 for PTX.
        stack: Bytes of a thread's own memory: registers that were spilled, and anything else; 0 for PTX.
    """

    variant: Variant
    target: int
    code: bytes
    symbol: str
    shared: int
    registers: int
    stack: int


def variants() -> Iterator[Variant]:
    """All of them: each operator with each width of entries, type of activations, and shape of blocks."""
    formats = [("uniform", bits, 1) for bits in (1, 2, 3, 4)]
    formats += [("codebook", bits, entry) for bits in (3, 4, 8) for entry in (1, 2, 4)]
    formats += [("signs", 1, 1)]
    for kind, bits, entry in formats:
        for floats in ("float32", "float16"):
            yield Variant(kind, bits, entry, floats, 1, 4, 512, 4, 2)
            tiles = ((16, 64, 4), (64, 32, 8 if bits == 8 else 4)) if floats == "float16" else ((32, 32, 8),)
            for block_m, block_k, warps in tiles:
                yield Variant(kind, bits, entry, floats, block_m, 64, block_k, warps, 3)


def compile_image(variant: Variant, target: int) -> Image:
    """Compile a variant for a target.

    Raises:
        KernelError: Triton is not installed, or the kernel would need memory that no launch here provides.
    """
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # four fifths of a cubin
    try:
        import triton
        from triton.backends.compiler import GPUTarget
    except ImportError as error:
        raise KernelError(f"kernels for CUDA need Triton: pip install triton ({error})") from error
    from qcompiler.kernels.triton import matmul

    kernel = matmul.matmul_row if variant.block_m == 1 else matmul.matmul_tile
    constants: dict[str, object] = {
        "KIND": variant.kind,
        "BITS": variant.bits,
        "ENTRY": variant.entry,
        "BLOCK_N": variant.block_n,
        "BLOCK_O": variant.block_k // (8 * variant.entry),
    }
    aligned: tuple[str, ...] = ("b",)
    if variant.block_m > 1:
        constants["BLOCK_M"] = variant.block_m
        aligned = ("a", "b", "y", "K")
    floats = "*fp16" if variant.floats == "float16" else "*fp32"
    types = {name: floats if kind == "*T" else kind for name, kind in matmul.ARGUMENTS.items()}
    source = triton.compiler.ASTSource(
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constants,
        {(place,): _ALIGNED for place, name in enumerate(types) if name in aligned},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", target or _PTX_TARGET, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True},
    )
    if made.metadata.global_scratch_size or made.metadata.profile_scratch_size:
        raise KernelError(f"{variant.name}: the kernel asks for memory between programs, which no launch provides")
    named = variant, target
    if target == PTX:
        return Image(*named, made.asm["ptx"].encode() + b"\0", made.metadata.name, made.metadata.shared, 0, 0)
    code = made.asm["cubin"]
    return Image(*named, code, made.metadata.name, made.metadata.shared, *_resources(code))


def _resources(code: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as the disassembler that comes with Triton finds them in a cubin."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        done = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise KernelError(f"{program.name} tells no resources of a cubin: {(done.stdout + done.stderr).strip()[-200:]}")
    return int(found[1]), int(found[2])


def compile_all(chosen: list[Variant], targets: tuple[int, ...] = (*TARGETS, PTX)) -> list[Image]:
    """All variants for all targets, on all processors there are."""
    with ProcessPoolExecutor() as pool:
        work = [(variant, target) for variant in chosen for target in targets]
        return list(pool.map(compile_image, *zip(*work, strict=True), chunksize=4))


def write_images(images: list[Image], folder: Path) -> None:
    """Write what the library is built with: `images.bin`, and `images.inc` with a line of C++ for each of its parts."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, place = [], 0
    with (folder / "images.bin").open("wb") as file:
        for image in images:
            each = image.variant
            half = "true" if each.floats == "float16" else "false"
            lines.append(
                f"{{qc::Kind::k{each.kind.capitalize()}, {each.bits}, {each.entry}, {half}, {each.block_m}, "
                f'{each.block_n}, {each.warps}, {image.target}, "{image.symbol}", {image.shared}, {place}}},\n'
            )
            file.write(image.code + bytes(-len(image.code) % 16))
            place = file.tell()
    (folder / "images.inc").write_text("".join(lines), encoding="utf-8")
