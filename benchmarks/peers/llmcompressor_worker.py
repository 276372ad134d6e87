"""Runs inside llm-compressor's environment: GPTQ on a transformers folder, dequantized weights out as .npz.

usage: python llmcompressor_worker.py HF_DIR TOKENS.npy ROWS GROUP {sym,asym} OUT.npz
"""

import sys

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantize every Linear but lm_head to int4 groups with act-order and static groups, the tool's default."""
    folder, tokens, rows, group, kind, out = sys.argv[1:]
    torch.set_num_threads(2)
    data = np.load(tokens, mmap_mode="r")
    chosen = np.asarray(data[[i * len(data) // int(rows) for i in range(int(rows))]])
    dataset = Dataset.from_dict({"input_ids": chosen.tolist(), "attention_mask": np.ones_like(chosen).tolist()})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {"num_bits": 4, "type": "int", "symmetric": kind == "sym", "strategy": "group", "group_size": int(group)}
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        max_seq_length=chosen.shape[1],
        num_calibration_samples=len(chosen),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    arrays = {name: model.get_submodule(name).weight.detach().float().numpy() for name in sorted(names)}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
