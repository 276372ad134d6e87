"""The grammar of schemes, patterns, and which site gets what."""

import numpy as np
import pytest

from qcompiler.errors import SchemeError
from qcompiler.numerics.activation import ActivationSpec
from qcompiler.numerics.affine import WeightSpec
from qcompiler.numerics.formats import FORMATS
from qcompiler.scheme import ALIASES, GROUP_SIZES, Activations, Scheme
from qcompiler.scheme_plan import Pattern, SchemePlan, parse_optional_scheme

BLOCKS = Activations(granularity="block", dynamic=True)
EVERY = (
    [
        Scheme(bits, group, symmetric, activations)
        for activations in (None, BLOCKS)
        for bits in FORMATS
        for group in (None, 0, *GROUP_SIZES)
        for symmetric in (None, True, False)
        if activations is None or bits != 8 or group
    ]
    + [
        Scheme(8, 0, True, activations, head_size)
        for head_size in (0, 64)
        for activations in (
            Activations(),
            Activations(16),
            Activations(fp8=True),
            Activations(dynamic=True),
            Activations(dynamic=True, granularity="token"),
            Activations(dynamic=True, granularity="tensor"),
            Activations(dynamic=True, granularity="tensor", symmetric=False),
            Activations(dynamic=False, granularity="tensor", symmetric=False),
            Activations(dynamic=False, symmetric=True),
        )
    ]
    + [
        Scheme(bits, 0, True, Activations(width, False, "tensor", symmetric), ternary=ternary)
        for bits, ternary in ((2, True), (2, False), (3, False), (4, False), (8, False))
        for width in (1, 2, 3, 4, 8)
        for symmetric in ((True,) if width == 1 else (True, False))
    ]
)


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_text_and_scheme_are_inverse(scheme):
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(f"  {str(scheme).upper()} ") == scheme


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w4a16", Scheme(4)),
        ("w8a16-g32-sym", Scheme(8, 32, True)),
        ("w2a16-asym-g16", Scheme(2, 16, False)),
        ("w3a16", Scheme(3)),
        ("w3a16-g64-asym", Scheme(3, 64, False)),
        ("w3a8-g32", Scheme(3, 32, activations=BLOCKS)),
        ("w4a16-channel", Scheme(4, 0)),
        ("w4a16-g32-nf4", Scheme(4, 32, True, vector=1, known="nf4")),
        ("int4", Scheme(4)),
        ("q8", Scheme(8, 32, True)),
        ("w4a8", Scheme(4, activations=BLOCKS)),
        ("w8a8-g32", Scheme(8, 32, activations=BLOCKS)),
        ("w4a8-static", Scheme(4, 0, True, Activations(dynamic=False))),
        ("w4a8-token", Scheme(4, 0, True, Activations(dynamic=True, granularity="token"))),
        ("w4a4", Scheme(4, 0, True, Activations(4, False, "tensor"))),
        ("w1.58a1", Scheme(2, 0, True, Activations(1, False, "tensor", True), ternary=True)),
        ("w8a8-channel-sym", Scheme(8, 0, True, Activations(symmetric=True))),
        ("w8a8-token", Scheme(8, 0, True, Activations(dynamic=True, granularity="token"))),
    ],
)
def test_what_a_text_means(text, expected):
    assert Scheme.parse(text) == expected


def test_every_alias_means_a_scheme():
    for alias, text in ALIASES.items():
        assert Scheme.parse(alias) == Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not understood; expected w1a1, w{1,1.58,2,3,4,8}a16"),
        ("fp8", "'fp8' is not understood"),
        ("w4", "'w4' is not understood"),
        ("w4a5", "activations of 5 bits are not available"),
        ("w1a4", "activations of 4 bits are not available"),
        ("w4a4-dynamic", "activations of 4 bits are calibrated"),
        ("w4a4-token", "activations of 4 bits are calibrated"),
        ("w4a4-g32", "one scale for each output channel; drop -g32"),
        ("w4a4-fp8", "8-bit floats are w8a8-fp8"),
        ("w1.58a1-asym", "signs have no zero point"),
        ("w8a8-g32-token", "one scale for each output channel; drop -g32"),
        ("w8a8-static-token", "write -dynamic-token"),
        ("w8a8-static-dynamic", "says twice when activations are quantized"),
        ("w8a8-tensor-token", "gives two granularities of activations"),
        ("w8a8-dynamic-token-asym", "zero points"),
        ("w8a8-dynamic-tensor-sym", "zero points"),
        ("w8a8-fp8-dynamic", "8-bit floats are static"),
        ("w8a8-fp8-asym", "8-bit floats are static"),
        ("w8a8-head0", "option '-head0' is not understood"),
        ("w8a16-token", "-token does not go with float activations"),
        ("w8a16-head64", "-head does not go with float activations"),
        ("w4a16int", "16-bit integer activations go with 8-bit integer weights"),
        ("w8a16int-dynamic", "16-bit activations are calibrated"),
        ("w5a16", "weights of 5 bits are not available; known widths: 1, 1.58, 2, 3, 4, 8"),
        ("w1.58a16-asym", "ternary weights are symmetric; drop -asym, or use w2a16-asym"),
        ("w3a16int", "16-bit integer activations go with 8-bit integer weights"),
        ("w1.5a16", "weights of 1.5 bits are not available"),
        ("w3a16-nf4", "nf4 is a table for 4 bits; write w4a16-nf4"),
        ("w4a16-nf4-lut", "gives two kinds of tables; keep one of -lut, -nf4, -vq2 and -vq4"),
        ("w4a16-g48", "group size 48 has no kernel; known sizes: 16, 32, 64, 128, 256"),
        ("w4a16-g0", "group size 0 has no kernel"),
        ("w4a16-g32-g64", "gives two granularities"),
        ("w4a16-channel-g64", "gives two granularities"),
        ("w4a16-sym-asym", "says twice whether it is symmetric"),
        ("w4a16-sym-sym", "says twice whether it is symmetric"),
        ("w4a16-fast", "option '-fast' is not understood"),
        ("w4a16-", "option '-' is not understood"),
        ("w4a16 -sym", "'w4a16 ' is not understood"),
    ],
)
def test_what_is_no_scheme_is_refused_with_what_was_expected(text, message):
    with pytest.raises(SchemeError) as caught:
        Scheme.parse(text)
    assert message in str(caught.value)
    assert f"scheme '{text}'" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("cpu", "w4a16-g64-asym"),
        ("cuda", "w4a16-g32-sym"),
        ("tensorrt", "w4a16-g64-asym"),
        ("portable", "w4a16-g64-asym"),
    ],
)
def test_the_target_fills_in_what_was_left_open_and_nothing_else(target, expected):
    assert str(Scheme(4).resolve(target)) == expected
    for scheme in (Scheme(4, 128, True), Scheme(2, 0, False)):
        assert scheme.resolve(target) == scheme


def test_a_resolved_scheme_gives_the_spec_of_a_weight():
    assert Scheme.parse("w4a16-g64-asym").spec(100, "float16") == WeightSpec(4, 64, False, True, "float16")
    assert Scheme.parse("w8a16-channel-sym").spec(100, "float32") == WeightSpec(8, 100, True, True, "float32")
    assert not Scheme.parse("w4a16-g32-sym").spec(64, "float32", signed_scale=False).signed_scale
    three = Scheme.parse("w3a16-g32-sym").spec(64, "float32", signed_scale=False)
    assert (three.limits, three.format.container, three.stored_bits(64)) == ((1, 7), 4, 5.0)
    for open_scheme in (Scheme(4), Scheme(4, 64), Scheme(4, None, True)):
        with pytest.raises(SchemeError, match="has to be resolved for a target first"):
            open_scheme.spec(64, "float32")


def test_the_word_float_is_no_scheme():
    assert parse_optional_scheme(" Float ") is None
    assert parse_optional_scheme("w8a16") == Scheme(8)


NAMES = ("model.layers.3.mlp.down_proj", "node_linear_12", "layers.3.weight")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.layers.3.mlp.down_proj", True),
        ("node_linear_12", True),
        ("down_proj", False),
        ("re:down_proj", True),
        (r"re:layers\.3\.", True),
        ("re:^layers", True),  # the weight's name
        ("re:^down", False),
        ("", False),
        ("re:", True),  # matches everything, as the regular expression does
    ],
)
def test_a_pattern_is_an_exact_name_or_a_search_in_any_name(text, expected):
    assert Pattern(text).matches(NAMES) is expected


@pytest.mark.parametrize("text", ["re:(", "re:[", "re:*"])
def test_a_pattern_that_is_no_regular_expression_is_refused(text):
    with pytest.raises(SchemeError) as caught:
        Pattern(text)
    assert str(caught.value).startswith(f"pattern '{text}': ")


def decide(plan, role="linear", names=("a", "w")):
    return plan.scheme_for(role, names)


def test_roles_have_their_own_schemes():
    plan = SchemePlan(Scheme(4))
    assert [decide(plan, role)[0] for role in ("linear", "embedding", "lm_head")] == [Scheme(4), Scheme(8), Scheme(8)]
    nothing = SchemePlan(None, None, None)
    reasons = [decide(nothing, role) for role in ("linear", "embedding", "lm_head")]
    assert reasons == [
        (None, "left float (--scheme float)"),
        (None, "left float (--embedding float)"),
        (None, "left float (--lm-head float)"),
    ]


def test_ignore_beats_only_which_beats_overrides_of_which_the_last_wins():
    four, eight, two = Scheme(4), Scheme(8), Scheme(2)
    overrides = ((Pattern("re:a"), eight), (Pattern("a"), two), (Pattern("b"), None))
    plan = SchemePlan(four, overrides=overrides)
    assert decide(plan) == (two, "")
    assert decide(plan, names=("aa",)) == (eight, "")
    assert decide(plan, names=("b",)) == (None, "left float (--set b=float)")
    assert decide(plan, "embedding", ("a",)) == (two, "")
    assert decide(SchemePlan(four, ignore=(Pattern("w"),), overrides=overrides)) == (None, "ignored (--ignore w)")
    only = SchemePlan(four, only=(Pattern("re:^a$"),), overrides=overrides)
    assert decide(only) == (two, "")
    assert decide(only, names=("c",)) == (None, "not among --only")
    both = SchemePlan(four, only=(Pattern("a"),), ignore=(Pattern("w"),))
    assert decide(both) == (None, "ignored (--ignore w)")


def test_patterns_that_select_nothing_are_found():
    plan = SchemePlan(
        Scheme(4),
        ignore=(Pattern("a"), Pattern("x")),
        only=(Pattern("re:b"), Pattern("re:y")),
        overrides=((Pattern("w"), None), (Pattern("z"), None)),
    )
    assert plan.unmatched([("a", "w"), ("b",)]) == ["x", "re:y", "z"]
    assert plan.unmatched([]) == ["a", "x", "re:b", "re:y", "w", "z"]
    assert np.size(SchemePlan(Scheme(4)).unmatched([])) == 0


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("w8a8", "cpu", "w8a8-static-tensor-asym"),
        ("w8a8", "portable", "w8a8-static-tensor-asym"),
        ("w8a8", "tensorrt", "w8a8-static-tensor-sym"),
        ("w8a8-sym", "cpu", "w8a8-static-tensor-sym"),
        ("w8a8-asym", "tensorrt", "w8a8-static-tensor-asym"),
        ("w8a8-dynamic", "cpu", "w8a8-dynamic-token-sym"),
        ("w8a8-token", "cpu", "w8a8-dynamic-token-sym"),
        ("w8a8-dynamic-tensor", "cpu", "w8a8-dynamic-tensor-asym"),
        ("w8a8-fp8", "cuda", "w8a8-static-tensor-sym-fp8"),
        ("w8a8-head64", "cpu", "w8a8-head64-static-tensor-asym"),
        ("w8a16int", "portable", "w8a16int-static-tensor-asym"),
        ("w4a8", "cpu", "w4a8-g64-asym"),
        ("w4a8", "cuda", "w4a8-g32-sym"),
    ],
)
def test_the_target_fills_in_how_activations_are_quantized(text, target, expected):
    resolved = Scheme.parse(text).resolve(target)
    assert str(resolved) == expected
    assert resolved.resolve(target) == resolved
    assert resolved.spelled_out is (text != "w4a8")


def test_weights_that_meet_integers_have_one_positive_scale_a_channel():
    for text, reduced, head in (("w8a8", False, 0), ("w8a8-dynamic", True, 0), ("w8a8-head64", False, 64)):
        spec = Scheme.parse(text).resolve("cpu").spec(100, "float16", reduced=reduced)
        assert spec == WeightSpec(8, 100, True, False, "float16", head, reduced)
    assert Scheme.parse("w8a8-fp8").resolve("cuda").spec(64, "float32").fp8
    block = Scheme.parse("w4a8").resolve("cpu").spec(100, "float32", reduced=True)
    assert block == WeightSpec(4, 64, False)


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("w8a8", "cpu", ActivationSpec()),
        ("w8a8-sym", "cpu", ActivationSpec(symmetric=True)),
        ("w8a16int", "portable", ActivationSpec(16)),
        ("w8a8-fp8", "cuda", ActivationSpec(symmetric=True, fp8=True)),
    ],
)
def test_the_format_of_activations(text, target, expected):
    activations = Scheme.parse(text).resolve(target).activations
    assert activations.spec() == expected
    assert activations.spec(signed=True).signed


def test_a_scheme_with_float_activations_spells_nothing_out():
    assert not Scheme(8).spelled_out
    overrides = ((Pattern("a"), None), (Pattern("b"), Scheme(2)))
    assert SchemePlan(Scheme(4), None, Scheme(8), overrides=overrides).schemes == (Scheme(4), Scheme(8), Scheme(2))
    assert decide(SchemePlan(None), "conv") == (None, "left float (--scheme float)")


def test_ternary_weights_are_three_codes_of_two_bits():
    scheme = Scheme.parse("w1.58a16-g64").resolve("cpu")
    assert str(scheme) == "w1.58a16-g64-sym"
    assert Scheme.parse(str(scheme)) == scheme
    spec = scheme.spec(256, "float32")
    assert (spec.bits, spec.limits, spec.symmetric, spec.stored_bits(256)) == (2, (1, 3), True, 2.5)
    assert Scheme.parse("w1.58a8-g64").activations is not None
