"""Sessions: providers, constants that are fed, and errors in one line."""

import gc

import numpy as np
import onnx
import pytest
from threadpoolctl import threadpool_info

from qcompiler.errors import KernelError
from qcompiler.session import InputSpec, OrtRunner, cpu_threads, single_threaded_blas
from tests.builders import linear_model, normal, parse, serialized

TEXT = "g (float[B,8] x, int64[2] n) => (float[B,4] y, int64[2] m) { y = MatMul(x, w) m = Neg(n) }"
FEEDS = {"x": normal((3, 8), 1), "n": np.array([1, 2])}


def model_bytes():
    return serialized(parse(TEXT, {"w": normal((8, 4), 0)}))


def fed_bytes():
    """The same with the weight as an input."""
    return serialized(parse(TEXT.replace("(float[B,8] x", "(float[8,4] w, float[B,8] x")))


def test_outputs_are_those_asked_for_and_by_default_all():
    runner = OrtRunner(model_bytes())
    assert runner.outputs == ["y", "m"]
    results = runner.run(FEEDS)
    assert np.allclose(results["y"], FEEDS["x"] @ normal((8, 4), 0), rtol=1e-6, atol=1e-6)
    assert results["m"].tolist() == [-1, -2]
    assert list(runner.run(FEEDS, ["m"])) == ["m"]


def test_inputs_are_described_and_constants_are_not_among_them():
    assert OrtRunner(model_bytes()).inputs == [InputSpec("x", "float32", ("B", 8)), InputSpec("n", "int64", (2,))]
    runner = OrtRunner(fed_bytes(), constants={"w": normal((8, 4), 0)})
    assert [spec.name for spec in runner.inputs] == ["x", "n"]


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("prepack", [True, False])
def test_fed_constants_compute_what_built_in_ones_do(optimize, prepack):
    constants = {"w": normal((8, 4), 0)}
    fed = OrtRunner(fed_bytes(), constants=constants, optimize=optimize, prepack=prepack, threads=1)
    built_in = OrtRunner(model_bytes(), optimize=optimize, prepack=prepack, threads=1)
    assert np.allclose(fed.run(FEEDS)["y"], built_in.run(FEEDS)["y"], rtol=1e-6, atol=1e-6)


def test_arrays_of_any_layout_are_fed():
    x = np.asfortranarray(FEEDS["x"])
    w = np.asfortranarray(normal((8, 4), 0))
    assert not w.flags.c_contiguous
    got = OrtRunner(fed_bytes(), constants={"w": w}).run({**FEEDS, "x": x[::-1]})
    assert np.allclose(got["y"], FEEDS["x"][::-1] @ w, rtol=1e-6, atol=1e-6)
    odd = np.frombuffer(b"\0" + FEEDS["x"].tobytes(), np.uint8)[1:].view(np.float32).reshape(3, 8)
    assert not odd.flags.aligned
    assert np.allclose(OrtRunner(model_bytes()).run({**FEEDS, "x": odd})["y"], FEEDS["x"] @ w, rtol=1e-6, atol=1e-6)


def test_bfloat16_goes_in_and_comes_out():
    import ml_dtypes

    text = """g (bfloat16[B,8] x, bfloat16[8,4] w) => (bfloat16[B,8] y, float[8,4] v) {
        y = Identity(x) v = Cast <to = 1> (w) }"""
    x, w = (normal(shape, 1).astype(ml_dtypes.bfloat16) for shape in ((3, 8), (8, 4)))
    runner = OrtRunner(serialized(parse(text)), constants={"w": w})
    assert [spec.dtype for spec in runner.inputs] == ["bfloat16"]
    results = runner.run({"x": x[::-1]})
    del runner
    gc.collect()
    assert results["y"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(results["y"], x[::-1])
    assert np.array_equal(results["v"], w.astype(np.float32))
    assert OrtRunner(serialized(parse(text)), constants={"w": w}).run({"x": x[:0]})["y"].shape == (0, 8)


def test_a_path_finds_its_external_data(tmp_path):
    from tests.stored_models import externalize, linear

    path = externalize(linear(8, 4), tmp_path / "m.onnx")
    (y,) = OrtRunner(path).run({"x": np.ones((2, 8), np.float32)}).values()
    assert y.shape == (2, 4)


def test_a_provider_that_is_not_there_is_an_error_and_no_fall_back():
    with pytest.raises(
        KernelError, match=r"provider NoSuchProvider is not in this ONNX Runtime; it has .*CPUExecution"
    ):
        OrtRunner(model_bytes(), provider="NoSuchProvider")


def test_a_model_that_cannot_be_loaded_is_an_error_in_one_line(tmp_path):
    bad = serialized(parse("g (float[B,8] x) => (float[B,8] y) { y = NoSuchOperator(x) }"))
    with pytest.raises(KernelError, match=r"ONNX Runtime .* cannot load a part of the model.*NoSuchOperator") as caught:
        OrtRunner(bad)
    assert "\n" not in str(caught.value)
    (tmp_path / "bad.onnx").write_bytes(bad)
    with pytest.raises(KernelError, match=r"cannot load '.*bad\.onnx'"):
        OrtRunner(tmp_path / "bad.onnx")


def test_a_run_that_fails_is_an_error_in_one_line():
    with pytest.raises(KernelError, match="ONNX Runtime cannot run the model: ") as caught:
        OrtRunner(model_bytes()).run({**FEEDS, "x": np.zeros((3, 9), np.float32)})
    assert "\n" not in str(caught.value)


def test_threads_are_those_asked_for_or_all(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5})
    assert cpu_threads(0) == 3
    assert cpu_threads(7) == 7


def test_blas_has_one_thread_inside_and_its_own_number_outside():
    _ = np.ones((2, 2)) @ np.ones((2, 2))

    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = threads()
    assert before
    with single_threaded_blas():
        assert set(threads()) == {1}
    assert threads() == before


def test_many_runs_of_one_session_give_the_same_bytes():
    model = linear_model(64, 32)
    runner = OrtRunner(serialized(model), threads=1)
    x = normal((5, 64), 2)
    results = {runner.run({"x": x})["y"].tobytes() for _ in range(5)}
    assert len(results) == 1


def test_the_graph_that_runs_can_be_saved(tmp_path):
    path = tmp_path / "optimized.onnx"
    weight = np.ones((64, 64), np.float32)
    model = linear_model(64, 64, bias=True)
    with OrtRunner(serialized(model), threads=1, optimized=path) as runner:
        runner.run({"x": weight})
    saved = onnx.load(path, load_external_data=False)
    assert [node.op_type for node in saved.graph.node] == ["FusedGemm"] or len(saved.graph.node) < 2
    assert (tmp_path / "optimized.onnx.data").stat().st_size >= weight.nbytes
