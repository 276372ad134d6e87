"""What each target's kernels can run; every decision that depends on a runtime is made here.

The facts were measured on ONNX Runtime 1.31 (CPU) or read out of its CUDA build.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompiler.config import CompileConfig
from qcompiler.graph import SPARSE_KEY
from qcompiler.numerics.affine import WeightSpec, storage_dtype
from qcompiler.numerics.codebooks import table_rows
from qcompiler.numerics.formats import int_format
from qcompiler.scheme import GROUP_SIZES, Scheme

if TYPE_CHECKING:
    from qcompiler.graph import Site

__all__ = [
    "MAX_IR_VERSION",
    "MAX_OPSET",
    "IntegerRules",
    "block_size",
    "default_accuracy_level",
    "form_bytes",
    "fuses_bias",
    "lacks_kernel",
    "lowered_bytes",
    "needs_operators",
    "qdq_opset",
    "qdq_width",
    "site_refusal",
    "stream_operator",
    "takes_operators",
]

# ONNX Runtime 1.31 refuses anything newer.
MAX_IR_VERSION = 13
MAX_OPSET = 26
# Operators whose definitions of this opset and later have no kernel in ONNX Runtime 1.31.
_KERNELS_END = dict.fromkeys(
    (
        "GlobalLpPool", "MaxRoiPool", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
        "RandomUniformLike", "RoiAlign",
    ),
    22,
)  # fmt: skip


# Operators with integer kernels in ONNX Runtime's CPU provider, and which of their inputs are codes; () means all.
# Softmax, HardSwish and Sub are left out: their integer forms are slower than float, or do not exist.
_ARITHMETIC: dict[str, tuple[int, ...]] = {
    "Add": (), "Mul": (), "Sigmoid": (0,), "HardSigmoid": (0,), "LeakyRelu": (0,), "AveragePool": (0,),
    "GlobalAveragePool": (0,),
}  # fmt: skip
# What leaves a tensor of one position for each channel one; a convolution without padding has no larger kernel then.
_KEEPS_ONE_POSITION = {"Conv", "BatchNormalization", "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish"}
# Operators that run on codes as they are, whatever these mean: scale and zero point are the same in front and behind.
_MOVES: dict[str, tuple[int, ...]] = {
    "MaxPool": (0,), "Reshape": (0,), "Transpose": (0,), "Flatten": (0,), "Squeeze": (0,), "Unsqueeze": (0,),
    "Slice": (0,), "Resize": (0,), "Concat": (),
}  # fmt: skip


@dataclass(frozen=True)
class IntegerRules:
    """Which operators a target runs on codes.

    Attributes:
        signed: Activations are int8 in the place of uint8.
        followers: Whether operators without weights run on codes too.
        results: Whether a convolution needs its result quantized to become an integer kernel, and the result of a
            product may be read as codes or as floats, but not as both.
    """

    signed: bool = False
    followers: bool = True
    results: bool = True

    @classmethod
    def of(cls, target: str, *, fp8: bool) -> "IntegerRules":
        """The rules of a target; TensorRT places its own integer kernels around quantized products."""
        if fp8 or target == "tensorrt":
            return cls(signed=True, followers=False, results=False)
        return cls()

    def follows(self, node: ir.Node) -> tuple[int, ...] | None:
        """The inputs that are codes when an operator without weights runs on codes; None where it cannot."""
        if not self.followers or node.domain != "" or len(node.outputs) != 1:
            return None
        if node.op_type == "Resize":
            mode = node.attributes.get("mode")
            if mode is not None and mode.as_string() != "nearest":
                return None
        return _ARITHMETIC.get(node.op_type, _MOVES.get(node.op_type))

    def shrinks(self, node: ir.Node) -> bool:
        """Whether a node's result is so small that decoding it costs nothing, whoever reads it."""
        return node.op_type == "GlobalAveragePool"

    def moves(self, node: ir.Node) -> bool:
        """Whether a node's result has the scale of what it reads."""
        return node.op_type in _MOVES

    def result_is_quantized(self, node: ir.Node) -> bool:
        """Whether an integer node's result is codes; products and Gemm decode theirs themselves."""
        if node.op_type == "Conv":
            return self.results
        return node.op_type in _ARITHMETIC or node.op_type in _MOVES


def needs_operators(site: "Site", scheme: Scheme, config: CompileConfig) -> bool:
    """Whether our own operators are to run a site; a lookup keeps its codes in the next wider format."""
    return site.role != "embedding" and takes_operators(scheme, config)


def takes_operators(scheme: Scheme, config: CompileConfig) -> bool:
    """Whether our own operators are to run products with weights of a scheme.

    They are where ONNX Runtime has no kernel for such codes. Where they are preferred they are where theirs are faster
    too: on the CPU with activations of 8 bits and many rows, on CUDA with groups or zero points that its 4-bit kernel
    does not take in a stride.
    """
    if not config.own_operators or config.target not in ("cpu", "cuda") or config.output_format != "matmulnbits":
        return False
    if scheme.spelled_out:
        return False
    faster = scheme.bits == 4 if config.target == "cuda" else scheme.bits <= 4 and scheme.activations is not None
    return scheme.needs_operators or (config.custom_ops == "prefer" and faster)


def stream_operator(spec: WeightSpec, scheme: Scheme | None) -> str:
    """The operator of our own that runs a weight whose codes are a stream; the scheme tells about activations."""
    if scheme is not None and scheme.activations is not None and scheme.activations.bits == 1:
        return "MatMulSigns"
    if spec.vector and not spec.signs:
        return f"MatMulCodebook{spec.entries}"
    return f"MatMul{spec.bits}Bit" + ("s" if spec.bits > 1 else "")


def default_accuracy_level(bits: int) -> int:
    """MatMulNBits' accuracy level where the user names none: exact compute of codes that are stored in 4 bits.

    At 2 and 8 bits the CPU has no exact kernel and would dequantize the weight on every run (50 times slower), so
    level 4, int8 activations, is the default.
    """
    return 0 if int_format(bits).container == 4 else 4


def block_size(spec: WeightSpec, columns: int) -> int:
    """The block that MatMulNBits stores: the group, or for one group a row the block that wastes the least."""
    if spec.group_size in GROUP_SIZES:
        return spec.group_size
    scale_bits = 32 if spec.scale_dtype == "float32" else 16

    def cost(size: int) -> int:
        blocks = -(-columns // size)
        return blocks * (size * spec.format.container + scale_bits)

    return min((size for size in (32, 64, 128, 256)), key=lambda size: (cost(size), -size))


def lowered_bytes(spec: WeightSpec, rows: int, columns: int) -> int:
    """Bytes of an [N, K] weight's codes, scales and zero points as the block-quantized operators store them."""
    if spec.stream:
        groups, size = spec.groups(columns), storage_dtype(spec.scale_dtype).itemsize
        each = spec.group_size * spec.bits // 8 + size
        if spec.signs:
            return rows * groups * each
        if spec.vector:
            tables = -(-rows // table_rows(spec, rows, columns))
            return rows * groups * each + tables * spec.entries * spec.vector * size + 4 * rows
        return rows * groups * (each + (0 if spec.symmetric else 1))
    size, width = block_size(spec, columns), spec.format.container
    blocks = -(-columns // size)
    zeros = 0 if spec.symmetric else -(-blocks * width // 8)
    return rows * (blocks * (size * width // 8 + storage_dtype(spec.scale_dtype).itemsize) + zeros)


def form_bytes(site: "Site", spec: WeightSpec, config: CompileConfig) -> int:
    """Bytes of a weight's codes, scales and zero points in the output form."""
    rows, columns = site.rows, site.columns
    if config.output_format != "qdq":
        return lowered_bytes(spec, rows, columns)
    lookup, groups = site.role == "embedding", rows * spec.groups(columns)
    width = spec.format.container if lookup else qdq_width(spec.bits, rows)
    codes = groups * spec.group_size if lookup and groups > rows else rows * columns
    zeros = 0 if spec.symmetric else -(-groups * width // 8)
    return -(-codes * width // 8) + groups * storage_dtype(spec.scale_dtype).itemsize + zeros


def fuses_bias(target: str) -> bool:
    """Whether the fast MatMulNBits kernels take a bias; CUDA's weight-only GEMM does not."""
    return target != "cuda"


def site_refusal(site: "Site", scheme: Scheme, config: CompileConfig) -> str:
    """Why the target cannot run the site under the scheme; empty if it can."""
    if scheme.spelled_out:
        return _integer_refusal(site, scheme, config.target)
    if site.not_linear:
        return site.not_linear
    if scheme.vector:
        return _table_refusal(site, scheme, config)
    if site.role == "embedding" and config.output_format == "qdq" and scheme.bits != 8:
        return f"no portable operator looks up {scheme.bits}-bit rows; use --embedding w8a16 or --embedding float"
    if site.role == "embedding" and site.columns < (scheme.group_size or 16):
        return f"rows of {site.columns} values are shorter than one group"
    if config.output_format == "qdq" and site.node.op_type == "Conv":
        return "a convolution behind DequantizeLinear runs slower than in float"
    if config.output_format == "qdq" and scheme.activations is not None:
        return "no operator but MatMulNBits quantizes activations by blocks; use --format matmulnbits"
    return ""


def _table_refusal(site: "Site", scheme: Scheme, config: CompileConfig) -> str:
    """The same for codes that name entries of tables."""
    if SPARSE_KEY in site.node.metadata_props:
        return "pruned weights need a code for zero, and tables have none"
    if site.role == "embedding":
        return "no operator looks up rows of codes that name entries of tables; use --embedding w8a16"
    if site.columns % scheme.vector:
        return f"{site.columns} columns are no multiple of {scheme.vector}, which share a code"
    if site.dtype == ir.DataType.BFLOAT16:
        return "our own operators have no bfloat16 kernel; convert the model to float32"
    if not needs_operators(site, scheme, config):
        return (
            "tables and weights of 1 bit need our own operators, which run on the CPU; allow them with --custom-ops "
            "always, without --format qdq or another --target"
        )
    return ""


def _integer_refusal(site: "Site", scheme: Scheme, target: str) -> str:
    """The same for schemes whose activations are quantized in the graph."""
    activations = scheme.activations
    assert activations is not None
    if site.role == "embedding":
        return "a lookup has no activations to quantize; use --embedding w8a16"
    if target == "cuda" and not activations.fp8:
        return "ONNX Runtime's CUDA provider has no integer kernels; use w4a16, w8a8-fp8, or --target tensorrt"
    if activations.fp8 and target == "cpu":
        return "the CPU has no kernels for 8-bit floats; use w8a8, or --target cuda or tensorrt"
    if target == "tensorrt" and (activations.bits < 8 or scheme.bits < 8):
        return "TensorRT's integer kernels take 8 bits; use w8a8"
    if activations.bits == 16 and target != "portable":
        return f"{target} has no kernel for 16-bit integer activations; use w8a8, or --target portable"
    if site.dtype == ir.DataType.BFLOAT16:
        return "QuantizeLinear has no bfloat16 kernel; convert the model to float32"
    if activations.granularity == "tensor" and activations.dynamic and site.dtype == ir.DataType.FLOAT16:
        return "DynamicQuantizeLinear has no float16 kernel; use w8a8-dynamic-token"
    if activations.dynamic and site.node.op_type == "Conv":
        return "a convolution whose input is quantized at run time is slower than in float; use the static w8a8"
    if site.node.op_type == "Conv" and target == "cpu" and not activations.fp8:
        slow = _slow_convolution(site)
        if slow:
            return slow
    if site.nested and not activations.dynamic:
        return f"inside the body of {site.nested}, where no ranges can be measured; use w8a8-dynamic"
    if scheme.head_size and site.rows % scheme.head_size:
        return f"{site.rows} output channels are not whole heads of {scheme.head_size}"
    return ""


def _slow_convolution(site: "Site") -> str:
    """Why ONNX Runtime's CPU provider runs a convolution no faster on integers; empty if it does.

    Measured with one thread as QLinearConv's time over that of the float kernel. 3, 5, 6 and 7 input channels: 3.4,
    2.4, 1.7 and 1.6 (4, 8 and 12: 0.7, 0.7 and 0.5). Depthwise, 16 channels: 4.1; 24, 40, 72 and 120: 4.1 to 5.2
    (32, 80 and 192: 2.3, 1.7 and 1.8, which the codes in front and behind make up for). Behind a global pooling: 1.3.

    In a network of such convolutions alone only the last of these are refused: whoever asks for integers there has
    other reasons.
    """
    if _behind_global_pooling(site.input):
        return "behind a global pooling a convolution is as fast in float"
    shape = _kernel_shape(site.node)
    if shape is None or site.node.graph is None or not any(_gains(node) for node in site.node.graph):
        return ""
    group, (outputs, inputs) = site.node.attributes.get_int("group", 1), shape[:2]
    if group == 1 and inputs < 8 and inputs % 4:
        return f"a convolution of {inputs} channels is faster in float"
    if inputs == 1 and group == outputs and (outputs % 16 or outputs < 32):
        return f"a depthwise convolution of {outputs} channels is faster in float"
    if _is_thin(site.node) and _only_thin_before(site.node):
        return "the first convolutions, of few channels, gain little on integers and lose most"
    return ""


def _kernel_shape(node: ir.Node) -> tuple[int, ...] | None:
    """The shape of a convolution's constant weight."""
    weight = node.inputs[1]
    tensor = weight.const_value if weight is not None else None
    return None if tensor is None else tuple(int(size) for size in tensor.shape.numpy())


def _gains(node: ir.Node) -> bool:
    """Whether a node is a convolution that gains by itself, whatever is around it."""
    shape = _kernel_shape(node) if node.op_type == "Conv" else None
    return shape is not None and math.prod(shape[1:]) >= 48 and shape[1] >= 32


def _is_thin(node: ir.Node) -> bool:
    """Whether a convolution has so few multiplications for each value that integers gain little.

    At the beginning of a network this is a trade of time for accuracy: pictures have the widest ranges there. Integers
    from the first convolution with 48 on, in the place of from the second one on, let PP-OCRv4 detection mark 96 % of
    the text pixels, not 86 %, in 0.46 and not 0.51 of float's time (two threads: 0.56 and 0.58); recognition takes 0.36
    and not 0.34 (two threads: 0.46 and 0.34). On EfficientNet-lite, leaving the expansion to 96 channels float costs a
    tenth of the time, hence the bound on output channels.
    """
    shape = _kernel_shape(node)
    return shape is not None and math.prod(shape[1:]) < 48 and shape[0] <= 64


def _only_thin_before(node: ir.Node) -> bool:
    """Whether all layers on the way from the model's inputs to a node are thin convolutions."""
    seen, waiting = set(), [node.inputs[0]]
    while waiting:
        value = waiting.pop()
        producer = value.producer() if value is not None else None
        if producer is None or producer in seen:
            continue
        seen.add(producer)
        thick = producer.op_type == "Conv" and not _is_thin(producer)
        if thick or producer.op_type in ("MatMul", "Gemm", "ConvTranspose"):
            return False
        waiting += producer.inputs[:1] if producer.op_type == "Conv" else producer.inputs
    return True


def _behind_global_pooling(value: ir.Value) -> bool:
    """Whether a value has one element for each channel: a global pooling's result, perhaps through other layers."""
    producer = value.producer()
    while producer is not None and producer.op_type in _KEEPS_ONE_POSITION:
        source = producer.inputs[0]
        producer = source.producer() if source is not None else None
    return producer is not None and producer.op_type in ("GlobalAveragePool", "GlobalMaxPool")


def qdq_width(bits: int, rows: int) -> int:
    """Width of the integer type that holds the codes of a linear weight of `rows` output channels (N) for QDQ.

    ONNX Runtime 1.31 fuses a 2-bit weight whose N is no multiple of 4 into a wrong MatMulNBits; in a 4-bit type the
    same codes come out right.
    """
    return 4 if bits == 2 and rows % 4 else int_format(bits).container


def qdq_opset(spec: WeightSpec, rows: int, columns: int, *, lookup: bool) -> int:
    """The lowest opset in which an [N, K] weight has a QDQ form, as DequantizeLinear knows its blocks and types.

    A lookup table has none: plain arithmetic decodes it.
    """
    width = qdq_width(spec.bits, rows)
    if lookup:
        return 13
    if width < 8:
        return 25 if width == 2 else 21
    if spec.groups(columns) > 1:
        return 21
    return 13 if spec.scale_dtype == "float32" and not spec.fp8 else 19


def lacks_kernel(op_type: str, opset: int) -> bool:
    """Whether ONNX Runtime cannot run a standard operator as `opset` defines it, though it runs earlier versions."""
    return opset >= _KERNELS_END.get(op_type, MAX_OPSET + 1)
