"""Calibration data that a model makes itself, where there is none: `--calibration synthetic`.

1. A language model writes text (`text`): the graph takes token ids and gives logits ``[B, S, V]``, each of which hangs
   on the tokens before it alone.
2. A network with batch normalizations gets inputs with the statistics that these keep (`zeroq`): the graph has one
   input, of floats.

Anything else keeps nothing of the data it was trained on that could be used. The same seed makes the same data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from qcompiler.calibration import made_up_shape
from qcompiler.calibration_inputs import ModelInputs, numpy_dtype
from qcompiler.calibration_rows import Source, TokenRows, array_rows
from qcompiler.errors import CalibrationError
from qcompiler.extras import require_torch
from qcompiler.session import InputSpec
from qcompiler.sites import find_sites
from qcompiler.synthetic.decoders import CachedDecoder, PlainDecoder, Sessions, cache_outputs
from qcompiler.synthetic.stepping import stepped_decoder
from qcompiler.synthetic.text import Decoder, TextSettings, write_rows

__all__ = ["Means", "synthetic_rows"]

_LABEL = "synthetic data"
_OTHERWISE = "give data with --calibration, or take --algorithm rtn or hqq, which need none"
# Bytes that key-value caches may take, where no limit is given.
_CACHE_BYTES = 1 << 29
# Tokens that a model is tried on, and how far logits may be off, of the largest: float16 is off by a thousandth.
_TRIED, _TOLERANCE = 8, 1e-2


@dataclass(frozen=True)
class Means:
    """How to make rows.

    Attributes:
        length: Tokens of a row, where the model does not fix that number.
        seed: Determines all values.
        provider: Execution provider that the model writes on.
        threads: Threads.
        max_memory: Bytes, or None.
        progress: Called with (label, done, total), or None.
    """

    length: int
    seed: int
    provider: str
    threads: int
    max_memory: int | None = None
    progress: Callable[[str, int, int], None] | None = None

    def sessions(self, model: ir.Model) -> Sessions:
        """How a model is run: packed, which is a copy of its weights, where there is memory for that."""
        weights = (value.const_value for value in model.graph.initializers.values())
        size = sum(weight.nbytes for weight in weights if weight is not None)
        return Sessions(self.provider, self.threads, packed=self.max_memory is None or 2 * size < self.max_memory)

    def tick(self, label: str) -> Callable[[int, int], None]:
        """Reports the progress of something."""
        progress = self.progress
        return lambda done, total: None if progress is None else progress(label, done, total)


def synthetic_rows(model: ir.Model, inputs: ModelInputs, rows: int, means: Means) -> tuple[Source, str]:
    """Make rows of data.

    Args:
        model: As it was loaded; it is not changed.
        inputs: Its inputs.
        rows: How many.
        means: How.

    Returns:
        The rows, and how they were made, to come behind their number.

    Raises:
        CalibrationError: The model is of neither kind.
        PassError: PyTorch is missing.
    """
    work = model.clone()
    common.InlinePass()(work)
    common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(work)
    if inputs.ids is not None:
        return _text(work, inputs, rows, means)
    return _distilled(work, inputs, rows, means)


# --- text -----------------------------------------------------------------------------------------


def _text(model: ir.Model, inputs: ModelInputs, rows: int, means: Means) -> tuple[Source, str]:
    spec = inputs.need_ids("text that the model writes")
    logits = _logits(model)
    width = spec.shape[1]
    length = width if isinstance(width, int) else means.length
    settings = TextSettings()
    decoder, known = _decoder(model, inputs, logits, min(length, settings.text), means)
    vocabulary = min(known, inputs.vocabulary or known)
    count = rows * spec.shape[0] if isinstance(spec.shape[0], int) else rows
    memory = means.max_memory // 2 if means.max_memory else _CACHE_BYTES
    ids = write_rows(
        decoder, count, length, vocabulary, settings, seed=means.seed, memory=memory, tick=means.tick("writing text")
    )
    size = min(length, settings.text, decoder.longest or length)
    how = f"that the model wrote itself (texts of {size} tokens at temperature {settings.temperature:g})"
    return TokenRows(_LABEL, ids, None, inputs), how


def _logits(model: ir.Model) -> str:
    """The output that chooses among words."""
    found = [
        value
        for value in model.graph.outputs
        if value.name and (value.shape is None or len(value.shape) == 3) and value.dtype is not None
        and value.dtype.is_floating_point()
    ]  # fmt: skip
    for value in found:
        if value.name == "logits":
            return value.name
    known = {site.rows for site in find_sites(model)[0] if site.role == "embedding"}
    same = [value for value in found if value.shape is not None and value.shape[-1] in known]
    if len(same) == 1 and same[0].name:
        return same[0].name
    raise CalibrationError(
        "synthetic data for a model of token ids is text that it writes, which takes an output with logits [B, S, V], "
        f"called 'logits' or as wide as the vocabulary; its outputs are "
        f"{', '.join(repr(value.name) for value in model.graph.outputs)}; {_OTHERWISE}"
    )


def _decoder(model: ir.Model, inputs: ModelInputs, logits: str, length: int, means: Means) -> tuple[Decoder, int]:
    """What writes, and the number of words that it chooses among."""
    how = means.sessions(model)
    caches = cache_outputs(model, inputs)
    if caches:
        cached = CachedDecoder(model, inputs, logits, caches, how)
        return cached, cached.logits(np.zeros((1, 1), np.int64)).shape[-1]
    plain = PlainDecoder(model, inputs, logits, how)
    ids = np.arange(2 * _TRIED).reshape(2, -1) % (inputs.vocabulary or 2)
    ids[1, : _TRIED // 2] = ids[0, : _TRIED // 2]
    expected = plain.all_logits(ids)
    _check_causal(expected[:, : _TRIED // 2])
    if inputs.ids is not None and not any(isinstance(size, int) for size in inputs.ids.shape):
        del plain  # two sessions would hold two copies of the weights
        stepped = stepped_decoder(model, inputs, logits, length, how, ids, expected)
        if stepped is not None:
            return stepped, expected.shape[-1]
        plain = PlainDecoder(model, inputs, logits, how)
    return plain, expected.shape[-1]


def _check_causal(logits: np.ndarray) -> None:
    """Raise CalibrationError where tokens that are the same in two texts are answered differently, ``[2, T, V]``."""
    off = float(np.abs(logits[0] - logits[1]).max())
    if not off <= _TOLERANCE * float(np.abs(logits).max()):
        raise CalibrationError(
            "synthetic data for a model of token ids is text that it writes, but what this one answers at a token "
            f"hangs on the tokens behind it: it reads whole texts and writes none; {_OTHERWISE}"
        )


# --- inputs by the statistics of batch normalizations ---------------------------------------------


def _distilled(model: ir.Model, inputs: ModelInputs, rows: int, means: Means) -> tuple[Source, str]:
    spec = _only_float(model, inputs)
    require_torch("making calibration data", "or give data with --calibration")
    from qcompiler.synthetic.zeroq import Settings, batch_norms, distil

    norms = batch_norms(model)
    first, *rest = made_up_shape(spec)
    fixed = isinstance(spec.shape[0], int)
    settings = Settings(batch=first) if fixed else Settings()
    made = distil(
        model, norms, spec.name, rest, rows * first if fixed else rows, settings,
        seed=means.seed, threads=means.threads, tick=means.tick("making inputs"),
    )  # fmt: skip
    how = (
        f"made to have the statistics of {len(norms)} batch normalizations ({settings.steps} steps, loss a channel "
        f"{made.first:.3g} before and {made.last:.3g} after)"
    )
    arrays = made.rows.astype(numpy_dtype(spec)).reshape(-1, first if fixed else 1, *rest)
    return array_rows(_LABEL, spec.name, arrays, inputs), how


def _only_float(model: ir.Model, inputs: ModelInputs) -> InputSpec:
    """The input to make, of a model whose batch normalizations can be used.

    Raises:
        CalibrationError: It has none, or other inputs.
    """
    wanted = "synthetic data needs token ids with logits [B, S, V], or one float input and BatchNormalization nodes"
    norms = any(node.op_type == "BatchNormalization" for node in model.graph)
    listed = ", ".join(f"'{spec.name}' ({spec.dtype})" for spec in inputs.specs.values())
    if len(inputs.specs) != 1 or "float" not in next(iter(inputs.specs.values())).dtype:
        raise CalibrationError(f"{wanted}; this model's inputs are {listed}; {_OTHERWISE}")
    if not norms:
        raise CalibrationError(
            f"{wanted}, whose statistics tell what the model was trained on; this model has none (exporters fold them "
            f"into convolutions unless told not to); {_OTHERWISE}"
        )
    return next(iter(inputs.specs.values()))
