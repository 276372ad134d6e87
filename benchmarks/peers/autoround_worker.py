"""Runs inside auto-round's environment: learned rounding of a transformers folder, dequantized weights out as .npz.

Where the processor has bfloat16 the tool computes in it, and the weights that come out are rounded to it.

usage: python autoround_worker.py HF_DIR TOKENS.npy ROWS GROUP {sym,asym} ITERATIONS OUT.npz
"""

import sys

import numpy as np
import torch
from auto_round import AutoRound
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize every Linear but lm_head to int4 groups, with the tool's defaults but for data and iterations."""
    folder, tokens, rows, group, kind, iterations, out = sys.argv[1:]
    torch.set_num_threads(2)
    data = np.load(tokens, mmap_mode="r")
    chosen = torch.from_numpy(np.asarray(data[[i * len(data) // int(rows) for i in range(int(rows))]]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    tool = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        scheme=QuantizationScheme(bits=4, group_size=int(group), sym=kind == "sym"),
        dataset=list(chosen[:, None]),
        iters=int(iterations),
        seqlen=chosen.shape[1],
        nsamples=len(chosen),
    )
    model, _ = tool.quantize()
    arrays = {name: model.get_submodule(name).weight.detach().float().numpy() for name in sorted(names)}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
