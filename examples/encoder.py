# %% [markdown]
"""# Quantize an encoder, or train it quantized: which is worth what?

all-MiniLM-L6-v2, a BERT of 22 million weights that turns sentences into vectors, as an exported ONNX file. From there
on no training code is needed: each scheme is applied once by calibration alone (PTQ), and once trained behind that by
the pass `tune` (QAT), which has the float model for a teacher and needs no labels. Both are ONNX files of the same
nodes and the same size.

    bash tools/venv.sh cpu text real && .venv/bin/python examples/encoder.py

That takes minutes a scheme on two cores; the model is fetched the first time. The cells are those of a notebook:
editors that know `# %%` run them one by one.
"""

# %%
import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.zoo.minilm import embedding_cosine, exported_minilm, sentiment_accuracy, training_folder
from qcompiler import compile_model

parser = argparse.ArgumentParser()
parser.add_argument("--schemes", default="w8a8,w4a8-static", help="what to compare, with commas between")
parser.add_argument("--steps", type=int, default=150, help="of training")
args = parser.parse_args()
FOLDER = Path(tempfile.mkdtemp(prefix="encoder-"))

# %% [markdown]
# ## The float model
#
# What counts is whether its vectors are good for something: a linear probe reads off them whether a film review is
# kind. The probe was fitted to vectors of the float model, so it takes those of a quantized one as they come.

# %%
model, texts = exported_minilm(), training_folder()
print(f"float: the probe is right about {sentiment_accuracy(model):.1%} of 1,000 reviews")

# %% [markdown]
# ## Quantized, and trained
#
# 512 texts to learn from, of which each fourth calibrates. The loss is the squared error of the model's output,
# relative to its size.


# %%
def compiled(scheme: str, *algorithms: str) -> Path:
    """The model in a scheme."""
    out = FOLDER / f"{scheme}-{len(algorithms)}.onnx"
    compile_model(model, scheme, calibration=texts, samples=128, output=out, algorithms=algorithms, verify=False)
    return out


training = f"tune{{method=qat,batch=16,rows=512,steps={args.steps}}}"
for scheme in args.schemes.split(","):
    for name, algorithms in (("PTQ", ("gptq",)), ("QAT", ("gptq", training))):
        began = time.monotonic()
        made = compiled(scheme, *algorithms)
        seconds = time.monotonic() - began
        right, near = sentiment_accuracy(made), embedding_cosine(made)
        print(f"{scheme:12} {name}: {right:.1%}, vectors {1 - near:.4f} from float (1 - cosine), {seconds:.0f} s")

# %% [markdown]
# ## What it means
#
# Where calibration alone is good enough, training changes little and costs minutes; docs/methods.md has figures of
# fewer bits, where there is no other way. From Python `tune` is an algorithm behind the others, as here; from the
# command line
#
#     qcompiler tune model.onnx -o small.onnx --scheme w4a8-static --calibration texts/ --method qat --steps 150
