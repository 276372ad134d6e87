"""Which versions of the format ONNX Runtime reads, and which IR version a model needs: tables and one rule."""

import onnx_ir as ir

__all__ = ["MAX_IR_VERSION", "MAX_OPSETS", "RUNTIME", "required_ir_version"]

RUNTIME = "ONNX Runtime 1.31"
MAX_IR_VERSION = 13
# Highest version of each operator set; a domain that is not listed belongs to the user.
MAX_OPSETS = {"": 26, "ai.onnx.ml": 5, "com.microsoft": 1}

_IR_OF_DTYPE = {
    ir.DataType.BFLOAT16: 4,
    ir.DataType.FLOAT8E4M3FN: 9,
    ir.DataType.FLOAT8E4M3FNUZ: 9,
    ir.DataType.FLOAT8E5M2: 9,
    ir.DataType.FLOAT8E5M2FNUZ: 9,
    ir.DataType.INT4: 10,
    ir.DataType.UINT4: 10,
    ir.DataType.FLOAT4E2M1: 11,
    ir.DataType.FLOAT8E8M0: 12,
    ir.DataType.INT2: 13,
    ir.DataType.UINT2: 13,
}
_IR_OF_FREE_INITIALIZERS = 4
_IR_OF_FUNCTIONS = 8


def required_ir_version(model: ir.Model) -> int:
    """The model's own IR version, raised to what its dtypes, functions and initializers need."""
    needed = {model.ir_version}
    if model.functions:
        needed.add(_IR_OF_FUNCTIONS)
    inputs = set(model.graph.inputs)
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                needed.add(_IR_OF_DTYPE.get(value.const_value.dtype, 0))
            if value not in inputs:
                needed.add(_IR_OF_FREE_INITIALIZERS)
    containers: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for container in containers:
        for node in ir.traversal.RecursiveGraphIterator(container):
            for operand in (*node.inputs, *node.outputs):
                if operand is not None and operand.dtype is not None:
                    needed.add(_IR_OF_DTYPE.get(operand.dtype, 0))
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    needed.add(_IR_OF_DTYPE.get(attribute.as_tensor().dtype, 0))
    return min(max(needed), MAX_IR_VERSION)
