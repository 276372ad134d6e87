"""Learned rounding with checkpoints: blocks and steps that an interrupted run has done are not done again."""

from dataclasses import replace

import numpy as np
import pytest

from qcompiler import blocks, waypoints
from qcompiler.checkpoints import Checkpoints
from qcompiler.passes import learned_rounding
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from tests.builders import apply, context, decoder, normal, quantized, serialized, token_batches

pytestmark = pytest.mark.torch

SCHEME, OTHER = Scheme.parse("w4a16-g16-asym"), Scheme.parse("w8a16-g16-asym")
STEPS = 4


class Stop(BaseException):
    """What stops a run, as a signal would."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Every boundary and every state is stored."""
    monkeypatch.setattr(waypoints, "_PATIENCE", 0.0)
    monkeypatch.setattr(learned_rounding, "_SECONDS", 0.0)
    monkeypatch.setattr("qcompiler.checkpoints._SHARE", 0)


def tuned(folder, *, stop_block=None, stop_step=None, changed=(), batches=None, seed=0, **options):
    """Tune a decoder of three layers, up to a block or a step of the descent.

    Returns:
        What was done (blocks tuned, steps descended, blocks run forward), the bytes, the records, and the tally.
    """
    from qcompiler import tuning
    from qcompiler.tuning import distillation

    plan = SchemePlan(SCHEME, None, OTHER, tuple((Pattern(name), OTHER) for name in changed))
    ctx = context(plan=plan, batches=batches or token_batches(6, 2, 12, vocabulary=64), seed=seed)
    model = quantized(decoder(3), ctx, "gptq")
    store = Checkpoints(folder) if folder is not None else None
    done = {"tuned": 0, "steps": 0, "runs": 0}
    tune_block, descend, run = tuning.tune_block, distillation._descend, blocks.TwoStreams._run

    def counting(name, function, stop=None):
        def call(*arguments):
            if done[name] == stop:
                raise Stop
            done[name] += 1
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "tune_block", counting("tuned", tune_block, stop_block))
        patch.setattr(distillation, "_descend", counting("steps", descend, stop_step))
        patch.setattr(blocks.TwoStreams, "_run", counting("runs", run))
        try:
            options = {"steps": 3, "distill": STEPS, "held_out": 1, "both": True, **options}
            result = apply("learned_rounding", model, replace(ctx, checkpoints=store), **options)
        except Stop:
            return done, None, None, None
    return done, serialized(model), result.records, store.tally if store is not None else None


def files(folder):
    return len(list(folder.iterdir()))


@pytest.fixture(scope="module")
def undisturbed():
    done, found, records, _ = tuned(None)
    assert (done["tuned"], done["steps"]) == (3, STEPS)
    assert found == tuned(None)[1]
    return found, records


def test_a_second_run_does_nothing(tmp_path, undisturbed):
    first = tuned(tmp_path)
    assert first[1:3] == undisturbed
    assert files(tmp_path) == 4  # three blocks, and what the descent has made of all
    again = tuned(tmp_path)
    assert again[0] == {"tuned": 0, "steps": 0, "runs": 0}
    assert again[1:3] == undisturbed
    assert first[3] == {"learned_rounding": (0, 21), "distillation": (0, 21)}
    assert again[3] == {"learned_rounding": (21, 21), "distillation": (21, 21)}
    assert files(tmp_path) == 4


@pytest.mark.parametrize("block", [0, 1, 2])
def test_blocks_are_tuned_once(tmp_path, undisturbed, block):
    stopped = tuned(tmp_path, stop_block=block)
    assert stopped[1] is None
    rest = tuned(tmp_path)
    assert rest[0]["tuned"] == 3 - block
    assert rest[1:3] == undisturbed
    # Both streams stand where they were stored: in front of the block. It is run for its targets once more.
    assert stopped[0]["runs"] + rest[0]["runs"] == tuned(None)[0]["runs"] + 1
    assert files(tmp_path) == 4


@pytest.mark.parametrize("step", range(STEPS))
def test_the_descent_goes_on_where_it_stopped(tmp_path, undisturbed, step):
    assert tuned(tmp_path, stop_step=step)[1] is None
    rest = tuned(tmp_path)
    assert (rest[0]["tuned"], rest[0]["steps"]) == (0, STEPS - step)
    assert rest[1:3] == undisturbed
    assert files(tmp_path) == 4


def test_without_states_the_descent_begins_anew(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(learned_rounding, "_SECONDS", 1e9)
    monkeypatch.setattr(waypoints, "_PATIENCE", 1e9)
    assert tuned(tmp_path, stop_step=2)[1] is None
    assert files(tmp_path) == 3
    rest = tuned(tmp_path)
    assert (rest[0]["tuned"], rest[0]["steps"]) == (0, STEPS)
    assert rest[1:3] == undisturbed


def test_a_changed_site_redoes_its_block_and_those_behind_it(tmp_path):
    """And what is learned of all together."""
    tuned(tmp_path)
    done, found, records, _ = tuned(tmp_path, changed=["l1_up"])
    assert (done["tuned"], done["steps"]) == (2, STEPS)
    assert (found, records) == tuned(None, changed=["l1_up"])[1:3]


@pytest.mark.parametrize(
    "change", [{"rate": 0.01}, {"seed": 3}, {"batches": token_batches(6, 2, 12, vocabulary=64, seed=4)}], ids=str
)
def test_other_options_and_data_redo_everything(tmp_path, change):
    tuned(tmp_path)
    done, found, _, _ = tuned(tmp_path, **change)
    assert (done["tuned"], done["steps"]) == (3, STEPS)
    assert found == tuned(None, **change)[1]


def test_another_descent_begins_with_the_same_blocks(tmp_path):
    tuned(tmp_path)
    done, found, _, _ = tuned(tmp_path, distill_rate=0.02)
    assert (done["tuned"], done["steps"]) == (0, STEPS)
    assert found == tuned(None, distill_rate=0.02)[1]


@pytest.mark.parametrize("lean", [False, True])
def test_a_weight_goes_on_bit_for_bit(lean):
    import torch

    from qcompiler.numerics.affine import WeightSpec, clip_grid, quantize
    from qcompiler.tuning import LearnedWeight, Settings, Start

    spec, weight = WeightSpec(4, 16, False), normal((8, 32), 0)
    grid = clip_grid(weight, spec)
    start = Start("w", weight, quantize(weight, grid, spec), grid, spec, "KN")
    settings = Settings(steps=10, rate=0.05, scale_rate=0.002)

    def steps(learned, first, last):
        for step in range(first, last):
            (learned.open() * torch.from_numpy(normal((32, 8), step))).square().sum().backward()
            learned.step(settings.pace(step))

    dtype = torch.bfloat16 if lean else torch.float32
    whole, part, rest = (LearnedWeight(start, lean=lean, dtype=dtype) for _ in range(3))
    steps(whole, 0, 8)
    steps(part, 0, 5)
    state = {name: np.array(array) for name, array in part.state().items()}
    rest.restore(state)
    steps(rest, 5, 8)
    wanted, found = whole.state(), rest.state()
    assert wanted.keys() == found.keys() == state.keys()
    assert all(wanted[name].tobytes() == found[name].tobytes() for name in wanted)
    assert not np.array_equal(state["latent"], wanted["latent"])
