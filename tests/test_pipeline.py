"""Pipelines as text, their order, and what cannot be one."""

import pytest

from qcompiler import passes, pipeline
from qcompiler.config import CompileConfig
from qcompiler.errors import SchemeError
from qcompiler.options import NoOptions
from qcompiler.passes.base import WEIGHTS, QuantPass, Stage
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from tests.builders import context


def text_of(steps):
    return ",".join(map(str, steps))


def build(text=None, **options):
    config = CompileConfig(**options)
    return pipeline.build(config, context(config), text=text)


TEXTS = [
    "rtn",
    "canonicalize,assign_scheme,rtn{clip=True},fuse_matmul_nbits,fuse_gather,cleanup",
    "gptq{percdamp=0.02,act_order=False,refine=2},cleanup",
    "cleanup,canonicalize",  # taken as it stands
    "rtn,rtn{clip=True}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_passes_are_inverse(text):
    steps = build(text)
    assert text_of(steps) == text
    assert text_of(build(text_of(steps))) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("  rtn { clip = true } , cleanup ", "rtn{clip=True},cleanup"),
        ("rtn{}", "rtn"),
        ("rtn{clip=false}", "rtn"),  # options at their defaults are not written
        ("gptq{lazy_block=128,percdamp=1e-2}", "gptq{percdamp=0.01}"),
        ("rtn,", "rtn"),
    ],
)
def test_text_may_be_written_in_other_ways(text, canonical):
    assert text_of(build(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no pass is called 'nothing'; known passes: "),
        ("base", "no pass is called 'base'"),
        ("rtn cleanup", "'rtn cleanup' is not understood; expected name or name{option=value,...}, comma-separated"),
        ("cleanup,rtn{clip=true", "'rtn{clip=true' is not understood"),
        ("rtn}", "'rtn}' is not understood"),
        ("RTN", "'RTN' is not understood"),
        (",", "',' is not understood"),
        (" ", "' ' is not understood"),
        ("rtn{clip}", "option 'clip' of rtn has no value; write option=value"),
        ("rtn{clip=}", "option 'clip=' of rtn has no value"),
        ("rtn{clip=2}", "pass rtn: option clip=2 is not a bool"),
        ("gptq{refine=1.5}", "pass gptq: option refine=1.5 is not a int"),
        ("rtn{group=3}", "pass rtn has no option 'group'; it has: clip"),
        ("cleanup{deep=true}", "pass cleanup has no option 'deep'; it has: none"),
    ],
)
def test_what_is_no_pipeline_is_refused_where_it_goes_wrong(text, message):
    with pytest.raises(SchemeError) as caught:
        build(text)
    assert message in str(caught.value)


def test_the_configuration_implies_the_passes_and_their_order():
    assert text_of(build(algorithms=("rtn",))) == (
        "canonicalize,assign_scheme,rtn,fuse_gather,fuse_matmul_nbits,cleanup"
    )
    assert text_of(build(algorithms=("gptq{percdamp=0.02}",))).split(",")[2] == "gptq{percdamp=0.02}"
    qdq = [step.name for step in build(algorithms=("rtn",), output_format="qdq")]
    assert "fuse_matmul_nbits" not in qdq
    assert "fuse_gather" not in qdq
    assert "export_qdq" in qdq


ALGORITHMS = {
    # scheme: the algorithms without a name and with calibration data
    "w4a16": ("gptq{drift=0.5}",),
    "w4a8": ("gptq{drift=0.5}",),  # the kernel quantizes what it reads
    "w8a8-dynamic-token": ("smoothquant", "gptq", "correct_bias"),
    "w8a8-static": ("smoothquant", "gptq", "correct_bias"),
}


@pytest.mark.parametrize("scheme", ALGORITHMS)
def test_algorithms_follow_from_the_schemes_and_the_data(scheme):
    config = CompileConfig(plan=SchemePlan(Scheme.parse(scheme)))
    assert pipeline.default_algorithms(config, calibrated=True) == ALGORITHMS[scheme]
    assert pipeline.default_algorithms(config, calibrated=False) == ("rtn",)
    steps = [str(step) for step in build(plan=config.plan, algorithms=ALGORITHMS[scheme])]
    assert [step for step in steps if step in ALGORITHMS[scheme]] == list(ALGORITHMS[scheme])


@pytest.mark.parametrize(
    ("effort", "scheme", "algorithms"),
    [
        ("fast", "w4a16", ("rtn",)),
        ("balanced", "w4a16", ("gptq{drift=0.5}",)),
        ("best", "w4a16", ("awq", "reorder{gather=false}", "gptq{drift=0.8,guided=true,percdamp=0.2,refine=1}")),
        ("fast", "w8a8-static", ("smoothquant", "rtn", "correct_bias")),
        ("best", "w8a8-static", ("smoothquant", "gptq", "correct_bias")),
    ],
)
def test_effort_stands_for_algorithms(effort, scheme, algorithms):
    config = CompileConfig(plan=SchemePlan(Scheme.parse(scheme)), effort=effort)
    assert pipeline.default_algorithms(config, calibrated=True) == algorithms
    if effort != "best":
        assert pipeline.default_algorithms(config, calibrated=False) == ("rtn",)


def test_one_site_of_another_scheme_decides_too():
    override = (Pattern("fc"), Scheme.parse("w8a8-static"))
    config = CompileConfig(plan=SchemePlan(Scheme.parse("w4a16"), overrides=(override,)))
    assert pipeline.default_algorithms(config, calibrated=True) == ALGORITHMS["w8a8-static"]


def test_a_pass_that_runs_anyway_can_be_given_options():
    """It runs once, where it would have run without a name."""
    plan = SchemePlan(Scheme.parse("w8a8-static"))
    implied = text_of(build(plan=plan, algorithms=("rtn",)))
    assert ",rtn,insert_qdq,absorb_scales," in implied
    for algorithms in (("rtn", "insert_qdq{products=false}"), ("insert_qdq{products=false}", "rtn")):
        given = text_of(build(plan=plan, algorithms=algorithms))
        assert given == implied.replace("insert_qdq", "insert_qdq{products=False}")
    assert text_of(build(plan=plan, algorithms=("rtn", "insert_qdq"))) == implied


def test_algorithms_keep_the_order_in_which_they_are_named():
    names = [step.name for step in build(algorithms=("rtn", "gptq"))]
    assert [name for name in names if name in ("rtn", "gptq")] == ["rtn", "gptq"]
    names = [step.name for step in build(algorithms=("gptq", "rtn"))]
    assert [name for name in names if name in ("rtn", "gptq")] == ["gptq", "rtn"]


@pytest.mark.parametrize("name", ["cleanup", "canonicalize", "fuse_gather", "assign_scheme"])
def test_only_algorithms_can_be_named_as_such(name):
    with pytest.raises(SchemeError, match=rf"'{name}' is not an algorithm; known algorithms: .*gptq.*rtn"):
        build(algorithms=(name,))


def test_passes_are_in_the_order_of_their_stages_and_after_what_they_follow():
    names = pipeline.pass_names()
    assert sorted(names) == passes.names()
    classes = [passes.load(name) for name in names]
    stages = [cls.stage for cls in classes]
    assert stages == sorted(stages)
    weights = {cls.name for cls in classes if cls.chooses_weights}
    assert {"rtn", "gptq", "learned_rounding", "low_rank"} < weights
    for place, cls in enumerate(classes):
        follows = {*cls.after, *(weights if WEIGHTS in cls.after else ())} - {WEIGHTS}
        assert all(names.index(other) < place for other in follows)
        assert all(passes.load(other).stage <= cls.stage for other in follows)


def test_after_is_heeded_whatever_the_order_of_the_names(monkeypatch):
    def fake(name, stage, after=(), weights=False):
        return type(name, (QuantPass,), {"name": name, "stage": stage, "after": after, "chooses_weights": weights})

    classes = {
        "a": fake("a", Stage.QUANTIZE, ("c",)),
        "b": fake("b", Stage.QUANTIZE),
        "c": fake("c", Stage.QUANTIZE, ("b",)),
        "d": fake("d", Stage.PLAN),
        "e": fake("e", Stage.QUANTIZE, ("absent",)),
        "f": fake("f", Stage.QUANTIZE, (WEIGHTS,)),
        "g": fake("g", Stage.QUANTIZE, weights=True),
        "h": fake("h", Stage.QUANTIZE, ("g",), weights=True),
    }
    monkeypatch.setattr(passes, "load", classes.__getitem__)
    for names in ("abcdefgh", "hgfedcba", "fcahbged"):
        placed = "".join(name for name, _ in pipeline.order([(name, {}) for name in names]))
        assert placed[0] == "d"
        assert placed.index("b") < placed.index("c") < placed.index("a")
        assert placed.index("g") < placed.index("h") < placed.index("f")
    assert [name for name, _ in pipeline.order([("e", {}), ("b", {})])] == ["e", "b"]


@pytest.mark.parametrize("name", passes.names())
def test_every_pass_is_what_its_file_says(name):
    cls = passes.load(name)
    assert cls.name == name
    assert cls.__doc__
    assert isinstance(cls.stage, Stage)
    assert cls.scope in ("model", "segment")
    step = cls(context())
    assert str(step) == name
    assert step.options is not None
    if cls.Options is not NoOptions:
        for field in cls.Options.__dataclass_fields__.values():
            assert field.metadata["help"]
