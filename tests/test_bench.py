from types import SimpleNamespace

import numpy as np
import pytest
from onnx import helper, numpy_helper

from qcompiler import bench as bench_module
from qcompiler.bench import bench
from qcompiler.errors import KernelError
from tests.stored_models import linear, make_model, value, write


def chain(layers, name="x"):
    """`layers` products with a weight [256, 256]."""
    weight = numpy_helper.from_array(np.eye(256, dtype=np.float32), "w")
    names = [name, *(f"v{layer}" for layer in range(1, layers)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], "w"], [names[i + 1]]) for i in range(layers)]
    return make_model(nodes, [value(name, (256, 256))], [value("y", (256, 256))], [weight]).SerializeToString()


FEEDS = {"x": np.ones((256, 256), np.float32)}


def test_more_work_takes_longer():
    short, long = bench([chain(1), chain(40)], FEEDS, repeat=5, threads=1)
    assert short.ratio == short.ratio_low == short.ratio_high == 1
    assert long.seconds > short.seconds
    assert 3 < long.ratio_low <= long.ratio <= long.ratio_high


@pytest.fixture
def order(monkeypatch):
    """Models that take as long as they are told, and the order in which they ran."""
    ran, now = [], [0.0]

    class Runner:
        inputs = ()

        def __init__(self, model, **_):
            self.seconds = model

        def run(self, feeds):
            ran.append(self.seconds)
            now[0] += next(self.seconds) if hasattr(self.seconds, "__next__") else self.seconds

    monkeypatch.setattr(bench_module, "OrtRunner", Runner)
    monkeypatch.setattr(bench_module, "_operators", lambda model: None)
    monkeypatch.setattr(bench_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return ran


def test_models_take_turns_in_a_rotating_order(order):
    first, second = bench([1.0, 3.0], {}, repeat=2, warmup=1)
    assert order == [1.0, 3.0, 3.0, 1.0, 1.0, 3.0]
    assert (first.seconds, second.seconds, second.ratio) == (1.0, 3.0, 3.0)


def test_a_machine_that_slows_down_leaves_the_ratio_alone(order):
    slower = [1.0, 2.0, 4.0, 8.0]
    first, second = bench([iter(slower), iter([2 * s for s in slower])], {}, repeat=4, warmup=0)
    assert first.seconds == 3.0
    assert (second.ratio_low, second.ratio, second.ratio_high) == (2.0, 2.0, 2.0)


def test_one_round_is_enough(order):
    (only,) = bench([1.0], {}, repeat=1, warmup=0)
    assert tuple(only) == (1.0, 1.0, 1.0, 1.0)


def test_files_are_timed_and_fed_what_they_need(tmp_path):
    path = write(linear(), tmp_path / "model.onnx")
    (found,) = bench([path], {"x": np.ones((2, 8), np.float32), "more": np.ones(1)}, repeat=2)
    assert found.seconds > 0


def test_a_model_with_another_input_is_an_error(tmp_path):
    path = tmp_path / "other.onnx"
    path.write_bytes(chain(1, name="z"))
    with pytest.raises(KernelError, match=r"other\.onnx needs the input 'z'"):
        bench([chain(1), path], FEEDS)


def test_no_round_begins_after_the_time_is_up(order):
    bench([1.0, 3.0], {}, repeat=50, warmup=1, seconds=17.0)
    assert len(order) == 2 * (1 + 4)
    order.clear()
    bench([1.0, 3.0], {}, repeat=50, warmup=1, seconds=0.0)
    assert len(order) == 2 * (1 + 3)
