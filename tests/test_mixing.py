"""Formats to choose from, weights that share one, and what the rest of a file takes."""

import itertools

import pytest

from qcompiler.config import CompileConfig
from qcompiler.files.saver import save_model
from qcompiler.mixing import fixed_bytes, formats_of, layer_of, units_of
from qcompiler.numerics.allocation import Choice
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.sites import find_sites
from qcompiler.targets import form_bytes, lowered_bytes
from tests.builders import apply, context, decoder, linear_model, quantized, the_site

SCHEME = Scheme.parse("w4a16-g64-asym").resolve("cpu")


def formats(K=1536, N=24, opset=21, **config):
    return formats_of(the_site(linear_model(K, N)), SCHEME, opset, CompileConfig(**config))


def test_formats_go_from_small_to_large_and_end_with_float():
    found = formats()
    assert [str(scheme) for scheme in found.schemes[:-1]] == [
        "w2a16-g256-asym", "w2a16-g128-asym", "w2a16-g64-asym", "w2a16-g32-asym", "w2a16-g16-asym",
        "w4a16-g256-asym", "w4a16-g128-asym", "w4a16-g64-asym", "w4a16-g32-asym",
        "w8a16-g256-asym", "w8a16-g128-asym", "w8a16-g64-asym",
    ]  # fmt: skip
    assert found.schemes[-1] is None
    assert all(later > earlier for earlier, later in itertools.pairwise(found.sizes))
    assert found.sizes[-1] == 32 * 1536 * 24
    assert found.sizes[:-1] == [8 * lowered_bytes(spec, 24, 1536) for spec in found.specs]


def test_a_larger_group_that_saves_nothing_is_left_out():
    """576 is 4.5 groups of 128, which are stored as 5."""
    assert not any(scheme.bits == 4 and scheme.group_size > 64 for scheme in formats(K=576).schemes[:-1])


def test_three_bits_are_a_format_only_where_they_are_asked_for_and_count_as_the_four_they_take():
    assert not any(scheme.bits == 3 for scheme in formats().schemes[:-1])
    asked = Scheme.parse("w3a16-g64-asym").resolve("cpu")
    found = formats_of(the_site(linear_model(1536, 24)), asked, 21, CompileConfig())
    sizes = dict(zip(map(str, found.schemes), found.sizes, strict=True))
    assert sizes["w3a16-g64-asym"] == sizes["w4a16-g64-asym"]


def test_float16_halves_scales_and_floats():
    found = formats(float16=True)
    assert found.sizes[-1] == 16 * 1536 * 24
    assert all(spec.scale_dtype == "float16" for spec in found.specs)


@pytest.mark.parametrize(("opset", "widths"), [(21, {4, 8}), (25, {2, 4, 8}), (17, set())])
def test_qdq_has_the_formats_of_its_opset(opset, widths):
    found = formats(opset=opset, output_format="qdq")
    assert {scheme.bits for scheme in found.schemes[:-1]} == (widths or {4})
    if not widths:  # raise_opset has made room for the scheme that was asked for
        assert found.schemes[:-1] == [SCHEME]


@pytest.mark.parametrize(
    "scheme",
    ["w4a16-g64-asym", "w3a16-g64-asym", "w3a16-channel-sym", "w8a16-g32-sym", "w2a16-g16-asym", "w4a16-channel-asym"],
)
@pytest.mark.parametrize("K", [64, 100])
def test_form_bytes_of_qdq_are_those_of_the_constants(scheme, K):
    ctx = context(scheme=scheme, output_format="qdq", opset=25)
    model = linear_model(K, 24, opset=25)
    quantized(model, ctx)
    spec = the_site(model).quantized.spec
    expected = form_bytes(the_site(model), spec, ctx.config)
    before = set(model.graph.initializers)
    apply("export_qdq", model, ctx)
    made = [value.const_value for name, value in model.graph.initializers.items() if name not in before]
    assert sum(tensor.nbytes for tensor in made) == expected


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.down_proj", "model.layers.3"),
        ("model.layers.31.mlp.down_proj", "model.layers.31"),
        ("/model/layers.3/attn/q_proj/MatMul", "/model/layers.3"),
        ("l0_q", "l0"),
        ("lm_head", ""),
    ],
)
def test_layers_by_name(name, layer):
    assert layer_of(name) == layer


def mixed_decoder():
    found = []
    for number, site in enumerate(find_sites(decoder(layers=2, hidden=64, inner=128))[0]):
        one = formats_of(site, SCHEME, 21, CompileConfig())
        one.losses, one.trial_loss, one.trial_cost = [float(2**-at) for at in range(len(one.sizes))], 2.0, number + 1.0
        found.append(one)
    return found


def test_units():
    sites = mixed_decoder()
    names = {
        kind: [[one.site.name for one in unit.members] for unit in units_of(sites, kind)]
        for kind in ("site", "reading", "layer")
    }
    assert names["site"] == [[one.site.name] for one in sites]
    assert [n for n in names["reading"] if "l0_q" in n] == [["l0_q", "l0_k", "l0_v"]]
    assert [n for n in names["layer"] if len(n) > 1] == [
        [f"l{layer}_{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")] for layer in range(2)
    ]
    assert sum(map(len, names["layer"])) == len(sites)


def test_a_unit_offers_what_all_of_it_can_be():
    sites = mixed_decoder()
    for kind in ("reading", "layer"):
        for unit in units_of(sites, kind):
            assert unit.schemes[-1] is None
            for scheme, choice in zip(unit.schemes, unit.choices, strict=True):
                each = [one.choices()[one.schemes.index(scheme)] for one in unit.members]
                assert choice == Choice(sum(c.size for c in each), pytest.approx(sum(c.loss for c in each)))


@pytest.mark.parametrize("scheme", ["w4a16-g64-asym", "w4a16-g64-lut", "w2a16-g64-vq2", "w3a16-g64-asym", "w1a16-g64"])
def test_the_rest_of_the_file_is_foretold(tmp_path, scheme):
    """To an eighth of what it is, and rather too much than too little; bodies are a matter of a few kilobytes."""
    model = decoder(layers=4, hidden=64, inner=96)
    plan = SchemePlan(Scheme.parse(scheme), Scheme(8), Scheme(8))
    ctx = context(plan=plan, max_size=10**7, custom_ops="never" if scheme == "w4a16-g64-asym" else "always")
    apply("assign_scheme", model, ctx)
    sites, codes = [site for site in find_sites(model)[0] if site.role == "linear"], 0
    for site in sites:
        found = formats_of(site, plan.default.resolve("cpu"), 21, ctx.config)
        codes += found.sizes[found.schemes.index(found.asked)] // 8
    expected = codes + fixed_bytes(model, sites, ctx.config)
    for name in ("codebook", "rtn", "fuse_custom", "fuse_matmul_nbits", "fuse_gather", "cleanup"):
        apply(name, model, ctx)
    files = save_model(model, tmp_path / "m.onnx", force=False)
    written = sum(file.stat().st_size for file in files)
    assert written <= expected <= written + (written - codes) / 8 + 7200
