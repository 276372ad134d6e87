"""Where a graph is cut, and that the pieces together compute what the whole computes."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.files.loader import load_model
from qcompiler.segments import plan_segments, read_values, segment_model
from qcompiler.sites import find_sites
from tests.builders import decoder, decoder_groups, normal, parse, run, serialized, token_batches, with_outputs

# The decoder side reads what the encoder side computed, four sites later.
CROSS = """g (float[B,S,32] x, float[B,T,32] memory) => (float[B,S,32] y) {
    [enc1] e1 = MatMul(memory, we1)
    re = Relu(e1)
    [enc2] e2 = MatMul(re, we2)
    [ck] ck = MatMul(e2, wck)
    [cv] cv = MatMul(e2, wcv)
    ckt = Transpose <perm = [0, 2, 1]> (ck)
    [d1] d1 = MatMul(x, wd1)
    rd = Relu(d1)
    [d2] d2 = MatMul(rd, wd2)
    [d3] d3 = MatMul(d2, wd3)
    [cq] cq = MatMul(d3, wcq)
    s = MatMul(cq, ckt)
    p = Softmax <axis = -1> (s)
    a = MatMul(p, cv)
    [co] o = MatMul(a, wco)
    y = Add(o, d3)
}"""
CROSS_GROUPS = [{"d1"}, {"d2", "enc1"}, {"d3", "enc2"}, {"ck", "cv", "cq"}, {"co"}]

# Both branches read a value, and one a weight, of the graph around them.
BRANCHES = """g (bool flag, float[B,32] x) => (float[B,32] y) {
    [first] f = MatMul(x, wf)
    r = Relu(f)
    z = If (flag) <
        then_branch = yes () => (float[B,32] t) { [inner] i = MatMul(r, wi) t = Add(i, own) },
        else_branch = no () => (float[B,32] e) { e = Neg(r) }
    >
    [second] b = MatMul(z, ws)
    c = Add(b, r)
    [third] y = MatMul(c, wt)
}"""


def weights(*names, shape=(32, 32)):
    return {name: normal(shape, seed, scale=32**-0.5) for seed, name in enumerate(names)}


def cross():
    names = ("we1", "we2", "wck", "wcv", "wd1", "wd2", "wd3", "wcq", "wco")
    feeds = {"x": normal((2, 5, 32), 20), "memory": normal((2, 9, 32), 21)}
    return parse(CROSS, weights(*names)), feeds


def branches(flag=True):
    model = parse(BRANCHES, {**weights("wf", "wi", "ws", "wt"), "yes.own": normal(32, 9)})
    return model, {"x": normal((4, 32), 22), "flag": np.array(flag)}


def decoder_with_feeds():
    return decoder(), token_batches(1)[0]


def top_sites(model):
    return [site for site in find_sites(model)[0] if site.role != "embedding" and not site.nested]


def groups_of(segments):
    return [{site.name for site in segment.sites} for segment in segments]


@pytest.mark.parametrize(
    ("build", "groups"),
    [
        (decoder_with_feeds, [set(group) for group in decoder_groups()]),
        (cross, CROSS_GROUPS),
        (branches, [{"first"}, {"second"}, {"third"}]),
    ],
)
def test_a_level_holds_the_sites_that_can_be_quantized_together(build, groups):
    model, _ = build()
    segments = plan_segments(model, top_sites(model))
    assert groups_of(segments) == [set(), *groups]


@pytest.mark.parametrize(
    ("build", "values"),
    # How many values are compared, those that are carried along counted at each boundary.
    [(decoder_with_feeds, 22), (cross, 9), (branches, 5), (lambda: branches(flag=False), 5)],
)
def test_the_pieces_compute_bit_for_bit_what_the_whole_computes(build, values):
    model, feeds = build()
    segments = plan_segments(model, top_sites(model))
    names = [name for segment in segments for name in segment.outputs]
    whole = dict(zip(names, run(with_outputs(model, names), feeds, outputs=names), strict=True)) | feeds
    boundary, compared = dict(feeds), 0
    for segment in segments:
        assert {site.input.name for site in segment.sites} <= set(boundary), "what a site reads is not there yet"
        assert {*segment.inputs, *segment.carried} <= set(boundary)
        following = {name: boundary[name] for name in segment.carried}
        if segment.outputs:
            inputs = {name: boundary[name] for name in segment.inputs}
            proto, fed = segment_model(model, segment, {name: value.dtype for name, value in inputs.items()})
            results = run(proto, {**inputs, **fed}, outputs=segment.outputs)
            following.update(zip(segment.outputs, results, strict=True))
        boundary = following
        for name, value in boundary.items():
            assert np.array_equal(value, whole[name]), name
            compared += 1
    assert boundary == {}
    assert compared == values


def test_side_computations_wait_until_they_are_needed():
    """The mask enters at the first attention, not before; the encoder ends right before the decoder reads it."""
    model, _ = decoder_with_feeds()
    segments = plan_segments(model, top_sites(model))
    assert [node.op_type for node in segments[0].nodes] == ["Gather", "LayerNormalization"]
    assert segments[0].carried == ["attention_mask"]
    assert "Cast" in [node.op_type for node in segments[1].nodes]
    model, _ = cross()
    segments = plan_segments(model, top_sites(model))
    assert segments[1].carried == ["memory"]
    assert set(segments[4].inputs) == {"e2", "d3"}
    assert set(segments[4].outputs) == {"a"}


def test_a_value_is_made_for_its_first_reader_in_time_which_may_not_be_the_first_in_the_graph():
    text = """g (float[B,32] x) => (float[B,32] y) {
        n = Neg(x) late = Relu(n) [a] a = MatMul(n, wa) [b] b = MatMul(a, wb) s = Add(b, late) [c] y = MatMul(s, wc)
    }"""
    model = parse(text, weights("wa", "wb", "wc"))
    segments = plan_segments(model, top_sites(model))
    made = [[node.outputs[0].name for node in segment.nodes] for segment in segments]
    assert made == [["n"], ["a"], ["late", "b", "s"], ["y"]]
    assert [segment.carried for segment in segments] == [[], ["n"], [], []]


def test_what_no_site_depends_on_is_left_out():
    text = """g (float[B,32] x) => (float[B,32] y, float[B,32] z) {
        n = Neg(x) [a] y = MatMul(n, w) z = Relu(y) e = Exp(x)
    }"""
    model = parse(text, weights("w"))
    segments = plan_segments(model, top_sites(model))
    assert [[node.op_type for node in segment.nodes] for segment in segments] == [["Neg"], ["MatMul"]]
    assert segments[1].outputs == []


def test_sites_that_read_the_same_value_share_a_level_although_one_could_wait():
    text = """g (float[B,32] x) => (float[B,32] y) {
        [a] a = MatMul(x, wa) [b] b = MatMul(a, wb) [c] c = MatMul(b, wc) [late] d = MatMul(x, wd)
        y0 = Add(c, d) [e] y = MatMul(y0, we)
    }"""
    model = parse(text, weights("wa", "wb", "wc", "wd", "we"))
    segments = plan_segments(model, top_sites(model))
    assert groups_of(segments) == [set(), {"a", "late"}, {"b"}, {"c"}, {"e"}]
    assert segments[2].carried == ["d"]


def test_a_site_waits_for_a_bias_that_is_computed():
    """`late` reads what `a` reads, but its bias is known two sites later; and what makes the bias has to hurry."""
    text = """g (float[B,32] x) => (float[B,32] y) {
        [a] a = MatMul(x, wa) [b] b = MatMul(a, wb) r = Relu(b) [late] d = Gemm(x, wc, r)
        [c] c = MatMul(a, wd) [e] e = MatMul(c, we) [f] f = MatMul(e, wf) s = Add(d, f) [g] y = MatMul(s, wg)
    }"""
    model = parse(text, weights("wa", "wb", "wc", "wd", "we", "wf", "wg"))
    segments = plan_segments(model, top_sites(model))
    assert groups_of(segments) == [set(), {"a"}, {"b", "c"}, {"late", "e"}, {"f"}, {"g"}]
    made = {"x"}
    for segment in segments:
        assert set(segment.inputs) <= made
        made |= set(segment.outputs)
        made -= made - set(segment.outputs) - set(segment.carried)


def test_a_site_that_nobody_reads_comes_with_its_neighbours_or_last():
    text = """g (float[B,32] x) => (float[B,32] y, float[B,32] z) {
        [a] a = MatMul(x, wa) [side] z = MatMul(a, ws) [b] b = MatMul(a, wb) [c] y = MatMul(b, wc)
    }"""
    model = parse(text, weights("wa", "ws", "wb", "wc"))
    assert groups_of(plan_segments(model, top_sites(model))) == [set(), {"a"}, {"side", "b"}, {"c"}]


def test_values_read_by_bodies_are_read_by_their_node():
    model, _ = branches()
    (node,) = (node for node in model.graph if node.op_type == "If")
    assert {value.name for value in read_values(node)} == {"flag", "r", "wi"}


def test_large_constants_are_fed_and_small_ones_are_built_in():
    """From 16 KiB on a constant is neither copied nor packed by the session."""
    text = """g (float[B,64] x) => (float[B,8] y) {
        [a] a = MatMul(x, large) [b] b = MatMul(a, small) [c] y = MatMul(b, end)
    }"""
    model = parse(text, {"large": normal((64, 64), 1), "small": normal((64, 8), 2), "end": normal((8, 8), 3)})
    segments = plan_segments(model, top_sites(model))
    float32 = np.dtype("float32")
    proto, fed = segment_model(model, segments[1], {"x": float32})
    assert list(fed) == ["large"]
    assert [value.name for value in onnx.load_from_string(proto).graph.initializer] == []
    proto, fed = segment_model(model, segments[2], {"a": float32})
    assert list(fed) == []
    assert [value.name for value in onnx.load_from_string(proto).graph.initializer] == ["small"]


def external_body(folder):
    """`branches` with the weight of a body, 4 KiB, in a file of its own."""
    model = parse(BRANCHES.replace("own", "wide"), {**weights("wf", "wi", "ws", "wt"), "yes.wide": normal((1, 32), 9)})
    proto = onnx.load_from_string(serialized(model))
    (body,) = (a.g for node in proto.graph.node for a in node.attribute if a.name == "then_branch")
    (tensor,) = body.initializer
    (folder / "body.data").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, text in (("location", "body.data"), ("offset", "0"), ("length", "128")):
        tensor.external_data.add(key=key, value=text)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def test_a_piece_holds_the_values_of_its_bodies_wherever_they_are_stored(tmp_path):
    """A sub-model has no folder in which external data could be looked for."""
    path = external_body(tmp_path)
    model = load_model(path)
    segments = plan_segments(model, top_sites(model))
    (segment,) = (segment for segment in segments if any(node.op_type == "If" for node in segment.nodes))
    feeds = {"x": normal((4, 32), 22), "flag": np.array(True)}
    names = list(dict.fromkeys([*segment.inputs, *segment.outputs]))
    reference, _ = branches()
    inputs = dict(zip(segment.inputs, run(with_outputs(reference, names), feeds, outputs=segment.inputs), strict=True))
    proto, fed = segment_model(model, segment, {name: value.dtype for name, value in inputs.items()})
    got = run(proto, {**inputs, **fed}, outputs=segment.outputs)
    want = run(with_outputs(reference, names), feeds, outputs=segment.outputs)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    (tensor,) = (graph.initializers["wide"].const_value for graph in model.graphs() if "wide" in graph.initializers)
    assert isinstance(tensor, ir.ExternalTensor)


def test_a_weight_behind_a_transpose_is_not_held_for_every_batch():
    text = """g (float[B,64] x) => (float[B,96] y) {
        [a] h = MatMul(x, w) r = Relu(h) t = Transpose(u) [b] y = MatMul(r, t) }"""
    model = parse(text, {"w": normal((64, 64), 0), "u": normal((96, 64), 1)})
    for sites in (find_sites(model)[0], find_sites(model)[0][1:]):
        *before, last = plan_segments(model, sites)
        assert [name for segment in before for name in segment.outputs][-1:] == ["r"]
        assert not any("t" in (*segment.outputs, *segment.carried) for segment in before)
        assert [node.op_type for node in last.nodes] == ["Transpose", "MatMul"]
