"""Our GPTQ beside llm-compressor's, and our RTN beside ONNX Runtime's: same model, data, threads and machine.

usage: python -m benchmarks.peers.gptq DIR [--only rtn|gptq] [--repeat N]

DIR holds what `python -m benchmarks.zoo.smollm2 DIR` made. Prints one JSON line a run and the ratios last.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.peers.environments import Cost, environment, report_line, run
from benchmarks.yardstick import score
from qcompiler.files.loader import load_model
from qcompiler.files.saver import save_model
from qcompiler.sites import find_sites

ROWS = 32
HERE = Path(__file__).parent


def ours(bench: Path, work: Path, algorithm: str, kind: str, *flags: str) -> tuple[Cost, Path]:
    """`qcompile` as a user types it, embedding and lm_head left float as the peers leave them."""
    out = work / f"ours-{algorithm}-{kind}.onnx"
    model = [bench / "onnx" / "model.onnx", "--scheme", f"w4a16-g64-{kind}", "--algorithm", algorithm]
    left = ["--lm-head", "float", "--embedding", "float", "-o", out, "--force"]
    command = [sys.executable, "-m", "qcompiler", "compile", *model, *left, *flags]
    return run(command, out.with_suffix(".log")), out


def ort(model: Path, work: Path, kind: str) -> tuple[Cost, Path]:
    """ONNX Runtime's RTN ("sym" or "asym"), or its k_quant."""
    out = work / f"ort-{kind}.onnx"
    for old in (out, out.with_name(out.name + ".data")):  # ONNX appends to external data that is there
        old.unlink(missing_ok=True)
    return run([sys.executable, HERE / "ort_weights_worker.py", model, "64", kind, out], out.with_suffix(".log")), out


def llmcompressor(bench: Path, work: Path, kind: str, rows: int = ROWS) -> tuple[Cost, Path]:
    """llm-compressor's GPTQ; its weights are put into the float ONNX model to be measured."""
    weights = work / f"llmcompressor-{kind}.npz"
    command = [environment("llmcompressor"), HERE / "llmcompressor_worker.py", bench / "hf", bench / "brown_train.npy",
               str(rows), "64", kind, weights]  # fmt: skip
    cost = run(command, weights.with_suffix(".log"))
    return cost, with_weights(bench, weights)


def with_weights(bench: Path, weights: Path) -> Path:
    """The float ONNX model with other weights.

    Args:
        bench: Folder with onnx/model.onnx.
        weights: .npz of float32 [N, K] by the names of transformers' modules; the output is beside it.
    """
    model = load_model(bench / "onnx" / "model.onnx")
    arrays = np.load(weights)
    left = set(arrays.files)
    for site in find_sites(model)[0]:
        # The exporter wrapped the model once more than transformers does.
        name = site.name.removeprefix("model.")
        if name in left:
            left.remove(name)
            stored = arrays[name].T if site.layout == "KN" else arrays[name]
            site.weight.const_value = ir.tensor(np.ascontiguousarray(stored), name=site.weight.name)
    assert not left, f"no site is called {sorted(left)[0]}"
    out = weights.with_suffix(".onnx")
    save_model(model, out, force=True)
    return out


def figures(bench: Path, model: Path) -> dict[str, float]:
    """KL and top-1 on 16 windows."""
    result = score(model, bench, windows=16)
    return {"kl": round(result.kl, 4), "top1": round(result.top1, 4)}


def compare_rtn(bench: Path, work: Path, repeat: int) -> None:
    """Ours without and with verification against ONNX Runtime's."""
    costs: dict[str, list[Cost]] = {"ours": [], "ort": []}
    for _ in range(repeat):
        ours_cost, ours_out = ours(bench, work, "rtn", "asym", "--no-verify")
        ort_cost, ort_out = ort(bench / "onnx" / "model.onnx", work, "asym")
        costs["ours"].append(ours_cost)
        costs["ort"].append(ort_cost)
    verified, _ = ours(bench, work, "rtn", "asym")
    best = {tool: min(runs, key=lambda cost: cost.seconds) for tool, runs in costs.items()}
    print(report_line("onnxruntime RTN", "w4 g64 asym", best["ort"], figures(bench, ort_out)))
    print(report_line("ours RTN", "w4 g64 asym", best["ours"], figures(bench, ours_out)))
    print(report_line("ours RTN, verified", "w4 g64 asym", verified, {}))
    size = {p.name: sum(f.stat().st_size for f in work.glob(p.name + "*") if f.suffix in (".onnx", ".data")) for p in
            (ours_out, ort_out)}  # fmt: skip
    print(json.dumps({
        "rtn_time_ratio": round(best["ours"].seconds / best["ort"].seconds, 3),
        "rtn_memory_ratio": round(best["ours"].peak_mb / best["ort"].peak_mb, 3),
        "file_size_ratio": round(size[ours_out.name] / size[ort_out.name], 4),
    }))  # fmt: skip


def compare_gptq(bench: Path, work: Path) -> None:
    """Ours, verified, against llm-compressor's."""
    peer, peer_out = llmcompressor(bench, work, "sym")
    data = ("--calibration", str(bench / "brown_train.npy"), "--samples", str(ROWS))
    sym, sym_out = ours(bench, work, "gptq", "sym", *data)
    asym, asym_out = ours(bench, work, "gptq", "asym", *data)
    print(report_line("llm-compressor GPTQ", "w4 g64 sym", peer, figures(bench, peer_out)))
    print(report_line("ours GPTQ", "w4 g64 sym", sym, figures(bench, sym_out)))
    print(report_line("ours GPTQ", "w4 g64 asym", asym, figures(bench, asym_out)))
    print(json.dumps({
        "gptq_time_ratio": round(sym.seconds / peer.seconds, 3),
        "gptq_memory_ratio": round(sym.peak_mb / peer.peak_mb, 3),
    }))  # fmt: skip


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--only", choices=("rtn", "gptq"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for outputs and logs, kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.only != "gptq":
            compare_rtn(args.bench, work, args.repeat)
        if args.only != "rtn":
            compare_gptq(args.bench, work)


if __name__ == "__main__":
    main()
