"""What a compilation would do, against what it does."""

from dataclasses import replace

import numpy as np
import pytest

from qcompiler import pipeline
from qcompiler.config import CompileConfig
from qcompiler.driver import compile_model
from qcompiler.errors import OutputError
from qcompiler.files.loader import load_model
from qcompiler.instruments import MemoryMeter, stored_bytes
from qcompiler.pass_manager import PassManager
from qcompiler.planning import inspect_model, plan_model
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from tests.builders import context, decoder, normal, parse, serialized

TIED = """g (int64[B,S] i) => (float[B,S,512] y) {
    [embed] h = Gather(t, i) [fc] k = MatMul(h, w) r = Relu(k) u = Transpose(t) [head] y = MatMul(r, u)
}"""


def tied(rows=512):
    return parse(TIED.replace("512", str(rows)), {"t": normal((rows, 64), 1), "w": normal((64, 64), 2)})


def stored(model, folder):
    path = folder / "m.onnx"
    path.write_bytes(serialized(model))
    return path


def compiled_bytes(path, config):
    model = load_model(path)
    ctx = context(config)
    with MemoryMeter() as meter:
        PassManager(pipeline.build(config, ctx)).run(model, meter)
    return model


def constants_of(model):
    """Bytes of the constants, each piece of memory once."""
    arrays = [value.const_value.numpy() for graph in model.graphs() for value in graph.initializers.values()]
    return sum({array.__array_interface__["data"][0]: array.nbytes for array in arrays}.values())


PLANS = {
    "all of one width": SchemePlan(Scheme.parse("w8a16-g32"), Scheme.parse("w8a16-g32"), Scheme.parse("w8a16-g32")),
    "one scale a row": SchemePlan(Scheme.parse("w4a16-channel"), Scheme(8), Scheme(8)),
    "float table": SchemePlan(Scheme.parse("w4a16-g32"), None, Scheme(4)),
    "float projection": SchemePlan(Scheme.parse("w4a16-g32"), Scheme(8), None),
    "three bits": SchemePlan(Scheme.parse("w3a16-g32-sym"), Scheme(3), Scheme.parse("w3a16-g16-asym")),
    "two widths": SchemePlan(Scheme.parse("w2a16-g16-sym"), Scheme(8), Scheme(4)),
    "nothing": SchemePlan(None, None, None),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("rows", [512, 100])
def test_the_size_is_foretold_to_the_byte(tmp_path, name, rows):
    """Also where a tied table comes apart, and its float original is kept beside the codes."""
    config = CompileConfig(plan=PLANS[name], algorithms=("rtn",))
    path = stored(tied(rows), tmp_path)
    plan = plan_model(path, config)
    assert plan.bytes_before == stored_bytes(load_model(path)) == 4 * 64 * (rows + 64)
    assert plan.bytes_after == constants_of(compiled_bytes(path, config))


def test_sites_are_listed_with_scheme_kernel_and_reason(tmp_path):
    plan = SchemePlan(Scheme.parse("w4a16-g32"), None, Scheme(8), ignore=(Pattern("l0_o"),))
    result = plan_model(stored(decoder(1), tmp_path), CompileConfig(plan=plan))
    sites = {site.name: site for site in result.sites}
    assert list(sites) == ["embed", "l0_q", "l0_k", "l0_v", "l0_o", "l0_gate", "l0_up", "l0_down", "head"]
    q = sites["l0_q"]
    assert (q.scheme, q.state, q.kernel, q.reason) == ("w4a16-g32-asym", "w4a16-g32-asym", "MatMulNBits", "")
    assert (q.operator, q.rows, q.columns, q.role) == ("MatMul", 32, 32, "linear")
    assert (q.float_bytes, q.stored_bytes) == (4096, 32 * (16 + 4 + 1))
    o = sites["l0_o"]
    assert (o.scheme, o.state, o.kernel, o.reason) == ("", "float", "MatMul", "ignored (--ignore l0_o)")
    assert o.stored_bytes == o.float_bytes == 4096
    assert sites["embed"].reason == "left float (--embedding float)"
    assert sites["head"].role == "lm_head"
    assert set(sites["l0_q"].names) == {"l0_q", "wq0"}


def test_the_pipeline_is_that_of_the_compilation(tmp_path):
    path = stored(decoder(1), tmp_path)
    assert plan_model(path, CompileConfig()).pipeline == (
        "canonicalize,assign_scheme,rtn,fuse_gather,fuse_matmul_nbits,cleanup"
    )
    assert ",gptq{drift=0.5}," in plan_model(path, CompileConfig(calibration=[{}])).pipeline
    assert ",rtn{clip=True}," in plan_model(path, CompileConfig(algorithms=("rtn{clip=true}",))).pipeline


def test_calibration_takes_memory(tmp_path):
    path = stored(decoder(1), tmp_path)
    without, with_data = plan_model(path, CompileConfig()), plan_model(path, CompileConfig(calibration=[{}]))
    more = plan_model(path, CompileConfig(calibration=[{}], samples=512))
    assert 100e6 < without.memory_bytes < with_data.memory_bytes < more.memory_bytes


def test_looking_changes_no_file_and_quantizes_nothing(tmp_path):
    path = stored(decoder(1), tmp_path)
    before = path.read_bytes()
    plan_model(path, CompileConfig())
    inspect_model(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_an_inspection_lists_sites_and_counts_refusals(tmp_path):
    text = """g (float[B,64,T] x) => (float[B,64,T] y) {
        [one] a = Conv <pads = [1, 1]> (x, w) [two] b = Conv <pads = [1, 1]> (a, w) [three] c = Conv(b, v)
        [four] d = Conv <group = 64> (c, u) y = Relu(d)
    }"""
    weights = {"w": normal((64, 64, 3), 1), "v": normal((64, 64, 1), 2), "u": normal((64, 1, 1), 3)}
    found = inspect_model(stored(parse(text, weights), tmp_path))
    assert [(site.name, site.role) for site in found.sites] == [
        ("one", "conv"), ("two", "conv"), ("three", "linear"), ("four", "conv"),
    ]  # fmt: skip
    assert {site.state for site in found.sites} == {"float"}
    assert found.refusals == ()
    megabytes = 4 * (64 * 64 * 4 + 64) / 1e6
    assert found.headline == (
        "m.onnx: 5 nodes, IR version 10, opset ai.onnx 21, com.microsoft 1, "
        f"{megabytes:.1f} MB of constants, 4 sites that can be quantized"
    )


def test_an_inspection_lists_the_names_of_products(tmp_path):
    found = inspect_model(
        stored(parse("g (float[B,8] x) => (float[B,B] y) { t = Transpose(x) [qk] y = MatMul(x, t) }"), tmp_path)
    )
    assert found.products == (("qk",),)


def test_a_summary_counts_by_role_operator_and_state(tmp_path):
    found = inspect_model(stored(decoder(2), tmp_path))
    linear = 2 * 4 * (4 * 32 * 32 + 3 * 32 * 48) / 1e6
    table = 4 * 512 * 32 / 1e6
    rows = [(role, operator, count, state) for role, operator, count, _, state in found.summary()]
    assert rows == [
        ("embedding", "Gather", 1, "float"),
        ("linear", "MatMul", 14, "float"),
        ("lm_head", "MatMul", 1, "float"),
    ]
    assert [megabytes for *_, megabytes, _ in found.summary()] == pytest.approx([table, linear, table])


def test_a_weight_that_several_sites_read_counts_once(tmp_path):
    found = inspect_model(stored(tied(), tmp_path))
    assert [(site.name, site.float_bytes) for site in found.sites] == [
        ("embed", 4 * 512 * 64),
        ("fc", 4 * 64 * 64),
        ("head", 0),
    ]
    assert np.sum([site.stored_bytes for site in found.sites]) == 4 * 64 * (512 + 64)


# Formats for a budget.


def test_with_a_budget_the_plan_has_the_formats_and_the_curve(tmp_path):
    tokens = [{"i": np.random.default_rng(row).integers(0, 512, (1, 24))} for row in range(4)]
    config = CompileConfig(calibration=tokens, max_size=40_000, algorithms=("gptq",))
    path = stored(tied(), tmp_path)
    plan = plan_model(path, config)
    assert len({site.scheme for site in plan.sites}) == 2
    assert plan.bytes_after <= 40_000
    (chosen,) = (point for point in plan.curve if point.chosen)
    assert chosen.bytes == sum(site.stored_bytes for site in plan.sites)
    result = compile_model(path, config=replace(config, pareto=tmp_path / "curve.svg"), output=tmp_path / "o.onnx")
    assert result.report.curve == plan.curve
    assert (tmp_path / "curve.svg").read_bytes().startswith(b"<?xml")
    assert tmp_path / "curve.svg" in result.files


def test_without_a_budget_nothing_is_measured(tmp_path):
    plan = plan_model(stored(tied(), tmp_path), CompileConfig(calibration="nothing.npy"))
    assert plan.curve == ()


def test_a_drawing_that_is_there_is_kept(tmp_path):
    drawing = tmp_path / "curve.svg"
    drawing.write_text("mine")
    config = CompileConfig(calibration="nothing.npy", max_size=40_000, pareto=drawing)
    with pytest.raises(OutputError, match=r"curve\.svg"):
        compile_model(stored(tied(), tmp_path), config=config)
    assert drawing.read_text() == "mine"
