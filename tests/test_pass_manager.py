"""Passes run in order between instruments, and a failure says how to see it again."""

import numpy as np
import pytest

from qcompiler.errors import ModelError, PassError, SchemeError
from qcompiler.instruments import Legality, MemoryMeter
from qcompiler.pass_manager import PassManager
from qcompiler.passes.base import QuantPass, QuantPassResult, Stage
from qcompiler.records import SiteRecord
from tests.builders import context, decoder, linear_model, run, text_of, token_batches


class Steps(QuantPass):
    """A pass that does what the test wants."""

    name = "step"
    stage = Stage.CANONICALIZE

    def __init__(self, act, name="step"):
        super().__init__(context())
        self.act, self.name = act, name

    def call(self, model):
        return self.act(model)


def nothing(model):
    return QuantPassResult(model, False, ())


def recorded(model):
    return QuantPassResult(model, True, (SiteRecord("fc", "skipped", reason="just so"),))


class Diary:
    """An instrument that writes down what it sees."""

    def __init__(self, name, pages):
        self.name, self.pages = name, pages

    def before_pass(self, step, model):
        self.pages.append((self.name, "before", step.name))

    def after_pass(self, step, model, result):
        self.pages.append((self.name, "after", step.name, result.modified))

    def pass_failed(self, step, model, error):
        self.pages.append((self.name, "failed", step.name, type(error).__name__))


def run_passes(steps, instruments=(), model=None):
    model = model if model is not None else linear_model()
    with MemoryMeter() as meter:
        return PassManager(steps, instruments).run(model, meter)


def test_reports_say_what_each_pass_did():
    first, second = run_passes([Steps(nothing, "one"), Steps(recorded, "two")])
    assert (first.name, first.modified, first.records) == ("one", False, ())
    assert (second.name, second.modified) == ("two", True)
    assert second.records[0].reason == "just so"
    for report in (first, second):
        assert 0 <= report.seconds < 10
        # An interpreter with numpy has tens of megabytes to itself.
        assert 10e6 < report.peak_bytes < 100e9


def test_a_pass_that_runs_twice_is_reported_twice():
    reports = run_passes([Steps(nothing), Steps(recorded)])
    assert [(report.name, report.modified) for report in reports] == [("step", False), ("step", True)]


def test_instruments_see_passes_in_order_and_results_in_reverse():
    pages = []
    run_passes([Steps(nothing, "one"), Steps(recorded, "two")], [Diary("a", pages), Diary("b", pages)])
    assert pages == [
        ("a", "before", "one"), ("b", "before", "one"), ("b", "after", "one", False), ("a", "after", "one", False),
        ("a", "before", "two"), ("b", "before", "two"), ("b", "after", "two", True), ("a", "after", "two", True),
    ]  # fmt: skip


def test_no_pass_runs_after_one_that_failed():
    pages, ran = [], []

    def fail(model):
        raise ValueError("too bad")

    steps = [Steps(nothing, "one"), Steps(fail, "two"), Steps(lambda model: ran.append(model), "three")]
    with pytest.raises(PassError) as caught:
        run_passes(steps, [Diary("a", pages)])
    assert str(caught.value) == "two: ValueError: too bad; reproduce with --pipeline 'one,two' -vv"
    assert isinstance(caught.value.__cause__, ValueError)
    assert ran == []
    assert pages[-1][:3] == ("a", "failed", "two")


@pytest.mark.parametrize("kind", [ModelError, SchemeError])
def test_errors_that_are_the_users_to_mend_come_as_they_are(kind):
    pages = []

    def fail(model):
        raise kind("mend this")

    with pytest.raises(kind, match=r"^mend this$"):
        run_passes([Steps(fail)], [Diary("a", pages)])
    assert pages[-1] == ("a", "failed", "step", kind.__name__)


def test_an_instrument_that_objects_makes_the_pass_fail():
    def break_model(model):
        model.graph.initializers.pop("w")
        return QuantPassResult(model, True)

    pages = []
    with pytest.raises(PassError, match=r"^step: 'fc' \(MatMul\) reads 'w', which nothing computes"):
        run_passes([Steps(break_model)], [Diary("a", pages), Legality()])
    assert pages == [("a", "before", "step"), ("a", "failed", "step", "PassError")]


@pytest.mark.parametrize("answer", [None, 3])
def test_a_pass_has_to_return_a_result(answer):
    with pytest.raises(PassError, match="step: "):
        run_passes([Steps(lambda model: answer)])


def test_a_pipeline_is_printed_with_its_options():
    from qcompiler import pipeline

    ctx = context()
    text = "canonicalize,assign_scheme,rtn{clip=True},cleanup"
    assert str(PassManager(pipeline.build(ctx.config, ctx, text=text))) == text


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_between_any_two_passes_the_model_runs(algorithm):
    """The first decision of the design; here on a decoder, whose result moves only where weights are rounded."""
    from qcompiler import pipeline
    from qcompiler.scheme import Scheme
    from qcompiler.scheme_plan import SchemePlan

    feeds = token_batches(1)[0]
    results = {}

    class Runs(Diary):
        def after_pass(self, step, model, result):
            (results[step.name],) = run(model, feeds)
            assert [output.name for output in model.graph.outputs] == ["logits"]

    scheme = Scheme.parse("w4a16-g32-asym")
    plan = SchemePlan(scheme, scheme, scheme)
    ctx = context(plan=plan, algorithms=(algorithm,), batches=token_batches(3, seed=1))
    model = decoder(1)
    (want,) = run(model, feeds)
    run_passes(pipeline.build(ctx.config, ctx), [Legality(), Runs("a", [])], model)
    names = list(results)
    assert names == ["canonicalize", "assign_scheme", algorithm, "fuse_gather", "fuse_matmul_nbits", "cleanup"]
    for name in names[:2]:
        assert np.array_equal(results[name], want), name
    moved = np.linalg.norm(results[algorithm] - want) / np.linalg.norm(want)
    assert 0.01 < moved < 0.5
    for name in names[3:]:
        assert np.linalg.norm(results[name] - results[algorithm]) < 1e-5 * np.linalg.norm(want), name
    assert not any("MatMul(" in line and "wq" in line for line in text_of(model))
