"""ONNX Runtime's own int8 quantizers as a command: QDQ per tensor or per channel with data, or dynamic without.

usage: python ort_int8_worker.py MODEL.onnx {static,static-channel,static-linears,dynamic} FEEDS OUT.onnx

FEEDS is a folder of .npz files, each with the model's inputs by name; `dynamic` does not look at it.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

LINEARS = ["Clip", "Conv", "Gemm", "MatMul", "Relu"]  # without Clip, the range of a Conv is that before it


class Feeds(CalibrationDataReader):
    """A folder of .npz files, read one after the other."""

    def __init__(self, folder: Path) -> None:
        """Start at the first file."""
        self._feeds = self._read(folder)

    @staticmethod
    def _read(folder: Path) -> Iterator[dict[str, np.ndarray]]:
        for file in sorted(folder.glob("*.npz")):
            yield dict(np.load(file))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next feed, None after the last one."""
        return next(self._feeds, None)


def prepare(model: Path, prepared: Path) -> None:
    """Infer shapes and optimize as ONNX Runtime's manual asks, without symbolic shapes where it cannot infer them."""
    try:
        quant_pre_process(model, prepared)
    except Exception as error:  # it raises nothing narrower
        if "symbolic shape inference" not in str(error):
            raise
        print(f"{error}; going on without")
        quant_pre_process(model, prepared, skip_symbolic_shape=True)


def main() -> None:
    """Prepare the model, then quantize it to int8 with the defaults."""
    name, way, *others = sys.argv[1:]
    model, feeds, out = (Path(path).absolute() for path in (name, *others))
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)  # where a preparation that fails leaves its files
        prepared = Path(work) / "prepared.onnx"
        prepare(model, prepared)
        if way == "dynamic":
            quantize_dynamic(prepared, out)
        else:
            choices = {
                "per_channel": way != "static",
                "op_types_to_quantize": LINEARS if way == "static-linears" else None,
            }
            quantize_static(prepared, out, Feeds(feeds), quant_format=QuantFormat.QDQ, **choices)


if __name__ == "__main__":
    main()
