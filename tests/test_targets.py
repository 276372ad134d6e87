"""What is decided for the runtimes, against the figures it was decided from."""

import numpy as np
import pytest

from qcompiler.numerics.affine import WeightSpec
from qcompiler.numerics.packing import pack_matmul_nbits
from qcompiler.scheme import GROUP_SIZES, Scheme
from qcompiler.targets import block_size, default_accuracy_level, fuses_bias, lowered_bytes, site_refusal
from tests.builders import context, linear_model, normal, parse, quantized, run, the_site


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_a_group_is_its_block(group):
    assert block_size(WeightSpec(4, group, True), 1000) == group


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("columns", [1, 31, 48, 100, 576, 1000, 4096])
def test_one_scale_a_row_is_stored_in_the_blocks_that_take_the_fewest_bits(bits, dtype, columns):
    spec = WeightSpec(bits, columns, True, True, dtype)
    scale_bits = {"float32": 32, "float16": 16}[dtype]
    cost = {size: -(-columns // size) * (size * bits + scale_bits) for size in (32, 64, 128, 256)}
    chosen = block_size(spec, columns)
    if columns not in GROUP_SIZES:
        assert cost[chosen] == min(cost.values())
    assert 4096 % chosen == 0


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w2a16-g16-asym", "w8a16-channel-asym", "w4a16-channel-sym"])
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
    assert [default_accuracy_level(bits) for bits in (2, 4, 8)] == [4, 0, 4]
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
