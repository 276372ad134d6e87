"""Run float and quantized model folders through onnxruntime-genai: the tokens they choose, what they write, how fast.

    python benchmarks/genai_tokens.py FLOAT_DIR QUANTIZED_DIR... [--tokens 100] [--no-speed] [--json]

Agreement is teacher-forced. The float model answers each of `QUESTIONS` with its likeliest token at every step; the
quantized model is then given the same tokens, whatever it would have written, and each step at which its likeliest
token is the float model's counts. One different choice therefore costs one token and not all that follow. Then the
quantized model writes freely, for a reader to judge.

Speed is measured with all models in memory, in turns: 512 tokens in, 48 out, the median of three rounds. At accuracy
level 0 the kernels for 8 bits write about 2 tokens a second, so that those folders take minutes.

Needs onnxruntime-genai. The float folder is made by `python -m benchmarks.zoo.smollm2 DIR` (DIR/genai).
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUESTIONS = (
    "Why is the sky blue? Explain it to a curious child.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
)
TOKENS = 100
PROMPT, ANSWER, ROUNDS = 512, 48, 3  # of the measurement of speed


class Deployed:
    """A model folder loaded by onnxruntime-genai."""

    def __init__(self, folder: Path) -> None:
        """Load the folder."""
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)

    def ask(self, question: str) -> np.ndarray:
        """A question as the model's chat template puts it, token ids int32 [tokens]."""
        messages = json.dumps([{"role": "user", "content": question}])
        return self._tokenizer.encode(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def text(self, tokens: Sequence[int]) -> str:
        """Token ids as text."""
        return str(self._tokenizer.decode(np.asarray(tokens, np.int32)))

    def write(self, prompt: np.ndarray, count: int) -> list[int]:
        """The likeliest token, `count` times; the end of the text does not end it."""
        generator = self._generator(prompt, count)
        tokens = [_likeliest(generator)]
        while len(tokens) < count:
            generator.append_tokens(np.array(tokens[-1:], np.int32))
            tokens.append(_likeliest(generator))
        return tokens

    def choices(self, prompt: np.ndarray, forced: Sequence[int]) -> list[int]:
        """The likeliest token at each place of `forced`, given the prompt and the tokens of `forced` before it."""
        generator = self._generator(prompt, len(forced))
        chosen = [_likeliest(generator)]
        for token in forced[:-1]:
            generator.append_tokens(np.array([token], np.int32))
            chosen.append(_likeliest(generator))
        return chosen

    def speed(self, prompt: np.ndarray, count: int) -> tuple[float, float]:
        """Tokens a second read, and written."""
        start = time.perf_counter()
        generator = self._generator(prompt, count)
        _likeliest(generator)
        read = time.perf_counter()
        for _ in range(count):
            generator.generate_next_token()
        return len(prompt) / (read - start), count / (time.perf_counter() - read)

    def _generator(self, prompt: np.ndarray, count: int) -> Any:
        """A generator that has read the prompt and has room for `count` tokens more."""
        parameters = self._genai.GeneratorParams(self._model)
        length = len(prompt) + count + 1
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.asarray(prompt, np.int32))
        return generator


def _likeliest(generator: Any) -> int:
    """The token with the largest logit [1, 1, vocabulary] at the last place."""
    return int(generator.get_logits()[0, -1].argmax())


def answers(model: Deployed, count: int = TOKENS) -> list[tuple[np.ndarray, list[int]]]:
    """A model's (prompt, greedy answer) to each question."""
    return [(prompt, model.write(prompt, count)) for prompt in map(model.ask, QUESTIONS)]


def token_agreement(model: Deployed, expected: Sequence[tuple[np.ndarray, Sequence[int]]]) -> list[float]:
    """The share of expected tokens that a model would choose too, for each (prompt, answer)."""
    return [float(np.mean(np.equal(model.choices(prompt, answer), answer))) for prompt, answer in expected]


def speeds(models: Sequence[Deployed]) -> list[dict[str, float]]:
    """Tokens a second of several models, timed in turns, and their ratios to the first model's in the same round."""
    prompt = np.random.default_rng(0).integers(1000, 40000, PROMPT).astype(np.int32)
    for model in models:
        model.speed(prompt[:32], 4)
    rounds = np.array([[model.speed(prompt, ANSWER) for model in models] for _ in range(ROUNDS)])  # [rounds, models, 2]
    middle, ratios = np.median(rounds, 0), np.median(rounds / rounds[:, :1], 0)
    return [
        {"read": one[0], "written": one[1], "read_ratio": ratio[0], "written_ratio": ratio[1]}
        for one, ratio in zip(middle.round(1).tolist(), ratios.round(2).tolist(), strict=True)
    ]


def measure(folders: Sequence[Path], count: int = TOKENS, *, speed: bool = True) -> list[dict[str, Any]]:
    """Agreement with the first folder's model, free answers and speed of each folder's model, as plain values."""
    models = [Deployed(folder) for folder in folders]
    timed = speeds(models) if speed else [{} for _ in models]
    expected = answers(models[0], count)
    found = []
    for folder, model, rates in zip(folders, models, timed, strict=True):
        first = model is models[0]
        agreement = [1.0] * len(expected) if first else token_agreement(model, expected)
        written = expected if first else answers(model, count)
        texts = [model.text(answer) for _, answer in written]
        found.append({"model": str(folder), "agreement": agreement, "texts": texts} | rates)
    return found


def show(found: dict[str, Any], count: int) -> None:
    """Print what a model wrote, and its figures."""
    print(f"\n=== {found['model']}")
    for question, answer in zip(QUESTIONS, found["texts"], strict=True):
        print(f"--- {question}\n{answer}")
    shares = ", ".join(f"{round(share * count)} of {count}" for share in found["agreement"])
    print(f"\nchooses the float model's token at {shares} places")
    if "read" in found:
        print(
            f"reads {found['read']:.0f} tokens/s ({found['read_ratio']:.2f} times the float model's), "
            f"writes {found['written']:.1f} ({found['written_ratio']:.2f} times)"
        )


def main() -> None:
    """Measure the folders on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float", type=Path, metavar="FLOAT_DIR", help="folder of the float model")
    parser.add_argument("quantized", type=Path, nargs="+", metavar="QUANTIZED_DIR", help="folders that qcompile wrote")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="length of each answer (default: %(default)s)")
    parser.add_argument("--no-speed", action="store_true", help="leave out the measurement of speed")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a folder")
    args = parser.parse_args()
    for found in measure([args.float, *args.quantized], args.tokens, speed=not args.no_speed):
        if args.json:
            print(json.dumps(found), flush=True)
        else:
            show(found, args.tokens)


if __name__ == "__main__":
    main()
