"""Decisions on nodes, weights that are shared or untied, and what is left float with the reason."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import SchemeError
from qcompiler.graph import PASS_KEY, SCHEME_KEY, SITE_KEY, read_weight
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan
from qcompiler.sites import find_sites
from tests.builders import (
    apply,
    context,
    decoder,
    linear_model,
    normal,
    only,
    parse,
    quantized,
    run,
    site_named,
    text_of,
    the_site,
    token_batches,
)

SQUARE = {"w": normal((64, 64), 0)}
TABLE = normal((512, 32), 1)


def scheme_texts(model):
    return {site.name: site.node.metadata_props.get(SCHEME_KEY) for site in find_sites(model)[0]}


def plan(default="w4a16", **options):
    options["overrides"] = tuple(
        (Pattern(name), Scheme.parse(text) if text else None) for name, text in options.pop("overrides", {}).items()
    )
    options["ignore"] = tuple(map(Pattern, options.pop("ignore", ())))
    return SchemePlan(Scheme.parse(default) if default else None, **options)


def lower(model, ctx):
    for name in ("fuse_matmul_nbits", "fuse_gather", "cleanup"):
        apply(name, model, ctx)
    return model


def test_roles_get_their_schemes_completed_for_the_target():
    model = decoder(1)
    result = apply("assign_scheme", model, context(plan=plan()))
    assert result.modified
    texts = scheme_texts(model)
    # Rows of 32 values are shorter than a group of 64, the CPU's.
    assert texts.pop("embed") is None
    assert texts.pop("head") == "w8a16-g64-asym"
    assert set(texts.values()) == {"w4a16-g64-asym"}
    assert only(result, "assigned") == ["l0_q", "l0_k", "l0_v", "l0_o", "l0_gate", "l0_up", "l0_down", "head"]
    (skipped,) = (record for record in result.records if record.action == "skipped")
    assert (skipped.site, skipped.reason) == ("embed", "rows of 32 values are shorter than one group")
    assert all(record.spec for record in result.records if record.action == "assigned")
    cuda = decoder(1)
    apply("assign_scheme", cuda, context(plan=plan(), target="cuda"))
    assert set(scheme_texts(cuda).values()) == {"w8a16-g32-sym", "w4a16-g32-sym"}


def test_patterns_decide_and_say_so():
    model = decoder(1)
    chosen = plan(
        "w4a16-g32-asym",
        embedding=None,
        ignore=["l0_o"],
        overrides={"re:^l0_[qkv]$": "w8a16-g32-sym", "l0_k": "w2a16-g16-sym", "l0_down": None},
    )
    result = apply("assign_scheme", model, context(plan=chosen))
    texts = scheme_texts(model)
    assert texts == {
        "embed": None, "l0_q": "w8a16-g32-sym", "l0_k": "w2a16-g16-sym", "l0_v": "w8a16-g32-sym", "l0_o": None,
        "l0_gate": "w4a16-g32-asym", "l0_up": "w4a16-g32-asym", "l0_down": None, "head": "w8a16-g64-asym",
    }  # fmt: skip
    reasons = {record.site: record.reason for record in result.records if record.action == "skipped"}
    assert reasons == {
        "embed": "left float (--embedding float)",
        "l0_o": "ignored (--ignore l0_o)",
        "l0_down": "left float (--set l0_down=float)",
    }


@pytest.mark.parametrize("options", [{"ignore": ["l0_x"]}, {"overrides": {"re:nothing": "w4a16"}}])
def test_a_pattern_that_selects_nothing_is_an_error(options):
    (pattern,) = [*options.get("ignore", []), *options.get("overrides", {})]
    model = decoder(1)
    with pytest.raises(SchemeError, match=f"pattern '{pattern}' selects no site; .* inspect MODEL --sites"):
        apply("assign_scheme", model, context(plan=plan(**options)))
    assert set(scheme_texts(model).values()) == {None}


def test_a_pattern_may_name_what_could_not_be_quantized_anyway():
    text = "g (float[B,64,T] x) => (float[B,64,U] y) { [wide] y = Conv(x, w) }"
    model = parse(text, {"w": normal((64, 64, 3), 1)})
    result = apply("assign_scheme", model, context(plan=plan(ignore=["wide"])))
    assert not result.modified
    (record,) = result.records
    assert (record.site, record.action) == ("wide", "skipped")
    assert record.reason == "ignored (--ignore wide)"


PRODUCTS = """g (float[B,S,64] x) => (float[B,S,64] y) {
    [q] q = MatMul(x, w) t = Transpose <perm = [0, 2, 1]> (x) [scores] s = MatMul(q, t) [mix] y = MatMul(s, x) }"""


@pytest.mark.parametrize(
    ("options", "skipped"),
    [
        ({"ignore": ["scores"]}, {"scores": "ignored (--ignore scores)"}),
        ({"overrides": {"mix": None}}, {"mix": "left float (--set mix=float)"}),
        ({"ignore": ["re:s"]}, {"scores": "ignored (--ignore re:s)"}),
        ({"overrides": {"mix": "w4a16"}}, {}),
        (
            {"overrides": {"mix": "w8a8-sym"}},
            {"mix": "no layer runs with w8a8-sym, and a product is integer only beside one that does"},
        ),
        ({}, {}),
    ],
)
def test_a_pattern_may_name_a_product_of_two_activations(options, skipped):
    """It has no weight, so that it is no site, but it runs on integers too."""
    model = parse(PRODUCTS, SQUARE)
    result = apply("assign_scheme", model, context(plan=plan("w8a8", **options)))
    assert only(result, "assigned") == ["q"]
    assert {record.site: record.reason for record in result.records if record.action == "skipped"} == skipped


def test_where_activations_stay_float_nothing_is_said_about_products():
    for default in ("w4a16", "w8a8-dynamic"):
        result = apply("assign_scheme", parse(PRODUCTS, SQUARE), context(plan=plan(default, ignore=["scores"])))
        assert [record.site for record in result.records] == ["q"]


def test_nothing_assigned_is_not_modified_and_the_graph_stays():
    model = linear_model(64, 24)
    before = text_of(model)
    result = apply("assign_scheme", model, context(plan=plan(None)))
    assert not result.modified
    assert [record.reason for record in result.records] == ["left float (--scheme float)"]
    assert text_of(model) == before


def test_decisions_of_an_earlier_run_are_forgotten():
    model = linear_model(64, 24)
    apply("assign_scheme", model, context(plan=plan("w8a16")))
    result = apply("assign_scheme", model, context(plan=plan(None)))
    assert result.modified
    assert scheme_texts(model) == {"fc": None}
    assert SITE_KEY not in the_site(model).node.metadata_props


# Shared weights: text, weights, plan; the graph afterwards, and which sites share.


def two_readers(first, second):
    steps = f"{first} {second}"
    return f"g (float[B,64] x) => (float[B,64] y, float[B,64] z) {{ {steps} }}"


STRAIGHT = two_readers("[a] y = MatMul(x, w)", "[b] z = MatMul(x, w)")
CROSSED = two_readers("[a] y = MatMul(x, w)", "t = Transpose(w) [b] z = MatMul(x, t)")
BOTH_TURNED = two_readers("t = Transpose(w) [a] y = MatMul(x, t)", "[b] z = MatMul(x, t)")
SHARING = {
    "one scheme": (STRAIGHT, plan(), ["y = MatMul(x, w)", "z = MatMul(x, w)"], 1),
    "two schemes": (
        STRAIGHT,
        plan(overrides={"b": "w8a16"}),
        ["y = MatMul(x, w)", "z = MatMul(x, w_w8a16-g64-asym)"],
        2,
    ),
    "one float": (STRAIGHT, plan(ignore=["a"]), ["y = MatMul(x, w)", "z = MatMul(x, w_w4a16-g64-asym)"], 1),
    "one transposed": (
        CROSSED,
        plan(),
        ["y = MatMul(x, w)", "t = Transpose(w_w4a16-g64-asym)", "z = MatMul(x, t)"],
        2,
    ),
    "both transposed": (BOTH_TURNED, plan(), ["t = Transpose(w)", "y = MatMul(x, t)", "z = MatMul(x, t)"], 1),
    "both transposed, two schemes": (
        BOTH_TURNED,
        plan(overrides={"b": "w8a16"}),
        ["t = Transpose(w)", "t_b = Transpose(w_w8a16-g64-asym)", "y = MatMul(x, t)", "z = MatMul(x, t_b)"],
        2,
    ),
    "another operator": (
        two_readers("[a] y = MatMul(x, w)", "s = Relu(w) z = Add(x, s)"),
        plan(),
        ["y = MatMul(x, w_w4a16-g64-asym)", "s = Relu(w)", "z = Add(x, s)"],
        1,
    ),
    "another operator behind the transpose": (
        two_readers("t = Transpose(w) [a] y = MatMul(x, t)", "s = Relu(t) z = Add(x, s)"),
        plan(),
        [
            "t = Transpose(w)", "t_a = Transpose(w_w4a16-g64-asym)", "y = MatMul(x, t_a)", "s = Relu(t)",
            "z = Add(x, s)",
        ],
        1,
    ),
    "an output": (
        "g (float[64,64] x) => (float[64,64] y, float[64,64] w) { [a] y = MatMul(x, w) }",
        plan(),
        ["y = MatMul(x, w_w4a16-g64-asym)"],
        1,
    ),
    "the transposed weight is an output": (
        "g (float[64,64] x) => (float[64,64] y, float[64,64] t) { t = Transpose(w) [a] y = MatMul(x, t) }",
        plan(),
        ["t = Transpose(w)", "t_a = Transpose(w_w4a16-g64-asym)", "y = MatMul(x, t_a)"],
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARING)
def test_sites_share_a_weight_if_they_want_the_same_and_all_others_keep_the_original(case):
    text, chosen, after, weights = SHARING[case]
    model = parse(text, SQUARE)
    x = normal((64, 64), 2)
    want = run(model, {"x": x})
    ctx = context(plan=chosen)
    apply("assign_scheme", model, ctx)
    assert text_of(model) == after
    assert len({site.weight for site in find_sites(model)[0] if SCHEME_KEY in site.node.metadata_props}) == weights
    # Nothing is quantized yet, so not a bit has changed.
    assert all(np.array_equal(a, b) for a, b in zip(run(model, {"x": x}), want, strict=True))
    assert all(
        node.metadata_props[PASS_KEY] == "assign_scheme"
        for node in model.graph
        if node.outputs[0].name in ("t_a", "t_b")
    )
    apply("rtn", model, ctx)
    half = run(model, {"x": x})
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(half, want, strict=True)]
    # What the plan leaves alone has not moved, what it quantizes is off by percents: the rounding of 4 bits.
    names = {output.name: error for output, error in zip(model.graph.outputs, errors, strict=True)}
    untouched = {"one float": ["y"], "an output": ["w"], "the transposed weight is an output": ["t"]}.get(case, [])
    untouched += ["z"] if case.startswith("another operator") else []
    for name, error in names.items():
        assert error == 0 if name in untouched else 1e-3 < error < 0.15, name
    lower(model, ctx)
    # 8-bit sites run with int8 activations.
    for got, before in zip(run(model, {"x": x}), half, strict=True):
        assert np.linalg.norm(got - before) <= (0.02 if "two schemes" in case else 1e-5) * np.linalg.norm(before)


def tied(way, vocabulary=512):
    table = TABLE[:vocabulary]
    text = f"""g (int64[B,S] i) => (float[B,S,{vocabulary}] y) {{
        {{}} [embed] h = Gather({{}}, i) n = Relu(h) {{}} [head] y = MatMul(n, {{}}) }}"""
    text = text.replace("{}", "%s")
    if way == "rows":
        return parse(text.replace("{{", "{") % ("", "t", "w = Transpose(t)", "w"), {"t": table})
    return parse(text % ("w = Transpose(t)", "w", "", "t"), {"t": np.ascontiguousarray(table.T)})


@pytest.mark.parametrize("way", ["rows", "columns"])
def test_a_tied_table_stays_tied_where_both_get_the_same_scheme(way):
    model = tied(way)
    feeds = {"i": np.array([[3, 500, 0]])}
    (want,) = run(model, feeds)
    ctx = context(plan=plan(embedding=Scheme.parse("w8a16-g32"), lm_head=Scheme.parse("w8a16-g32")), accuracy_level=0)
    quantized(model, ctx)
    assert len({site.weight for site in find_sites(model)[0]}) == 1
    (half,) = run(model, feeds)
    assert 0 < np.linalg.norm(half - want) < 0.02 * np.linalg.norm(want)
    lower(model, ctx)
    (got,) = run(model, feeds)
    assert np.allclose(got, half, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["rows", "columns"])
def test_a_tied_table_is_untied_where_schemes_differ(way):
    model = tied(way)
    feeds = {"i": np.array([[3, 500, 0]])}
    ctx = context(plan=plan(embedding=None, lm_head=Scheme.parse("w4a16-g32")))
    quantized(model, ctx)
    assert site_named(model, "embed").quantized is None
    assert np.array_equal(read_weight(site_named(model, "embed")), TABLE)
    assert site_named(model, "head").quantized is not None
    (half,) = run(model, feeds)
    lower(model, ctx)
    assert np.allclose(run(model, feeds)[0], half, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["rows", "columns"])
def test_a_small_tied_table_stays_float_although_its_projection_does_not(way):
    model = tied(way, 100)
    ctx = context(plan=plan("w4a16-g32", embedding=Scheme.parse("w4a16-g32")))
    feeds = {"i": np.array([[3, 99, 0]])}
    quantized(model, ctx)
    (half,) = run(model, feeds)
    lower(model, ctx)
    assert np.allclose(run(model, feeds)[0], half, rtol=1e-5, atol=1e-5)
    assert [node.op_type for node in model.graph if node.op_type in ("Gather", "MatMulNBits")] == [
        "Gather",
        "MatMulNBits",
    ]


def test_untied_weights_share_their_data_until_they_are_quantized():
    model = parse(STRAIGHT, SQUARE)
    apply("assign_scheme", model, context(plan=plan(overrides={"b": "w8a16"})))
    first, second = (site.weight for site in find_sites(model)[0])
    assert first is not second
    assert first.const_value is second.const_value


def test_a_weight_of_a_body_is_untied_in_its_body():
    text = """g (bool p, float[B,64] x) => (float[B,64] y) {
        y = If (p) <then_branch = yes () => (float[B,64] s) { [a] h = MatMul(x, w) [b] s = MatMul(h, w) },
            else_branch = no () => (float[B,64] u) { u = Relu(x) }>
    }"""
    model = parse(text, {"yes.w": SQUARE["w"]})
    result = apply("assign_scheme", model, context(plan=plan(overrides={"b": "w8a16"})))
    assert only(result, "assigned") == ["a", "b"]
    (body,) = (graph for graph in model.graphs() if graph.name == "yes")
    assert list(body.initializers) == ["w", "w_w8a16-g64-asym"]
    assert list(model.graph.initializers) == []
    feeds = {"x": normal((2, 64), 1), "p": np.array(True)}
    assert run(model, feeds)[0].shape == (2, 64)


def test_a_weight_of_the_graph_may_be_shared_by_bodies():
    text = """g (bool p, float[B,64] x) => (float[B,64] y) {
        [top] h = MatMul(x, w)
        y = If (p) <then_branch = yes () => (float[B,64] s) { [a] s = MatMul(h, w) },
            else_branch = no () => (float[B,64] u) { [b] u = MatMul(h, w) }>
    }"""
    model = parse(text, SQUARE)
    ctx = context(plan=plan(ignore=["a"]))
    quantized(model, ctx)
    assert scheme_texts(model) == {"top": "w4a16-g64-asym", "a": None, "b": "w4a16-g64-asym"}
    assert site_named(model, "top").weight is site_named(model, "b").weight
    assert site_named(model, "a").weight.name == "w"
    assert isinstance(site_named(model, "a").weight, ir.Value)
    feeds = {"x": normal((2, 64), 1)}
    halves = [run(model, {**feeds, "p": np.array(flag)})[0] for flag in (True, False)]
    lower(model, ctx)
    for flag, half in zip((True, False), halves, strict=True):
        assert np.allclose(run(model, {**feeds, "p": np.array(flag)})[0], half, rtol=1e-5, atol=1e-4)


def test_the_whole_decoder_goes_through_with_tables_of_one_group():
    model = decoder(1)
    feeds = token_batches(1)[0]
    (want,) = run(model, feeds)
    ctx = context(plan=plan("w8a16-g32", embedding=Scheme.parse("w8a16-g32"), lm_head=Scheme.parse("w8a16-g32")))
    lower(quantized(model, ctx), ctx)
    (got,) = run(model, feeds)
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)
