"""Hashes of activations: what they depend on, and boundaries that are stored and taken up."""

import logging

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import waypoints
from qcompiler.checkpoints import Checkpoints
from qcompiler.numerics.affine import WeightSpec, min_max_grid, quantize
from qcompiler.quantized import QuantizedTensor
from qcompiler.segments import constants_of, plan_segments
from qcompiler.sites import find_sites
from qcompiler.waypoints import Waypoints, tensor_digest
from tests.builders import context, normal, parse, quantized

CPU = "CPUExecutionProvider"
# Two branches that meet at the end; weights of this size are fed to a segment and no part of its nodes.
TEXT = """g (float[B,64] x, float[B,64] y) => (float[B,64] z) {
    [a1] a = MatMul(x, wa) ar = Relu(a) [a2] b = MatMul(ar, wb)
    [c1] c = MatMul(y, wc) cr = Sigmoid(c) [c2] d = MatMul(cr, wd)
    s = Add(b, d) [last] z = MatMul(s, we)
}"""
BATCHES = [{"x": normal((3, 64), 1), "y": normal((3, 64), 2)}, {"x": normal((2, 64), 3), "y": normal((2, 64), 4)}]


def branches(**others):
    weights = {name: normal((64, 64), seed) for seed, name in enumerate(("wa", "wb", "wc", "wd", "we"))}
    return parse(TEXT, {**weights, **others})


def hashes(folder, model, batches=BATCHES, *, provider=CPU):
    """The hash of what each site reads."""
    points = Waypoints(Checkpoints(folder), model, batches, provider, 1)
    found = {}
    for segment in plan_segments(model, find_sites(model)[0]):
        found.update((site.name, points.values([site.input.name])) for site in segment.sites)
        points.leave(segment, [constants_of(segment.nodes)])
    return found


def test_a_value_depends_on_the_weights_before_it_and_no_others(tmp_path):
    before = hashes(tmp_path, branches())
    assert before == hashes(tmp_path, branches())
    assert len(set(before.values())) == len(before) == 5
    changed = {
        "wa": {"a2", "last"}, "wb": {"last"}, "wc": {"c2", "last"}, "wd": {"last"}, "we": set(),
    }  # fmt: skip
    for name, affected in changed.items():
        after = hashes(tmp_path, branches(**{name: normal((64, 64), 9)}))
        assert {site for site in before if before[site] != after[site]} == affected, name


def test_quantized_weights_count_where_they_are_met(tmp_path):
    plain = hashes(tmp_path, quantized(branches(), context(scheme="w4a16-g32")))
    for name, affected in {"a1": {"a2", "last"}, "c2": {"last"}, "last": set()}.items():
        model = quantized(branches(), context(scheme="w4a16-g32"))
        (site,) = (site for site in find_sites(model)[0] if site.name == name)
        codes = site.quantized.codes()
        codes[0, 0] ^= 1
        site.weight.const_value = remade(site.quantized, codes=codes)
        after = hashes(tmp_path, model)
        assert {site for site in plain if plain[site] != after[site]} == affected, name


def remade(tensor, *, codes=None, scale=None, zero=None, spec=None):
    """A quantized weight with a part replaced."""
    from qcompiler.numerics.affine import Grid

    grid = Grid(tensor.scale if scale is None else scale, tensor.zero_point if zero is None else zero)
    codes = tensor.codes() if codes is None else codes
    return QuantizedTensor(codes, grid, spec or tensor.spec, layout=tensor.layout, dtype=tensor.dtype, name="w")


def test_every_part_of_a_quantized_weight_counts():
    spec, weight = WeightSpec(4, 16, False), normal((8, 32), 0)
    grid = min_max_grid(weight, spec)
    tensor = QuantizedTensor(quantize(weight, grid, spec), grid, spec, layout="NK", dtype=ir.DataType.FLOAT)
    others = [
        remade(tensor),
        remade(tensor, codes=15 - tensor.codes()),
        remade(tensor, scale=2 * tensor.scale),
        remade(tensor, zero=15 - tensor.zero_point),
        remade(tensor, spec=WeightSpec(8, 16, False)),
        remade(tensor, spec=WeightSpec(4, 16, True)),
    ]
    digests = [tensor_digest(each) for each in others]
    assert digests[0] == tensor_digest(tensor)
    assert len(set(digests)) == len(digests)
    assert tensor_digest(ir.Tensor(weight)) != tensor_digest(ir.Tensor(weight.T.copy()))
    assert tensor_digest(ir.Tensor(weight)) != tensor_digest(tensor)


def test_data_and_provider_count_everywhere(tmp_path):
    before = hashes(tmp_path, branches())
    other = [{**BATCHES[0], "y": normal((3, 64), 5)}, BATCHES[1]]
    for changed in (
        hashes(tmp_path, branches(), other),
        hashes(tmp_path, branches(), BATCHES[:1]),
        hashes(tmp_path, branches(), BATCHES[::-1]),
        hashes(tmp_path, branches(), provider="CUDAExecutionProvider"),
    ):
        assert not set(before.values()) & set(changed.values())


def test_without_a_folder_there_is_nothing():
    model = branches()
    points = Waypoints(None, model, BATCHES, CPU, 2)
    (segment, *_) = plan_segments(model, find_sites(model)[0])
    now = constants_of(segment.nodes)
    assert points.values(["x"]) == points.segment(segment, [now, now]) == points.leave(segment, [now, None]) == ""
    assert points.resume([""]) == (0, [])
    points.offer("", [BATCHES, BATCHES])
    points.close()


def stored(points, model, count):
    """Go past some levels; their places."""
    segments = plan_segments(model, find_sites(model)[0])
    return [points.leave(each, [constants_of(each.nodes)] * 2) for each in segments[:count]]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(waypoints, "_PATIENCE", 0.0)
    monkeypatch.setattr("qcompiler.checkpoints._SHARE", 0)


def test_the_last_stored_boundary_is_found_with_what_its_streams_share(tmp_path, impatient):
    model = branches()
    first = Waypoints(Checkpoints(tmp_path), model, BATCHES, CPU, 2)
    places = stored(first, model, 3)
    shared, apart = normal((2, 3), 7), normal((2, 3), 8)
    first.offer(places[0], [[{"v": shared}], [{"v": apart}]])
    first.offer(places[1], [[{"v": shared, "w": apart}], [{"v": shared, "w": np.zeros(2)}]])
    assert len(list(tmp_path.iterdir())) == 1
    again = Waypoints(Checkpoints(tmp_path), model, BATCHES, CPU, 2)
    assert again.resume(places[:1]) == (0, [])
    behind, (exact, actual) = again.resume(places)
    assert behind == 2
    assert exact[0]["v"] is actual[0]["v"]
    assert np.array_equal(exact[0]["v"], shared)
    assert np.array_equal(exact[0]["w"], apart)
    assert np.array_equal(actual[0]["w"], np.zeros(2))
    again.offer(places[2], [[{"v": shared}], [{"v": shared}]])
    assert [path.stem for path in tmp_path.iterdir()] == [places[2]]
    stored(again, model, 3)
    again.close()
    assert list(tmp_path.iterdir()) == []


def test_text_is_not_stored_as_a_boundary(tmp_path, impatient, caplog):
    model = branches()
    points = Waypoints(Checkpoints(tmp_path), model, BATCHES, CPU, 2)
    (place,) = stored(points, model, 1)
    with caplog.at_level(logging.INFO):
        points.offer(place, [[{"words": np.array(["a", "b"], object)}], []])
    assert list(tmp_path.iterdir()) == []
    assert "is not stored" in caplog.text


def test_boundaries_are_stored_when_it_is_time(tmp_path):
    model = branches()
    points = Waypoints(Checkpoints(tmp_path), model, BATCHES, CPU, 2)
    (place,) = stored(points, model, 1)
    points.offer(place, [BATCHES, BATCHES])
    assert list(tmp_path.iterdir()) == []
