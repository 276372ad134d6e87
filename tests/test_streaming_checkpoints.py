"""Streaming with checkpoints: what an interrupted run leaves is used, what depends on a change is done anew.

Forward passes and calls of the algorithm are counted; results are compared with those of a run without checkpoints.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import streaming, waypoints
from qcompiler.checkpoints import Checkpoints, code_version
from qcompiler.passes import base, base_segments
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.obq import Obq
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from qcompiler.segments import plan_segments
from qcompiler.session import OrtRunner, single_threaded_blas
from qcompiler.sites import find_sites
from tests.builders import apply, context, decoder, decoder_groups, normal, parse, token_batches
from tests.test_segments import branches, cross
from tests.test_streaming import stored_bytes_of

SCHEME, OTHER = Scheme.parse("w4a16-g32-asym"), Scheme.parse("w8a16-g32-asym")
GROUPS = [["embed"], *decoder_groups()]


class Stop(BaseException):
    """What stops a run, as a signal would."""


class Counted:
    """What a run did: the groups of sites that were quantized, and the batches that were run through a level."""

    def __init__(self):
        self.groups, self.runs = [], 0


def compiled(folder, model, batches, *, algorithm=Gptq, stop_at=None, scheme=None, options=None, **config):
    """Run an algorithm over a model, up to the group number `stop_at`.

    Returns:
        What was counted, the bytes that came out, the records, and the tally (None where it was stopped).
    """
    plan = SchemePlan(SCHEME, SCHEME, SCHEME, tuple((Pattern(name), OTHER) for name in scheme or ()))
    ctx = context(plan=plan, batches=batches, **config)
    store = Checkpoints(folder) if folder is not None else None
    ctx = replace(ctx, checkpoints=store)
    apply("canonicalize", model, ctx)
    apply("assign_scheme", model, ctx)
    counted = Counted()

    class Counting(algorithm):
        def _stacked(self, sites, weights, facts):
            if len(counted.groups) == stop_at:
                raise Stop
            counted.groups.append([site.name for site in sites])
            return super()._stacked(sites, weights, facts)

    class Runner(OrtRunner):
        def run(self, *arguments):
            counted.runs += 1
            return super().run(*arguments)

    with pytest.MonkeyPatch.context() as patch, single_threaded_blas():
        patch.setattr(streaming, "OrtRunner", Runner)
        try:
            result = Counting(ctx, {key: str(value) for key, value in (options or {}).items()})(model)
        except Stop:
            return counted, None, None, None
    return counted, stored_bytes_of(model), result.records, store.tally if store is not None else None


@pytest.fixture
def batches():
    return token_batches()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Every boundary is stored."""
    monkeypatch.setattr(waypoints, "_PATIENCE", 0.0)
    monkeypatch.setattr("qcompiler.checkpoints._SHARE", 0)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("algorithm", "options"), [(Gptq, {}), (Gptq, {"drift": 0.5, "refine": 1}), (Obq, {})])
def test_a_second_run_runs_nothing(tmp_path, batches, algorithm, options, threads):
    """The same bytes and records as without checkpoints; only results stay in the folder, one file a group."""
    _, plain, records, tally = compiled(None, decoder(), batches, algorithm=algorithm, options=options)
    assert tally is None
    first = compiled(tmp_path, decoder(), batches, algorithm=algorithm, options=options)
    assert (first[0].groups, first[0].runs > 0) == (GROUPS, True)
    left = names(tmp_path)
    assert len(left) == len(GROUPS)
    second = compiled(tmp_path, decoder(), batches, algorithm=algorithm, options=options, threads=threads)
    assert (second[0].groups, second[0].runs) == ([], 0)
    assert first[1] == second[1] == plain
    assert first[2] == second[2] == records
    assert (first[3], second[3]) == ({algorithm.name: (0, 16)}, {algorithm.name: (16, 16)})
    assert names(tmp_path) == left


@pytest.mark.parametrize("options", [{}, {"drift": 0.5}])
@pytest.mark.parametrize("sequential", [True, False])
def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, batches, sequential, options):
    """Wherever it was stopped; the data begin at the boundary that was stored last."""
    config = {"options": options, "sequential": sequential}
    whole, plain, records, _ = compiled(None, decoder(), batches, **config)
    each = whole.runs // (len(GROUPS) - 1)  # runs to get from one level to the next
    for stop in range(len(GROUPS)):
        folder = tmp_path / str(stop)
        stopped = compiled(folder, decoder(), batches, stop_at=stop, **config)
        assert (stopped[0].groups, stopped[1]) == (GROUPS[:stop], None)
        rest = compiled(folder, decoder(), batches, **config)
        assert rest[0].groups == GROUPS[stop:]
        assert rest[1:3] == (plain, records)
        # The table has no level. The boundary of the level that was being quantized is there.
        assert rest[0].runs == (whole.runs if stop == 0 else whole.runs - stop * each)
        # The float model may have been a level ahead.
        assert 0 <= stopped[0].runs + rest[0].runs - whole.runs <= (len(batches) if options else 0)
        assert len(names(folder)) == len(GROUPS)


def test_a_run_that_is_stopped_again_and_again_comes_to_its_end(tmp_path, batches):
    _, plain, records, _ = compiled(None, decoder(), batches)
    for group in GROUPS[:-1]:
        counted, found, _, _ = compiled(tmp_path, decoder(), batches, stop_at=1)
        assert (counted.groups, found) == ([group], None)
    counted, found, again, _ = compiled(tmp_path, decoder(), batches, stop_at=1)
    assert (counted.groups, found, again) == (GROUPS[-1:], plain, records)


def test_without_patience_at_an_end_the_data_begin_anew(tmp_path, batches, monkeypatch):
    """Boundaries are stored every so often; where none is, results are used all the same."""
    monkeypatch.setattr(waypoints, "_PATIENCE", 1e9)
    whole, plain, _, _ = compiled(None, decoder(), batches)
    compiled(tmp_path, decoder(), batches, stop_at=5)
    assert len(names(tmp_path)) == 5
    counted, found, _, _ = compiled(tmp_path, decoder(), batches)
    assert (counted.groups, counted.runs, found) == (GROUPS[5:], whole.runs, plain)


def test_only_the_newest_boundary_is_kept(tmp_path, batches):
    for stop in range(2, len(GROUPS)):
        folder = tmp_path / str(stop)
        compiled(folder, decoder(), batches, stop_at=stop)
        assert len(names(folder)) == stop + 1


def test_a_boundary_that_takes_too_much_of_the_disk_is_not_stored(tmp_path, batches, monkeypatch):
    monkeypatch.setattr(Checkpoints, "has_room_for", lambda *_: False)
    compiled(tmp_path, decoder(), batches, stop_at=3)
    assert len(names(tmp_path)) == 3


def test_damaged_results_are_made_again(tmp_path, batches, caplog):
    _, plain, _, _ = compiled(tmp_path, decoder(), batches)
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    counted, found, _, _ = compiled(tmp_path, decoder(), batches)
    assert (counted.groups, found) == (GROUPS, plain)
    assert sum(record.levelname == "WARNING" for record in caplog.records) == len(GROUPS)


def test_changing_a_site_redoes_what_depends_on_it(tmp_path, batches):
    """Its own level and all that read what it computes; those that read what it reads have no part in that."""
    compiled(tmp_path, decoder(), batches)
    _, plain, records, _ = compiled(None, decoder(), batches, scheme=["l0_down"])
    counted, found, again, tally = compiled(tmp_path, decoder(), batches, scheme=["l0_down"])
    assert counted.groups == GROUPS[GROUPS.index(["l0_down"]) :]
    assert (found, again) == (plain, records)
    assert tally == {"gptq": (7, 16)}
    back, _, _, _ = compiled(tmp_path, decoder(), batches)
    assert (back.groups, back.runs) == ([], 0)  # the old results are still there


def test_sites_beside_a_changed_one_are_kept(tmp_path):
    """The encoder's second layer changes: the decoder's layers up to the one that reads it do not depend on it."""
    data = [{"x": normal((2, n, 32), n), "memory": normal((2, 9, 32), 50 + n)} for n in (3, 5)]
    compiled(tmp_path, cross()[0], data)
    _, plain, _, _ = compiled(None, cross()[0], data, scheme=["enc2"])
    counted, found, _, _ = compiled(tmp_path, cross()[0], data, scheme=["enc2"])
    assert counted.groups == [["enc2"], ["ck", "cv"], ["co"]]
    assert found == plain


def test_without_sequential_a_changed_site_is_redone_alone(tmp_path, batches):
    compiled(tmp_path, decoder(), batches, sequential=False)
    _, plain, _, _ = compiled(None, decoder(), batches, sequential=False, scheme=["l0_down"])
    counted, found, _, _ = compiled(tmp_path, decoder(), batches, sequential=False, scheme=["l0_down"])
    assert (counted.groups, found) == ([["l0_down"]], plain)


def test_sites_in_bodies_count_as_what_they_compute(tmp_path):
    data = [{"x": normal((9, 32), n), "flag": np.array(n == 1)} for n in (1, 2)]
    compiled(tmp_path, branches()[0], data)
    _, plain, _, _ = compiled(None, branches()[0], data, scheme=["inner"])
    counted, found, _, _ = compiled(tmp_path, branches()[0], data, scheme=["inner"])
    assert found == plain
    assert ["inner"] in counted.groups
    assert ["first"] not in counted.groups
    assert ["third"] in counted.groups


CHANGES = {
    "data": {"batches": token_batches(seed=1)},
    "order of data": {"batches": token_batches()[::-1]},
    "fewer data": {"batches": token_batches()[:2]},
    "options": {"options": {"percdamp": 0.01}},
    "drift": {"options": {"drift": 0.5}},
    "seed": {"seed": 7},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_everything_depends_on_redoes_everything(tmp_path, batches, name):
    """But for the table, which depends on no data."""
    compiled(tmp_path, decoder(), batches)
    config = {"batches": batches, **CHANGES[name]}
    _, plain, _, _ = compiled(None, decoder(), **config)
    counted, found, _, _ = compiled(tmp_path, decoder(), **config)
    assert counted.groups == (GROUPS[1:] if "data" in name else GROUPS)
    assert found == plain


def test_changed_code_redoes_everything(tmp_path, batches, monkeypatch):
    compiled(tmp_path, decoder(), batches)
    for module in (waypoints, base_segments):
        monkeypatch.setattr(module, "code_version", lambda: code_version() + "x")
    assert compiled(tmp_path, decoder(), batches)[0].groups == GROUPS


def test_changed_weights_redo_what_depends_on_them(tmp_path, batches):
    compiled(tmp_path, decoder(), batches)

    def changed():
        model = decoder()
        weight = next(value for value in model.graph.initializers.values() if value.name == "wd0")
        array = np.array(weight.const_value.numpy())
        array[0, 0] += 1
        weight.const_value = ir.Tensor(array, name="wd0")
        return model

    counted, found, _, _ = compiled(tmp_path, changed(), batches)
    assert counted.groups == GROUPS[GROUPS.index(["l0_down"]) :]
    assert found == compiled(None, changed(), batches)[1]


def test_two_runs_share_a_folder(tmp_path, batches):
    """One begins, another one goes past it, and the first goes on with what that one has left."""
    _, plain, _, _ = compiled(None, decoder(), batches)
    compiled(tmp_path, decoder(), batches, stop_at=4)
    compiled(tmp_path, decoder(), batches, stop_at=3, options={"percdamp": 0.01})
    counted, found, _, _ = compiled(tmp_path, decoder(), batches)
    assert (counted.groups, found) == (GROUPS[4:], plain)


def test_run_measures_everything_and_stores_nothing(tmp_path, batches):
    """What other passes use, which keep no results."""
    seen = []
    model = decoder()
    ctx = replace(context(plan=SchemePlan(SCHEME, SCHEME, SCHEME), batches=batches), checkpoints=Checkpoints(tmp_path))
    sites = [site for site in find_sites(model)[0] if site.role != "embedding"]
    way = base.streaming(ctx, "other", sequential=False)
    way.run(model, plan_segments(model, sites), batches, lambda group, facts: seen.append(facts.tokens))
    assert len(seen) == len(GROUPS) - 1
    assert names(tmp_path) == set()


def test_half_precision_boundaries_are_stored_too(tmp_path):
    text = """g (float16[B,32] x) => (float16[B,32] y) {
        [a] a = MatMul(x, wa) [b] b = MatMul(a, wb) [c] y = MatMul(b, wc)
    }"""
    weights = {name: normal((32, 32), seed, "float16", 0.2) for seed, name in enumerate(("wa", "wb", "wc"))}
    data = [{"x": normal((9, 32), seed, "float16")} for seed in (4, 5)]
    _, plain, _, _ = compiled(None, parse(text, weights), data)
    compiled(tmp_path, parse(text, weights), data, stop_at=2)
    counted, found, _, _ = compiled(tmp_path, parse(text, weights), data)
    assert (counted.groups, counted.runs, found) == ([["c"]], 0, plain)
