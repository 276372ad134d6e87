"""Quantize a synthetic model of many layers that is larger than the memory it is allowed.

usage: python -m benchmarks.big_model [--gb 3] [--samples 8]

Prints one JSON line for RTN and one for GPTQ: time and peak anonymous memory of the whole command, and whether the
output loads and runs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from benchmarks.peers.environments import run

HIDDEN, INNER, TOKENS, VOCABULARY = 1024, 2816, 128, 4096


def build(folder: Path, gigabytes: float, seed: int = 0) -> Path:
    """Write gated MLP blocks behind an embedding, weights in external data, streamed to disk layer by layer."""
    shapes = {
        "mix": (HIDDEN, HIDDEN),
        "back": (HIDDEN, HIDDEN),
        "gate": (HIDDEN, INNER),
        "up": (HIDDEN, INNER),
        "down": (INNER, HIDDEN),
    }
    layers = max(1, round(gigabytes * 1e9 / 4 / sum(k * n for k, n in shapes.values())))
    rng = np.random.default_rng(seed)
    nodes, initializers = [], []
    path = folder / "big.onnx"
    with (folder / "big.onnx.data").open("wb") as data:

        def weight(name: str, shape: tuple[int, ...]) -> str:
            values = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
            place = {"location": "big.onnx.data", "offset": data.tell(), "length": values.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            data.write(values.tobytes())
            initializers.append(tensor)
            return name

        def node(op: str, inputs: list[str], name: str, **attributes: object) -> str:
            nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
            return name

        initializers.append(helper.make_tensor("ones", TensorProto.FLOAT, [HIDDEN], np.ones(HIDDEN, np.float32)))
        x = node("Gather", [weight("embedding", (VOCABULARY, HIDDEN)), "input_ids"], "embedded")
        for layer in range(layers):
            at = f"layers.{layer}"
            y = node("LayerNormalization", [x, "ones"], f"{at}.norm", axis=-1)
            mixed = node("Tanh", [node("MatMul", [y, weight(f"{at}.mix.w", shapes["mix"])], f"{at}.mix")], f"{at}.tanh")
            x = node(
                "Add",
                [x, node("MatMul", [mixed, weight(f"{at}.back.w", shapes["back"])], f"{at}.back")],
                f"{at}.middle",
            )
            y = node("LayerNormalization", [x, "ones"], f"{at}.norm2", axis=-1)
            gate = node(
                "Sigmoid", [node("MatMul", [y, weight(f"{at}.gate.w", shapes["gate"])], f"{at}.gate")], f"{at}.act"
            )
            up = node("MatMul", [y, weight(f"{at}.up.w", shapes["up"])], f"{at}.up")
            inner = node("Mul", [gate, up], f"{at}.inner")
            x = node(
                "Add", [x, node("MatMul", [inner, weight(f"{at}.down.w", shapes["down"])], f"{at}.down")], f"{at}.out"
            )
        nodes.append(helper.make_node("Identity", [x], ["hidden"], name="last"))
    graph = helper.make_graph(
        nodes,
        "big",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "tokens", HIDDEN])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def main() -> None:
    """Build the model, quantize it twice, load and run the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build(folder, args.gb)
        rows = np.random.default_rng(1).integers(0, VOCABULARY, (args.samples * 2, TOKENS))
        np.save(folder / "rows.npy", rows)
        calibrated = ["--calibration", folder / "rows.npy", "--samples", str(args.samples)]
        for algorithm, extra in (("rtn", []), ("gptq", calibrated)):
            out = folder / f"{algorithm}.onnx"
            command = [
                sys.executable,
                "-m",
                "qcompiler",
                "compile",
                model,
                "--scheme",
                "w4a16",
                "-o",
                out,
                "--no-verify",
            ]
            cost = run([*command, "--algorithm", algorithm, *extra], out.with_suffix(".log"))
            session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
            (hidden,) = session.run(None, {"input_ids": rows[:1]})
            size = sum(file.stat().st_size for file in (model, Path(f"{model}.data"))) / 1e9
            line = {"algorithm": algorithm, "input_gb": round(size, 2), "seconds": round(cost.seconds, 1)}
            runs = bool(np.isfinite(hidden).all())
            print(
                json.dumps({**line, "peak_mb": round(cost.peak_mb), "loads_and_runs": runs, "onnx": onnx.__version__})
            )
            del session


if __name__ == "__main__":
    main()
