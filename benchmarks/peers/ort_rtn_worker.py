"""ONNX Runtime's own round-to-nearest int4 quantizer as a command.

usage: python ort_rtn_worker.py MODEL.onnx GROUP {sym,asym} OUT.onnx
"""

import sys

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer


def main() -> None:
    """Quantize every MatMul with a constant weight but the last one, the projection to the vocabulary."""
    path, group, kind, out = sys.argv[1:]
    model = onnx.load(path)
    head = model.graph.node[-1].name
    quantizer = MatMulNBitsQuantizer(
        model, block_size=int(group), is_symmetric=kind == "sym", nodes_to_exclude=[head], accuracy_level=0
    )
    quantizer.process()
    quantizer.model.save_model_to_file(out, use_external_data_format=True)


if __name__ == "__main__":
    main()
