"""What is decided for the runtimes, against the figures it was decided from."""

import numpy as np
import pytest

from qcompiler.numerics.affine import WeightSpec
from qcompiler.numerics.packing import pack_matmul_nbits
from qcompiler.scheme import GROUP_SIZES, Scheme
from qcompiler.sites import find_sites
from qcompiler.targets import IntegerRules, block_size, default_accuracy_level, fuses_bias, lowered_bytes, site_refusal
from tests.builders import context, linear_model, normal, parse, quantized, run, the_site


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_a_group_is_its_block(group):
    assert block_size(WeightSpec(4, group, True), 1000) == group


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("columns", [1, 31, 48, 100, 576, 1000, 4096])
def test_one_scale_a_row_is_stored_in_the_blocks_that_take_the_fewest_bits(bits, dtype, columns):
    spec = WeightSpec(bits, columns, True, True, dtype)
    scale_bits = {"float32": 32, "float16": 16}[dtype]
    width = 4 if bits == 3 else bits
    cost = {size: -(-columns // size) * (size * width + scale_bits) for size in (32, 64, 128, 256)}
    chosen = block_size(spec, columns)
    if columns not in GROUP_SIZES:
        assert cost[chosen] == min(cost.values())
    assert 4096 % chosen == 0


@pytest.mark.parametrize(
    "scheme",
    [
        "w4a16-g32-asym",
        "w3a16-g16-asym",
        "w3a16-channel-sym",
        "w2a16-g16-asym",
        "w8a16-channel-asym",
        "w4a16-channel-sym",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("K", [64, 77, 300])
def test_lowered_bytes_are_those_of_the_constants(scheme, dtype, K):
    from qcompiler.lowering import block_constants

    model = linear_model(K, 7, dtype=dtype)
    quantized(model, context(scheme=scheme))
    site = the_site(model)
    values = block_constants(site)
    total = sum(value.const_value.nbytes for value in values if value is not None)
    assert lowered_bytes(site.quantized.spec, 7, K) == total
    blob = pack_matmul_nbits(site.quantized.packed, site.quantized.spec.bits, K, block_size(site.quantized.spec, K), 0)
    assert blob.nbytes <= total


def test_exact_compute_is_the_default_where_there_is_a_kernel_for_it():
    assert [default_accuracy_level(bits) for bits in (2, 3, 4, 8)] == [4, 0, 0, 4]
    assert [fuses_bias(target) for target in ("cpu", "cuda", "tensorrt", "portable")] == [True, False, True, True]


def refusal(model, scheme, **options):
    return site_refusal(the_site(model), Scheme.parse(scheme), context(**options).config)


def test_what_a_target_cannot_run_is_refused_with_the_remedy_or_the_reason():
    table = parse("g (int64[B] i) => (float[B,32] y) { [t] y = Gather(w, i) }", {"w": normal((512, 32), 1)})
    assert refusal(table, "w4a16-g32") == ""
    assert refusal(table, "w4a16-channel") == ""
    assert refusal(table, "w4a16-g64") == "rows of 32 values are shorter than one group"
    qdq = refusal(table, "w4a16-g32", output_format="qdq")
    assert qdq == "no portable operator looks up 4-bit rows; use --embedding w8a16 or --embedding float"
    assert refusal(table, "w8a16-g32", output_format="qdq") == ""
    conv = parse("g (float[B,8,T] x) => (float[B,8,T] y) { [c] y = Conv(x, w) }", {"w": normal((8, 8, 1), 1)})
    assert refusal(conv, "w8a16-g32") == ""
    assert refusal(conv, "w8a16-g32", output_format="qdq") == (
        "a convolution behind DequantizeLinear runs slower than in float"
    )
    assert refusal(linear_model(10, 4), "w4a16-g256") == ""


def test_a_linear_site_shorter_than_its_group_runs_nevertheless():
    model = linear_model(10, 4)
    ctx = context(scheme="w4a16-g256-asym")
    quantized(model, ctx)
    x = normal((3, 10), 1)
    (half,) = run(model, {"x": x})
    from tests.builders import apply

    apply("fuse_matmul_nbits", model, ctx)
    assert np.allclose(run(model, {"x": x})[0], half, rtol=1e-5, atol=1e-5)


LINEAR, CONV = (
    linear_model,
    lambda dtype="float32": parse(
        "g (float[B,16,T] x) => (float[B,8,T] y) { [c] y = Conv(x, w) }", {"w": normal((8, 16, 3), 1, dtype)}
    ),
)


@pytest.mark.parametrize(
    ("build", "scheme", "target", "expected"),
    [
        (LINEAR, "w8a8", "cpu", ""),
        (LINEAR, "w8a8", "portable", ""),
        (LINEAR, "w8a8", "tensorrt", ""),
        (CONV, "w8a8", "cpu", ""),
        (CONV, "w8a8-sym", "tensorrt", ""),
        (LINEAR, "w8a8-dynamic", "cpu", ""),
        (LINEAR, "w8a8-fp8", "cuda", ""),
        (LINEAR, "w8a8-fp8", "tensorrt", ""),
        (LINEAR, "w8a16int", "portable", ""),
        (LINEAR, "w8a8-head8", "cpu", ""),
        (LINEAR, "w4a8", "cuda", ""),
        (
            LINEAR, "w8a8", "cuda",
            "ONNX Runtime's CUDA provider has no integer kernels; use w4a16, w8a8-fp8, or --target tensorrt",
        ),
        (
            LINEAR, "w8a8-dynamic", "cuda",
            "ONNX Runtime's CUDA provider has no integer kernels; use w4a16, w8a8-fp8, or --target tensorrt",
        ),
        (LINEAR, "w8a8-fp8", "cpu", "the CPU has no kernels for 8-bit floats; use w8a8, or --target cuda or tensorrt"),
        *(
            (LINEAR, "w8a16int", target,
             f"{target} has no kernel for 16-bit integer activations; use w8a8, or --target portable")
            for target in ("cpu", "tensorrt")
        ),
        (
            CONV, "w8a8-dynamic", "cpu",
            "a convolution whose input is quantized at run time is slower than in float; use the static w8a8",
        ),
        (CONV, "w8a16", "cpu", "a convolution with a kernel of [3] has no weight-only kernel"),
        (LINEAR, "w8a8-head7", "cpu", "24 output channels are not whole heads of 7"),
        (
            lambda: linear_model(dtype="bfloat16"), "w8a8", "cpu",
            "QuantizeLinear has no bfloat16 kernel; convert the model to float32",
        ),
        (
            lambda: linear_model(dtype="float16"), "w8a8-dynamic-tensor", "cpu",
            "DynamicQuantizeLinear has no float16 kernel; use w8a8-dynamic-token",
        ),
        (
            lambda: parse("g (int64[B] i) => (float[B,32] y) { [t] y = Gather(w, i) }", {"w": normal((512, 32), 1)}),
            "w8a8", "cpu", "a lookup has no activations to quantize; use --embedding w8a16",
        ),
    ],
)  # fmt: skip
def test_quantized_activations_that_a_target_cannot_run(build, scheme, target, expected):
    model = build()
    resolved = Scheme.parse(scheme).resolve(target)
    assert site_refusal(the_site(model), resolved, context(target=target).config) == expected


def test_blocks_of_activations_have_no_portable_form():
    reason = refusal(linear_model(), "w4a8-g32", output_format="qdq")
    assert reason == "no operator but MatMulNBits quantizes activations by blocks; use --format matmulnbits"


def test_the_rules_of_integer_operators():
    cpu, tensorrt = IntegerRules.of("cpu", fp8=False), IntegerRules.of("tensorrt", fp8=False)
    assert cpu == IntegerRules.of("portable", fp8=False) == IntegerRules(signed=False, followers=True, results=True)
    assert tensorrt == IntegerRules.of("cuda", fp8=True) == IntegerRules(signed=True, followers=False, results=False)
    nodes = list(
        parse("""g (float[1,8,6,6] x, float[8,8,3,3] w) => (float[1,8,6,6] y) {
        a = Conv(x, w) b = MaxPool <kernel_shape = [1, 1]> (a) c = Add(b, b) d = MatMul(c, c) y = Softmax(d)
    }""").graph
    )
    assert [cpu.result_is_quantized(node) for node in nodes] == [True, True, True, False, False]
    assert [tensorrt.result_is_quantized(node) for node in nodes[:1]] == [False]
    assert [cpu.moves(node) for node in nodes] == [False, True, False, False, False]
    assert [cpu.follows(node) for node in nodes] == [None, (0,), (), None, None]
    assert all(tensorrt.follows(node) is None for node in nodes)


def layer(inputs, outputs, kernel=3, group=1):
    return normal((outputs, inputs // group, kernel, kernel), 1)


@pytest.mark.parametrize(
    ("weights", "reasons"),
    [
        ([layer(3, 16)], ["a convolution of 3 channels is faster in float"]),
        ([layer(6, 16)], ["a convolution of 6 channels is faster in float"]),
        ([layer(8, 16)], [""]),
        ([layer(8, 80, 1)], [""]),
        ([layer(8, 64, 1)], ["the first convolutions, of few channels, gain little on integers and lose most"]),
        ([layer(64, 64), layer(64, 64, 3, 64)], ["", ""]),
        ([layer(64, 24), layer(24, 24, 3, 24)], ["", "a depthwise convolution of 24 channels is faster in float"]),
        ([layer(64, 16), layer(16, 16, 3, 16)], ["", "a depthwise convolution of 16 channels is faster in float"]),
        ([layer(64, 64), layer(64, 32, 1), layer(32, 32, 1)], ["", "", ""]),
        ([layer(4, 32, 1), layer(32, 32, 3, 32), layer(32, 48, 1), layer(48, 48)],
         ["the first convolutions, of few channels, gain little on integers and lose most"] * 3 + [""]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("gains", [True, False])
def test_convolutions_that_are_no_faster_on_integers(weights, reasons, gains):
    channels = [len(weight) for weight in weights]
    first = weights[0].shape[1]
    steps = []
    for i, (before, weight) in enumerate(zip([first, *channels], weights, strict=False)):
        pads = ", ".join([str(weight.shape[2] // 2)] * 4)
        steps.append(f"v{i + 1} = Conv <group = {before // weight.shape[1]}, pads = [{pads}]> (v{i}, w{i})")
    known = {f"w{i}": weight for i, weight in enumerate(weights)}
    tail = f"y = Conv(v{len(steps)}, last)" if gains else f"y = Relu(v{len(steps)})"
    if gains:
        known["last"] = normal((8, channels[-1], 12, 12), 3)
    model = parse(f"g (float[B,{first},H,W] v0) => (float[B,C,H,W] y) {{ {' '.join(steps)} {tail} }}", known)
    sites = find_sites(model)[0][: len(weights)]
    config = context(target="cpu").config
    found = [site_refusal(site, Scheme.parse("w8a8"), config) for site in sites]
    worthwhile = (gains and channels[-1] >= 32) or any(w[0].size >= 48 and w.shape[1] >= 32 for w in weights)
    assert found == (reasons if worthwhile else [""] * len(weights))
    portable = context(target="portable").config
    assert not any(site_refusal(site, Scheme.parse("w8a8"), portable) for site in sites)


def test_behind_a_global_pooling_integers_gain_nothing():
    text = """g (float[B,32,H,W] x) => (float[B,32,H,W] y) {
        p = GlobalAveragePool(x) a = Conv(p, w0) r = Relu(a) s = Conv(r, w1) h = HardSigmoid(s) y = Mul(x, h) }"""
    model = parse(text, {"w0": normal((8, 32, 1, 1), 1), "w1": normal((32, 8, 1, 1), 2)})
    found = [site_refusal(site, Scheme.parse("w8a8"), context(target="cpu").config) for site in find_sites(model)[0]]
    assert found == ["behind a global pooling a convolution is as fast in float"] * 2
