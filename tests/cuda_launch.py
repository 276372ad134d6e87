"""Launch one product through a library without ONNX Runtime; a process of its own, since the driver is loaded once.

    QCOMPILER_CUDA_DRIVER=DRIVER python -m tests.cuda_launch LIBRARY JSON

JSON is a list of products: what differs from the fields below. Prints a list of errors, null where there was none.
"""

import ctypes
import json
import sys
from ctypes import c_bool, c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

KINDS = ("uniform", "codebook", "signs")
STREAM = 99


class Product(ctypes.Structure):
    """`qc::cuda::Product` of kernels/cuda/launch.h."""

    _fields_ = (
        *((name, c_int) for name in ("kind", "bits", "entry")),
        ("half", c_bool),
        *((name, c_int64) for name in ("count", "rows", "columns", "groups", "group_size", "entries")),
        *((name, c_bool) for name in ("zeros_are_codes", "zero_each", "starts_each", "bias_each")),
        *((name, c_void_p) for name in ("a", "codes", "scales", "values", "zero_codes", "starts", "bias", "y")),
    )


def load(path):
    library = ctypes.CDLL(str(path))
    library.QcompilerCudaLaunch.restype = c_char_p
    library.QcompilerCudaLaunch.argtypes = (ctypes.POINTER(Product), c_void_p)
    return library


def main():
    library = load(Path(sys.argv[1]))
    found = []
    for fields in json.loads(sys.argv[2]):
        product = Product(**{**fields, "kind": KINDS.index(fields["kind"])})
        error = library.QcompilerCudaLaunch(ctypes.byref(product), STREAM)
        found.append(error and error.decode())
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
