"""Run float and quantized model folders through onnxruntime-genai: the tokens they choose, what they write, how fast.

    python benchmarks/genai_tokens.py FLOAT_DIR QUANTIZED_DIR... [--tokens 100] [--no-speed] [--json]

Agreement is teacher-forced. The float model answers each of `QUESTIONS` with its likeliest token at every step; the
quantized model is then given the same tokens, whatever it would have written, and each step at which its likeliest
token is the float model's counts. One different choice therefore costs one token and not all that follow. Then the
quantized model writes freely, for a reader to judge.

Speed is measured with both models in memory, in turns: 512 tokens in, 48 out, the median of three rounds.

Needs onnxruntime-genai. The float folder is made by `python -m benchmarks.zoo.smollm2 DIR` (DIR/genai).
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

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

    def _generator(self, prompt: np.ndarray, count: int) -> "object":
        """A generator that has read the prompt and has room for `count` tokens more."""
        parameters = self._genai.GeneratorParams(self._model)
        length = len(prompt) + count + 1
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.asarray(prompt, np.int32))
        return generator


def _likeliest(generator: "object") -> int:
    """The token with the largest logit [1, 1, vocabulary] at the last place."""
    return int(generator.get_logits()[0, -1].argmax())  # type: ignore[attr-defined]


def answers(folder: Path, count: int = TOKENS) -> list[tuple[np.ndarray, list[int]]]:
    """A model's (prompt, greedy answer) to each question."""
    model = Deployed(folder)
    return [(prompt, model.write(prompt, count)) for prompt in map(model.ask, QUESTIONS)]


def token_agreement(folder: Path, expected: Sequence[tuple[np.ndarray, Sequence[int]]]) -> list[float]:
    """The share of expected tokens that a model would choose too, for each (prompt, answer)."""
    model = Deployed(folder)
    return [float(np.mean(np.equal(model.choices(prompt, answer), answer))) for prompt, answer in expected]


def speeds(folders: Sequence[Path]) -> list[dict[str, float]]:
    """Tokens a second of several folders, timed in turns, and their ratios to the first folder's in the same round."""
    models = [Deployed(folder) for folder in folders]
    prompt = np.random.default_rng(0).integers(1000, 40000, PROMPT).astype(np.int32)
    for model in models:
        model.speed(prompt[:32], 4)
    rounds = np.array([[model.speed(prompt, ANSWER) for model in models] for _ in range(ROUNDS)])  # [rounds, models, 2]
    middle, ratios = np.median(rounds, 0), np.median(rounds / rounds[:, :1], 0)
    return [
        {"read": one[0], "written": one[1], "read_ratio": ratio[0], "written_ratio": ratio[1]}
        for one, ratio in zip(middle.round(1).tolist(), ratios.round(2).tolist(), strict=True)
    ]


def main() -> None:
    """Print what the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float", type=Path, metavar="FLOAT_DIR", help="folder of the float model")
    parser.add_argument("quantized", type=Path, nargs="+", metavar="QUANTIZED_DIR", help="folders that qcompile wrote")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="length of each answer (default: %(default)s)")
    parser.add_argument("--no-speed", action="store_true", help="leave out the measurement of speed")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a quantized folder")
    args = parser.parse_args()
    expected = answers(args.float, args.tokens)
    timed = [] if args.no_speed else speeds([args.float, *args.quantized])
    if not args.json:
        show(args.float, [answer for _, answer in expected])
        _print_speed(timed[:1])
    for index, folder in enumerate(args.quantized, 1):
        agreement = token_agreement(folder, expected)
        written = [answer for _, answer in answers(folder, args.tokens)]
        if args.json:
            model = Deployed(folder)
            line = {"model": str(folder), "agreement": agreement, "text": [model.text(answer) for answer in written]}
            print(json.dumps(line | {"speed": timed[index] if timed else None}), flush=True)
            continue
        show(folder, written)
        shares = ", ".join(f"{round(share * args.tokens)} of {args.tokens}" for share in agreement)
        print(f"chooses the float model's token at {shares} places (mean {statistics.fmean(agreement):.3f})")
        _print_speed(timed[index : index + 1])


def show(folder: Path, written: Sequence[Sequence[int]]) -> None:
    """Print what a model answers."""
    model = Deployed(folder)
    print(f"\n=== {folder}")
    for question, answer in zip(QUESTIONS, written, strict=True):
        print(f"--- {question}\n{model.text(answer)}")


def _print_speed(timed: Sequence[dict[str, float]]) -> None:
    for found in timed:
        print(
            f"reads {found['read']:.0f} tokens/s (ratio {found['read_ratio']:.2f}), "
            f"writes {found['written']:.1f} tokens/s (ratio {found['written_ratio']:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
