"""The operator writes the codes that numpy makes of what it wrote before, and attends to them."""

import numpy as np
import pytest

from qcompiler.driver import compile_model
from qcompiler.errors import CalibrationError, SchemeError
from tests.builders import apply, context, normal, parse, run, serialized, text_of

HEADS, KV_HEADS, SIZE, VOCABULARY = 4, 2, 16, 512
HIDDEN = HEADS * SIZE
CACHES = ("past_key_values.0.key", "past_key_values.0.value", "present.0.key", "present.0.value")


def decoder(size=SIZE, cache="float", behind=""):
    """Token ids to logits through one GroupQueryAttention with rotary embedding; `behind` are nodes after it."""
    hidden = HEADS * size
    text = f"""g (int64[B,S] input_ids, int64[B,T] attention_mask, {cache}[B,{KV_HEADS},P,d] past_k,
        {cache}[B,{KV_HEADS},P,d] past_v) => (float[B,S,{VOCABULARY}] logits, {cache}[B,{KV_HEADS},T,d] present_k,
        {cache}[B,{KV_HEADS},T,d] present_v) {{
        h = Gather(table, input_ids)
        [qkv] packed = MatMul(h, wqkv)
        total = ReduceSum <keepdims = 0> (attention_mask, axis)
        last = Sub(total, one)
        seqlens = Cast <to = 6> (last)
        longest = ReduceMax <keepdims = 0> (total)
        length = Cast <to = 6> (longest)
        [attend] a, present_k, present_v = com.microsoft.GroupQueryAttention
            <num_heads = {HEADS}, kv_num_heads = {KV_HEADS}, do_rotary = 1>
            (packed, , , past_k, past_v, seqlens, length, cos, sin)
        {behind}
        [head] logits = MatMul(a, wh)
    }}"""
    angle = np.arange(64)[:, None] / 100 ** (np.arange(size // 2) / (size // 2))
    weights = {
        "table": normal((VOCABULARY, hidden), 0),
        "wqkv": normal((hidden, hidden + 2 * KV_HEADS * size), 1, scale=hidden**-0.5),
        "wh": normal((hidden, VOCABULARY), 2, scale=hidden**-0.5),
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
        "axis": np.array([1], np.int64),
        "one": np.array(1, np.int64),
    }
    model = parse(text, weights)
    for name, new in zip(("past_k", "past_v"), CACHES[:2], strict=True):
        next(value for value in model.graph.inputs if value.name == name).name = new
    for value, new in zip(model.graph.outputs[1:], CACHES[2:], strict=True):
        value.name = new
    return model


def feeds(length=9, seed=0, size=SIZE, dtype=np.float32):
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (1, length))
    empty = np.zeros((1, KV_HEADS, 0, size), dtype)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), CACHES[0]: empty, CACHES[1]: empty}


def attention(model):
    return next(node for node in model.graph if node.op_type == "GroupQueryAttention")


def quantize(model, kind="kv8", count=4, **options):
    batches = [feeds(seed=seed) for seed in range(count)]
    return apply("quantize_kv_cache", model, context(batches=batches, kv_cache=kind), **options)


def decoded(codes, scale, bits):
    """An independent reading: the low half of a byte is the even channel, and 8 means zero."""
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:3], -1).astype(np.int32) - 8
    return codes.astype(np.float32) * scale


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_operator_writes_the_nearest_codes(bits, granularity):
    given = feeds(seed=9)
    _, *want = run(decoder(), given)
    model = decoder()
    result = quantize(model, f"kv{bits}", granularity=granularity)
    assert result.modified
    node = attention(model)
    scales = [node.inputs[index].const_value.numpy() for index in (12, 13)]
    assert [s.shape for s in scales] == [(1, KV_HEADS, 1, SIZE) if granularity == "channel" else (1,)] * 2
    dtype, width = (np.int8, SIZE) if bits == 8 else (np.uint8, SIZE // 2)
    _, *got = run(model, feeds(seed=9, size=width, dtype=dtype))
    reach = 2 ** (bits - 1)
    for values, codes, scale in zip(want, got, scales, strict=True):
        assert (codes.dtype, codes.shape[-1]) == (dtype, width)
        nearest = np.clip(np.rint(values / scale), -reach, reach - 1)
        np.testing.assert_allclose(decoded(codes, scale, bits), nearest * scale, rtol=1e-6)


def test_the_scales_of_8_bits_meet_the_largest_magnitude_of_every_channel():
    batches = [feeds(seed=seed) for seed in range(4)]
    keys = np.concatenate([run(decoder(), batch)[1] for batch in batches], 2)
    model = decoder()
    quantize(model)
    scale = attention(model).inputs[12].const_value.numpy()
    np.testing.assert_allclose(scale * 127, np.abs(keys).max((0, 2), keepdims=True), rtol=1e-6)


def test_4_bits_clip_where_that_costs_less():
    batches = [feeds(seed=seed) for seed in range(4)]
    values = np.concatenate([run(decoder(), batch)[2] for batch in batches], 2)
    model = decoder()
    quantize(model, "kv4")
    scale = attention(model).inputs[13].const_value.numpy()
    plain = np.abs(values).max((0, 2), keepdims=True) / 7

    def loss(s):
        return np.square(np.clip(np.rint(values / s), -7, 7) * s - values).sum((0, 2))

    assert (loss(scale) <= loss(plain) * 1.0001).all()
    assert loss(scale).sum() < 0.95 * loss(plain).sum()


def test_the_model_takes_and_gives_codes():
    model = decoder()
    result = quantize(model, "kv4")
    kinds = {value.name: (value.dtype.name, value.shape[3]) for value in (*model.graph.inputs, *model.graph.outputs)
             if value.name in CACHES}  # fmt: skip
    assert kinds == dict.fromkeys(CACHES, ("UINT8", SIZE // 2))
    node = attention(model)
    assert (node.attributes["k_quant_type"].as_string(), node.attributes["kv_cache_bit_width"].as_int()) == (
        "PER_CHANNEL", 4,
    )  # fmt: skip
    (record,) = result.records
    assert (record.site, record.action, record.spec) == ("attend", "quantized", "kv4-channel")
    assert 14 < record.metrics["key_sqnr_db"] < 30
    assert text_of(model)[7].endswith("cos, sin, , , , present.0.key_scale, present.0.value_scale)")


@pytest.mark.parametrize(("kind", "floor_db"), [("kv8", 35), ("kv4", 12)])
def test_a_second_piece_attends_to_the_codes(kind, floor_db):
    """In two pieces and in one the answer is the same: what is attended to are codes in either case."""
    model = decoder()
    quantize(model, kind, count=64)
    dtype, width = (np.int8, SIZE) if kind == "kv8" else (np.uint8, SIZE // 2)
    whole = feeds(seed=99, size=width, dtype=dtype)
    want, keys, values = run(model, whole)
    ids = whole["input_ids"]
    _, *past = run(model, whole | {"input_ids": ids[:, :5], "attention_mask": np.ones((1, 5), np.int64)})
    rest = dict(zip(CACHES[:2], past, strict=True)) | {"input_ids": ids[:, 5:], "attention_mask": np.ones_like(ids)}
    got, *present = run(model, rest)
    np.testing.assert_allclose(got, want[:, 5:], atol=1e-4)
    assert np.array_equal(present[0], keys)
    assert np.array_equal(present[1], values)
    exact = run(decoder(), feeds(seed=99))[0]
    error_db = 10 * np.log10(np.square(exact).sum() / np.square(exact - want).sum())
    assert error_db > floor_db


REFUSED = {
    "read by another operator": ({"behind": "b = Neg(present_k)"}, "its cache 'present.0.key' is read by Neg"),
    "quantized already": ({"cache": "int8"}, "its cache is quantized already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_float_is_recorded_with_its_reason(case):
    options, reason = REFUSED[case]
    model = decoder(**options)
    before = serialized(model)
    result = quantize(model)
    assert not result.modified
    assert [(r.site, r.action, r.reason) for r in result.records] == [("attend", "skipped", reason)]
    assert serialized(model) == before


def test_a_cache_of_its_own_making_stays_float():
    model = decoder(behind="")
    node = attention(model)
    made = parse("g (float[1] x) => (float[1] y) { y = Identity(x) }").graph[0]
    past = node.inputs[3]
    copy = made.__class__("", "Identity", [past])
    copy.outputs[0].name, copy.outputs[0].type = "copied", past.type
    model.graph.insert_before(node, copy)
    node.replace_input_with(3, copy.outputs[0])
    (record,) = quantize(model).records
    assert record.reason == "its cache 'copied' is not an input of the model that it alone reads"


def test_a_graph_without_the_operator_says_so():
    model = parse("g (float[2,8] x) => (float[2,8] y) { y = Exp(x) }")
    result = apply("quantize_kv_cache", model, context(kv_cache="kv8"))
    assert not result.modified
    (record,) = result.records
    assert record.action == "skipped"
    assert record.reason.startswith("no GroupQueryAttention")


def test_scales_need_data():
    with pytest.raises(CalibrationError, match="give --calibration PATH"):
        apply("quantize_kv_cache", decoder(), context(kv_cache="kv8"))
    with pytest.raises(SchemeError, match="choose one of float, kv8, kv4"):
        context(kv_cache="kv2")
    with pytest.raises(SchemeError, match="give --kv-cache kv8 or kv4"):
        quantize(decoder(), "float")
    with pytest.raises(SchemeError, match="granularity row is unknown"):
        quantize(decoder(), granularity="row")


@pytest.mark.parametrize(("kind", "floor_db"), [("kv8", 25), ("kv4", 8)])
def test_a_compiled_model_is_verified_though_its_inputs_are_others(tmp_path, kind, floor_db):
    """The cache outputs are decoded: their SQNR is that of 8 and 4 bits, not of codes against floats."""
    path = tmp_path / "decoder.onnx"
    path.write_bytes(serialized(decoder()))
    rows = [{"input_ids": feeds(20, seed)["input_ids"]} | {n: feeds(20)[n] for n in CACHES[:2]} for seed in range(10)]
    rows = [row | {"attention_mask": np.ones_like(row["input_ids"])} for row in rows]
    result = compile_model(
        path, "w8a16", calibration=rows, output=tmp_path / "out.onnx", kv_cache=kind, threads=1, accuracy_level=0
    )
    found = {metrics.name: metrics for metrics in result.report.verification.outputs}
    assert found["present* (2 outputs)"].kind == "cache"
    assert floor_db < found["present* (2 outputs)"].sqnr_db < 50
    assert found["logits"].sqnr_db > floor_db
    assert result.report.config.recipe()["kv_cache"] == kind
