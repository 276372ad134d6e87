"""ONNX Runtime's own int4 quantizers of weights as a command: round-to-nearest and k_quant.

usage: python ort_weights_worker.py MODEL.onnx GROUP {sym,asym,k_quant} OUT.onnx
"""

import sys

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import KQuantWeightOnlyQuantConfig, MatMulNBitsQuantizer


def main() -> None:
    """Quantize every MatMul with a constant weight; one that ends the graph projects to a vocabulary and is left."""
    path, group, kind, out = sys.argv[1:]
    model = onnx.load(path)
    quantizer = MatMulNBitsQuantizer(
        model,
        block_size=int(group),
        is_symmetric=kind == "sym",
        nodes_to_exclude=[model.graph.node[-1].name],
        accuracy_level=0,
        algo_config=KQuantWeightOnlyQuantConfig() if kind == "k_quant" else None,
    )
    quantizer.process()
    quantizer.model.save_model_to_file(out, use_external_data_format=True)


if __name__ == "__main__":
    main()
