"""What watches passes: memory, size, dumps and time."""

import mmap
import time

import numpy as np
import onnx
import pytest

from qcompiler import instruments
from qcompiler.instruments import Dump, MemoryMeter, SizeDelta, Timing, anonymous_bytes, stored_bytes
from qcompiler.passes import load
from qcompiler.passes.base import QuantPassResult
from tests.builders import apply, context, decoder, linear_model, normal, parse, quantized, run, the_site


def watched(instrument, name, model, ctx):
    step = load(name)(ctx)
    instrument.before_pass(step, model)
    result = step(model)
    instrument.after_pass(step, model, result)
    return result


def touched(count):
    """Fresh anonymous memory, each page written to; an array might get memory that the process has had all along."""
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:: mmap.PAGESIZE] = b"x" * (count // mmap.PAGESIZE)
    return memory


def test_anonymous_memory_is_what_is_written_to():
    before = anonymous_bytes()
    with touched(64 << 20):
        grown = anonymous_bytes() - before
    assert (60 << 20) < grown < (80 << 20)


def test_without_proc_the_peak_is_taken(monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(instruments.Path, "read_text", fail)
    assert anonymous_bytes() > 10e6


def test_a_lap_is_the_peak_since_the_last_one():
    with MemoryMeter(0.002) as meter:
        base = meter.lap()
        with touched(64 << 20):
            time.sleep(0.05)
        assert meter.lap() > base + (50 << 20)
        time.sleep(0.02)
        assert meter.lap() < base + (50 << 20)
    assert meter.peak_bytes > base + (50 << 20)
    assert not meter._thread.is_alive()


def test_stored_bytes_count_each_tensor_once_and_codes_for_what_they_are():
    model = linear_model(64, 24, bias=True)
    assert stored_bytes(model) == 4 * (64 * 24 + 24)
    quantized(model, context(scheme="w4a16-g32-asym"))
    # 64 codes of 4 bits, 2 scales of 4 bytes, 2 zero points in a byte, a row.
    assert stored_bytes(model) == 24 * (32 + 8 + 1) + 4 * 24
    assert stored_bytes(model) - 4 * 24 == the_site(model).quantized.stored_bytes


def test_stored_bytes_look_into_bodies():
    text = """g (bool p, float[8] x) => (float[8] y) {
        y = If (p) <then_branch = yes () => (float[8] s) { s = Add(x, own) },
            else_branch = no () => (float[8] t) { t = Add(x, w) }>
    }"""
    model = parse(text, {"yes.own": normal(8, 1), "w": normal(8, 2)})
    assert stored_bytes(model) == 64


def test_untied_weights_count_once_until_they_are_quantized():
    text = "g (float[B,64] x) => (float[B,64] y) { [a] h = MatMul(x, w) r = Relu(w) y = MatMul(h, r) }"
    model = parse(text, {"w": normal((64, 64), 1)})
    before = stored_bytes(model)
    apply("assign_scheme", model)
    assert len(model.graph.initializers) == 2
    assert stored_bytes(model) == before


def test_size_deltas_are_the_differences_of_stored_bytes():
    model = linear_model(64, 24)
    ctx = context(scheme="w4a16-g32-asym")
    delta = SizeDelta()
    for name in ("assign_scheme", "rtn", "fuse_matmul_nbits", "cleanup"):
        watched(delta, name, model, ctx)
    codes = 24 * (32 + 8 + 1)
    # Lowering adds constants, and cleanup removes the weight that they were made from.
    assert delta.deltas == {
        "assign_scheme": 0, "rtn": codes - 4 * 64 * 24, "fuse_matmul_nbits": codes, "cleanup": -codes,
    }  # fmt: skip
    assert stored_bytes(model) == codes


def test_time_is_taken_for_each_pass(caplog):
    timing = Timing()
    step = load("cleanup")(context())
    model = linear_model()
    with caplog.at_level("INFO", logger="qcompiler.instruments"):
        timing.before_pass(step, model)
        time.sleep(0.01)
        timing.after_pass(step, model, QuantPassResult(model, False))
    assert 0.01 <= timing.seconds["cleanup"] < 5
    assert [record.message for record in caplog.records] == [
        f"cleanup: {timing.seconds['cleanup']:.2f} s, 0 records",
    ]


@pytest.mark.parametrize("build", [linear_model, lambda: decoder(1)])
def test_dumps_are_models_that_run_after_every_pass(tmp_path, build):
    """A quantized weight is written as the float weight that it stands for."""
    model = build()
    is_decoder = len(model.graph.inputs) == 2
    ones = np.ones((1, 3), np.int64)
    feeds = {"input_ids": ones, "attention_mask": ones} if is_decoder else {"x": normal((2, 64), 1)}
    ctx = context(scheme="w4a16-g32-asym")
    dump = Dump(tmp_path / "new" / "dumps")
    for name in ("canonicalize", "assign_scheme", "rtn", "fuse_matmul_nbits", "fuse_gather", "cleanup"):
        watched(dump, name, model, ctx)
        (path,) = sorted((tmp_path / "new" / "dumps").glob(f"*-{name}.onnx"))
        (now,) = run(model, feeds)
        onnx.checker.check_model(onnx.load(path), full_check=False)
        assert np.array_equal(run(path.read_bytes(), feeds)[0], now)
    assert sorted(path.name for path in (tmp_path / "new" / "dumps").iterdir()) == [
        "00-canonicalize.onnx", "01-assign_scheme.onnx", "02-rtn.onnx",
        "03-fuse_matmul_nbits.onnx", "04-fuse_gather.onnx", "05-cleanup.onnx",
    ]  # fmt: skip
