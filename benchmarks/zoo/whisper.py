"""Whisper tiny.en, a transcriber of English speech in two models, with figures of how well it hears.

| figure | meaning | float model |
|---|---|---|
| `teacher_forced_nll` | mean negative log-likelihood in nats of a transcript's token after the ones before | 0.6580 |
| `teacher_forced_kl` | mean KL divergence in nats from the float model at these tokens | 0 |
| `word_error_rate` | edits that greedy transcriptions need, per word | 0.0423 |

All on five sentences from a reading of Sense and Sensibility, 82 tokens or 71 words. The transcripts are in lower case
without punctuation, as Whisper would not write: of its own transcriptions a token costs 0.129. The error rate is rough:
one word is 0.014 of it, so that a quantized model may be better than float by chance. The divergence is finest.

Every figure is a function of two .onnx files, the encoder and the decoder. `FIGURES` has them as functions of one, with
the float model's other one: `encoder_nll`, `decoder_nll`, `encoder_kl` and so on.

    python -m benchmarks.zoo.whisper                                     the float model, with its transcriptions
    python -m benchmarks.zoo.whisper --encoder MODEL.onnx                a compiled encoder, the float decoder

whisper_export.py makes the float model, in a minute the first time. Needs onnxruntime and tokenizers, and to export
torch, transformers and onnxscript.
"""

import argparse
import json
import re
import wave
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks.zoo.cache import ZooError, root
from benchmarks.zoo.exports import exported, write_feeds
from benchmarks.zoo.packages import fetch
from benchmarks.zoo.vision_audio import edit_distance, open_session, recording
from benchmarks.zoo.whisper_export import PARTS, packaged

if TYPE_CHECKING:
    import tokenizers

RATE, WINDOW, HOP = 16000, 400, 160  # samples a second, in a spectrum, and between two spectra
SAMPLES, FRAMES, MELS = 30 * RATE, 3000, 80  # of the model's only input size, half a minute
LOUDNESS_RANGE = 8.0  # in factors of ten below the loudest
START_TOKENS = 2  # <|startoftranscript|> <|notimestamps|>
LONGEST = 100  # tokens of a transcript
PIECE = 5 * RATE  # of the calibration recording, about as long as the clips


class Clip(NamedTuple):
    """Speech at 16 kHz, float32 [samples] in [-1, 1], and what is said in it, in lower case without punctuation."""

    samples: np.ndarray
    text: str


def exported_part(part: str) -> Path:
    """Return the float "encoder" or "decoder"; exporting both takes a minute the first time."""
    return exported("benchmarks.zoo.whisper_export", part)


@cache
def clips() -> list[Clip]:
    """Return five sentences from a reading of Sense and Sensibility, 3 to 7 seconds each."""
    (folder,) = fetch("pocketsphinx-sdist").glob("*/test/data/librivox")
    found = []
    for line in (folder / "transcription").read_text("utf-8").splitlines():
        matched = re.fullmatch(r"<s> (.+) </s> \((.+)\)", line)
        if not matched:
            raise ZooError(f"{folder / 'transcription'}: {line!r} is not a sentence and the name of its recording")
        found.append(Clip(_read_wave(folder / f"{matched[2]}.wav"), matched[1]))
    return found


def _read_wave(file: Path) -> np.ndarray:
    """Return a recording of 16-bit samples, float32 [samples] in [-1, 1]."""
    with wave.open(str(file)) as sound:
        if (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) != (RATE, 1, 2):
            raise ZooError(f"{file.name} is not one channel of 16-bit samples at {RATE} Hz")
        return np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(np.float32) / 32768


@cache
def mel_filters() -> np.ndarray:
    """Return 80 triangular filters of equal area over the frequencies of a spectrum, float64 [WINDOW // 2 + 1, MELS].

    On Slaney's mel scale, which is linear up to 1 kHz (15 mel) and grows by a factor of 6.4 in 27 mel above.
    """
    top = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    mel = np.linspace(0, top, MELS + 2)
    corners = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))  # Hz, [MELS + 2]
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    left, middle, right = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequencies - left) / (middle - left), (right - frequencies) / (right - middle)
    filters: np.ndarray = np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)
    return filters


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Return Whisper's features of speech, float32 [1, MELS, FRAMES]; silence is added up to half a minute."""
    padded = np.zeros(SAMPLES)
    padded[: len(samples)] = samples[:SAMPLES]
    padded = np.pad(padded, WINDOW // 2, mode="reflect")
    window = np.hanning(WINDOW + 1)[:-1]
    pieces = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:FRAMES]
    power = np.abs(np.fft.rfft(pieces * window)) ** 2  # [FRAMES, WINDOW // 2 + 1]
    loudness = np.log10(np.maximum(power @ mel_filters(), 1e-10))
    loudness = np.maximum(loudness, loudness.max() - LOUDNESS_RANGE)
    features: np.ndarray = ((loudness + 4) / 4).T[None].astype(np.float32)
    return features


@cache
def tokenizer() -> "tokenizers.Tokenizer":
    """Return the packaged tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(packaged() / "tokenizer.json"))


def transcript_tokens(text: str) -> list[int]:
    """Return a transcript's tokens, from the start tokens to the end token."""
    tokens: list[int] = tokenizer().encode(f" {text}" if text else "").ids
    return tokens


class Whisper:
    """Both parts, opened."""

    def __init__(self, encoder: Path, decoder: Path) -> None:
        """Open two .onnx files."""
        self.encoder, self.decoder = open_session(encoder), open_session(decoder)
        *self.start, self.end = transcript_tokens("")

    def hidden(self, samples: np.ndarray) -> np.ndarray:
        """Return the encoder's hidden states of speech, float32 [1, 1500, 384]."""
        hidden: np.ndarray = self.encoder.run(None, {"input_features": log_mel(samples)})[0]
        return hidden

    def logits(self, tokens: list[int], hidden: np.ndarray) -> np.ndarray:
        """Return the decoder's logits after each token, float32 [tokens, vocabulary]."""
        feeds = {"input_ids": np.array([tokens]), "encoder_hidden_states": hidden}
        logits: np.ndarray = self.decoder.run(None, feeds)[0][0]
        return logits

    def greedy(self, hidden: np.ndarray) -> list[int]:
        """Return the likeliest token after each other, from the start tokens to the end token."""
        tokens = list(self.start)
        while tokens[-1] != self.end and len(tokens) < LONGEST:
            tokens.append(int(self.logits(tokens, hidden)[-1].argmax()))
        return tokens

    def transcribe(self, clip: Clip) -> str:
        """Return what is heard, chosen greedily token by token."""
        return str(tokenizer().decode(self.greedy(self.hidden(clip.samples)))).strip()


# --- figures --------------------------------------------------------------------------------------


def teacher_forced(encoder: Path, decoder: Path) -> np.ndarray:
    """Return log-probabilities of what follows, float32 [tokens, vocabulary], where the transcripts' tokens precede."""
    model, found = Whisper(encoder, decoder), []
    for clip in clips():
        logits = model.logits(transcript_tokens(clip.text)[:-1], model.hidden(clip.samples))[START_TOKENS - 1 :]
        logits -= logits.max(-1, keepdims=True)
        found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return np.concatenate(found)


@cache
def _float_teacher_forced() -> np.ndarray:
    return teacher_forced(*map(exported_part, PARTS))


def teacher_forced_nll(encoder: Path, decoder: Path) -> float:
    """Return the mean negative log-likelihood of the transcripts' tokens, in nats."""
    following = np.concatenate([transcript_tokens(clip.text)[START_TOKENS:] for clip in clips()])
    return float(-teacher_forced(encoder, decoder)[np.arange(len(following)), following].mean())


def teacher_forced_kl(encoder: Path, decoder: Path) -> float:
    """Return the mean over the transcripts' tokens of KL(float || this) in nats."""
    want, got = _float_teacher_forced(), teacher_forced(encoder, decoder)
    return float((np.exp(want) * (want - got)).sum(-1).mean())


def word_error_rate(encoder: Path, decoder: Path) -> float:
    """Return the edits that the transcriptions need, per word that is said."""
    model, errors, count = Whisper(encoder, decoder), 0, 0
    for clip in clips():
        said, heard = words(clip.text), words(model.transcribe(clip))
        letters = {word: chr(index) for index, word in enumerate({*said, *heard})}
        errors += edit_distance(*("".join(letters[word] for word in text) for text in (said, heard)))
        count += len(said)
    return errors / count


def transcribe(encoder: Path, decoder: Path, clip: Clip) -> str:
    """Return what a model hears in a clip."""
    return Whisper(encoder, decoder).transcribe(clip)


def words(text: str) -> list[str]:
    """Return a text's words without case and punctuation, "Mr." as it is said."""
    found: list[str] = re.findall(r"[a-z']+", text.lower())
    return ["mister" if word == "mr" else word for word in found]


def _beside_float(part: str, figure: Callable[[Path, Path], float]) -> Callable[[Path], float]:
    """Return a figure as a function of one part; the other one is the float model's."""

    def measure(model: Path) -> float:
        encoder, decoder = (model if name == part else exported_part(name) for name in PARTS)
        return figure(encoder, decoder)

    return measure


FIGURES = {
    f"{part}_{name}": _beside_float(part, figure)
    for part in PARTS
    for name, figure in (("nll", teacher_forced_nll), ("kl", teacher_forced_kl), ("word_error_rate", word_error_rate))
}


# --- calibration ----------------------------------------------------------------------------------


def encoder_feeds() -> Iterator[dict[str, np.ndarray]]:
    """Yield inputs to calibrate the encoder on: a minute of other speech in 12 pieces of 5 seconds."""
    speech = recording()
    for start in range(0, len(speech), PIECE):
        yield {"input_features": log_mel(speech[start : start + PIECE])}


def decoder_feeds() -> Iterator[dict[str, np.ndarray]]:
    """Yield inputs to calibrate the decoder on: what the float model writes for these pieces, and its hidden states."""
    model = Whisper(*map(exported_part, PARTS))
    for feed in encoder_feeds():
        (hidden,) = model.encoder.run(None, feed)
        yield {"input_ids": np.array([model.greedy(hidden)[:-1]]), "encoder_hidden_states": hidden}


def calibration_folder(part: str) -> Path:
    """Return a folder of .npz files to calibrate a part on; no figure uses this speech."""
    feeds = {"encoder": encoder_feeds, "decoder": decoder_feeds}[part]
    return write_feeds(root() / f"feeds-whisper-{part}", feeds())


def main() -> None:
    """Print one JSON object a line: the figures of a model, then what it hears."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in PARTS:
        parser.add_argument(f"--{part}", type=Path, metavar="MODEL.onnx", help="default: the float one")
    args = parser.parse_args()
    parts = (args.encoder or exported_part("encoder"), args.decoder or exported_part("decoder"))
    for figure in (teacher_forced_nll, teacher_forced_kl, word_error_rate):
        print(json.dumps({"figure": figure.__name__, "value": figure(*parts)}), flush=True)
    for clip in clips():
        print(json.dumps({"said": clip.text, "heard": transcribe(*parts, clip)}), flush=True)


if __name__ == "__main__":
    main()
