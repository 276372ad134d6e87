import json
import math
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from qcompiler import __version__
from qcompiler.bench import BenchResult
from qcompiler.config import CompileConfig
from qcompiler.records import PassReport, SiteRecord
from qcompiler.report import CompileReport, Excluded, SiteRow, merge_records, verification_table
from qcompiler.report_meaning import scheme_meaning
from qcompiler.scheme import Scheme
from qcompiler.scheme_plan import SchemePlan
from qcompiler.verify import AccuracyLevelCost, RunResult, Verification
from qcompiler.verify_integers import IntegerAudit, Unfused
from qcompiler.verify_outputs import Closeness, OutputMetrics

CPU = "CPUExecutionProvider"
DATA = SimpleNamespace(description="64 rows of 512 tokens from text.npy, 8 held out", digest="ab" * 32, synthetic=False)
CLOSE = Closeness(20.1, 0.0123, 0.953)


def site(layer, name="mlp.down_proj"):
    return f"model.layers.{layer}.{name}"


def passes(layers=6, loss=True):
    assigned = [SiteRecord(site(layer), "assigned", "w4a16-g64-asym") for layer in range(layers)]
    assigned += [
        SiteRecord("model.embed_tokens", "assigned", "w8a16-g64-asym"),
        SiteRecord("lm_head", "skipped", reason="left float (--lm-head float)"),
        SiteRecord("conv[0]", "skipped", reason="a convolution of 4 groups is not one matrix"),
        SiteRecord("conv[1]", "skipped", reason="a convolution of 4 groups is not one matrix"),
    ]
    quantized = []
    for layer in range(layers):
        metrics = {"sqnr_db": 20.0 + layer, "bits_per_weight": 4.5625}
        metrics |= {"loss": 10.0, "relative_loss": 0.01 / (layer + 1)} if loss else {}
        quantized.append(SiteRecord(site(layer), "quantized", "w4a16-g64-asym", metrics=metrics))
    remark = "a lookup table has no activations, rounded to nearest"
    figures = {"sqnr_db": 43.5, "bits_per_weight": 8.625, "seconds": 0.5, "damping": 0.1}
    quantized.append(SiteRecord("model.embed_tokens", "quantized", "w8a16-g64-asym", remark, figures))
    fused = [SiteRecord(site(layer), "fused", "w4a16-g64-asym", "MatMulNBits, block 64") for layer in range(layers)]
    return [
        PassReport("canonicalize", 0.01, 50_000_000, True, (SiteRecord("model", "rewritten", reason="2 inlined"),)),
        PassReport("assign_scheme", 0.02, 50_000_000, True, tuple(assigned)),
        PassReport("gptq", 12.5, 700_000_000, True, tuple(quantized)),
        PassReport("fuse_matmul_nbits", 0.2, 400_000_000, True, tuple(fused)),
    ]


def verification(**changes):
    outputs = (OutputMetrics("logits", "logits", 2048, 20.1, 0.0123, 0.5, 0.953, 7.25),)
    runs = (RunResult(CPU, False, CLOSE), RunResult(CPU, True, CLOSE))
    cost = AccuracyLevelCost(1, CLOSE, Closeness(20.3, 0.0119, 0.957))
    found = Verification(
        outputs, runs, 20.1, 0.0123, 0.953, cost, {CPU: {"MatMulNBits": 211, "MatMul": 30}}, 4, 64,
        ("something is slow",), 11.5, 700_000_000, False,
    )  # fmt: skip
    return replace(found, **changes)


def report(config=None, data=DATA, **options):
    config = config or CompileConfig(algorithms=("gptq",), threads=2, samples=64, seed=7)
    made = CompileReport(config, "model.onnx", passes(**options), data, 538_000_000, 174_000_000)
    made.finish(30.2, 812_000_000, 178_000_000)
    return made


def printed(made, width=80, **options):
    text = StringIO()
    made.table(Console(file=text, width=width), **options)
    return text.getvalue()


def test_it_says_what_came_from_checkpoints_and_the_model_does_not():
    made, plain = report(), report()
    made.checkpoints = {"gptq": (5, 7), "learned_rounding": (0, 6)}
    assert made.to_dict()["checkpoints"] == {
        "gptq": {"recalled": 5, "sites": 7},
        "learned_rounding": {"recalled": 0, "sites": 6},
    }
    assert "gptq: 5 of 7 sites came from checkpoints\n" in printed(made)
    assert "learned_rounding: " not in printed(made)
    assert plain.to_dict()["checkpoints"] == {}
    assert made.metadata() == plain.metadata()


# Sites.


def test_a_site_is_one_row_whatever_the_number_of_passes():
    made = report()
    assert [row.site for row in made.sites] == [
        *(site(layer) for layer in range(6)),
        "model.embed_tokens",
        "lm_head",
        "conv[0]",
        "conv[1]",
    ]
    first = made.sites[0]
    assert (first.action, first.scheme, first.form) == ("quantized", "w4a16-g64-asym", "MatMulNBits, block 64")
    assert (first.sqnr_db, first.bits_per_weight, first.loss, first.relative_loss) == (20.0, 4.5625, 10.0, 0.01)
    table = made.sites[6]
    assert (table.seconds, table.metrics) == (0.5, {"damping": 0.1})
    assert table.reason == "a lookup table has no activations, rounded to nearest"
    assert made.quantized_sites == 7
    assert made.notes == ["model: 2 inlined"]


def test_two_sites_that_were_skipped_under_one_name_stay_two():
    rows, _, _ = merge_records(
        [SiteRecord("MatMul", "skipped", reason="a"), SiteRecord("MatMul", "skipped", reason="b")]
    )
    assert [row.reason for row in rows] == ["a", "b"]


def test_a_site_that_a_later_pass_refuses_is_skipped():
    refused = SiteRecord("a", "skipped", reason="an odd shape")
    (row,), _, _ = merge_records([SiteRecord("a", "assigned", "w4a16"), refused])
    assert (row.action, row.scheme, row.reason) == ("skipped", "", "an odd shape")


def test_remarks_of_several_passes_are_joined():
    records = [
        SiteRecord("a", "scaled", reason="alpha 0.5"),
        SiteRecord("a", "quantized", "w4a16", "damping grew to 1"),
    ]
    (row,), _, _ = merge_records(records)
    assert (row.action, row.reason) == ("quantized", "alpha 0.5; damping grew to 1")


def test_reasons_are_counted():
    made = report()
    assert made.skip_reasons() == [
        ("a convolution of 4 groups is not one matrix", 2),
        ("left float (--lm-head float)", 1),
    ]
    expected = "2 sites: a convolution of 4 groups is not one matrix; 1 site: left float (--lm-head float)"
    assert made.skip_summary() == expected
    empty = CompileReport(CompileConfig(), "m", [], None, 0, 0)
    assert empty.skip_summary().startswith("no MatMul, Gemm, Conv or Gather")


# The meaning of schemes.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "w4a16 on cpu means groups of 64, asymmetric, exact compute; embedding w8a16-g64-asym; lm_head float"),
        ({"target": "cuda"}, "w4a16 on cuda means groups of 32, symmetric, exact compute; embedding w8a16-g32-sym"),
        ({"accuracy_level": 4}, "w4a16 on cpu means groups of 64, asymmetric, int8 activations inside products"),
        ({"output_format": "qdq"}, "w4a16 on cpu means groups of 64, asymmetric; embedding"),
    ],
)
def test_schemes_are_spelled_out(options, expected):
    config = CompileConfig(plan=SchemePlan(Scheme(4), lm_head=None), **options)
    assert scheme_meaning(config).startswith(expected)


def test_other_schemes_are_spelled_out():
    channel = CompileConfig(plan=SchemePlan(Scheme.parse("w8a16-channel-sym")))
    assert "means one scale for each output channel, symmetric, int8 activations inside products" in scheme_meaning(
        channel
    )
    three = scheme_meaning(CompileConfig(plan=SchemePlan(Scheme(3), lm_head=None)))
    assert three.startswith(
        "w3a16 on cpu means groups of 64, asymmetric, 3-bit codes stored in 4 bits, exact compute; embedding"
    )
    assert scheme_meaning(CompileConfig(plan=SchemePlan(None))).startswith("float on cpu means weights as they are")


@pytest.mark.parametrize(
    ("scheme", "options", "expected"),
    [
        ("w8a8", {}, "one scale for each output channel, symmetric, uint8 activations, static, asymmetric"),
        ("w8a8-sym", {}, "symmetric, uint8 activations, static, symmetric"),
        ("w8a8-dynamic", {}, "symmetric, uint8 activations, computed for each token at run time, symmetric"),
        ("w8a8-dynamic-tensor", {}, "uint8 activations, computed for each tensor at run time, asymmetric"),
        ("w8a8", {"target": "tensorrt"}, "symmetric, int8 activations, static, symmetric"),
        ("w8a8-head4", {}, "one scale for each 4 output channels, symmetric, uint8 activations"),
        ("w8a8-fp8", {"target": "cuda"}, "float8_e4m3fn activations, static, symmetric"),
        ("w8a16int", {"target": "portable"}, "uint16 activations, static"),
        ("w4a8", {}, "groups of 64, asymmetric, int8 activations inside products"),
    ],
)
def test_schemes_of_activations_are_spelled_out(scheme, options, expected):
    config = CompileConfig(plan=SchemePlan(Scheme.parse(scheme)), **options)
    assert expected in scheme_meaning(config).partition(";")[0]
    assert "exact compute" not in scheme_meaning(config).partition(";")[0]


# Activations.


def encoded(name, spec="uint8", reason="mse", **figures):
    figures = figures or {"low": -1.0, "high": 2.0, "scale": 3 / 255, "zero_point": 85.0}
    return SiteRecord(name, "activation", spec, reason, figures)


def with_activations(*records):
    made = CompileReport(
        CompileConfig(), "model.onnx", [PassReport("insert_qdq", 1.0, 1, True, records)], None, 100, 50
    )
    made.finish(1.0, 1, 50)
    return made


def test_activations_are_no_sites():
    rows, activations, notes = merge_records([SiteRecord("a", "assigned", "w8a8"), encoded("a"), encoded("b")])
    assert ([row.site for row in rows], notes) == (["a"], [])
    assert rows[0].reason == ""
    assert [(row.value, row.format, row.method) for row in activations] == [
        ("a", "uint8", "mse"),
        ("b", "uint8", "mse"),
    ]
    assert (activations[0].low, activations[0].high, activations[0].zero_point) == (-1.0, 2.0, 85.0)


def test_activations_are_summed_up_in_one_line():
    records = [*(encoded(f"a{i}") for i in range(3)), encoded("b", reason="minmax")]
    records += [encoded(name, reason="mse/minmax, shared by 2 values") for name in "cd"]
    made = with_activations(*records)
    assert "\n6 activations quantized to uint8: 3 mse, 2 shared, 1 minmax\n" in printed(made)
    assert not [line for line in printed(made).splitlines() if line.startswith("a1 ")]
    mixed = with_activations(*records, encoded("e", "int8-sym"))
    assert mixed.activation_summary().startswith("7 activations quantized to uint8 (6) and int8-sym (1): 4 mse")
    assert with_activations(encoded("a")).activation_summary() == "1 activation quantized to uint8: 1 mse"
    assert report().activation_summary() == ""


def test_every_activation_has_its_line_if_wanted():
    dynamic = SiteRecord("t", "activation", "u8-token", "scaled at run time")
    lines = [line.split() for line in printed(with_activations(encoded("a[0]"), dynamic), every_site=True).splitlines()]
    assert ["a[0]", "uint8", "-1", "2", "0.01176", "85", "mse"] in lines
    assert ["t", "u8-token", "scaled", "at", "run", "time"] in lines


def test_activations_are_in_the_json():
    dynamic = SiteRecord("t", "activation", "u8-token", "scaled at run time")
    first, second = json.loads(with_activations(encoded("a"), dynamic).to_json())["activations"]
    assert first == {
        "value": "a", "format": "uint8", "low": -1.0, "high": 2.0, "scale": 3 / 255, "zero_point": 85.0,
        "method": "mse",
    }  # fmt: skip
    assert (second["low"], second["scale"], second["method"]) == (None, None, "scaled at run time")


# JSON.


def test_json_has_a_stable_form():
    made = report()
    made.verification = verification()
    read = json.loads(made.to_json())
    assert list(read) == [
        "schema", "model", "bytes", "recipe", "meaning", "calibration", "sites", "quantized", "skipped", "excluded",
        "checkpoints", "curve", "activations", "notes", "passes", "verification", "bench", "versions", "seconds",
        "peak_bytes",
    ]  # fmt: skip
    assert read["schema"] == 1
    assert read["calibration"] == {"description": DATA.description, "sha256": DATA.digest, "synthetic": False}
    assert list(read["sites"][0]) == [
        "site", "action", "scheme", "form", "bits_per_weight", "sqnr_db", "loss", "relative_loss", "seconds",
        "metrics", "reason",
    ]  # fmt: skip
    assert read["sites"][0]["relative_loss"] == 0.01
    assert read["verification"]["outputs"][0]["kl"] == 0.0123
    assert read["verification"]["accuracy_level"]["exact"]["kl"] == 0.0119
    assert read["verification"]["fused"] == {CPU: {"MatMulNBits": 211, "MatMul": 30}}
    assert {"qcompiler", "python", "onnx", "onnx-ir", "numpy"} <= set(read["versions"])
    assert read["passes"][2] == {"name": "gptq", "seconds": 12.5, "peak_bytes": 700_000_000, "modified": True}
    assert read["recipe"]["scheme"] == "w4a16"


def test_json_has_neither_infinity_nor_nan():
    made = report(data=None)
    made.verification = verification(sqnr_db=math.inf, kl=None, top1=-math.inf)
    made.sites[0].loss = math.nan
    read = json.loads(made.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert (read["verification"]["sqnr_db"], read["verification"]["top1"]) == (400.0, -400.0)
    assert read["sites"][0]["loss"] is None
    assert read["calibration"] is None


# Metadata.


def test_metadata_says_what_determines_the_model_and_nothing_else():
    found = report().metadata()
    assert found["qcompiler.version"] == __version__
    assert found["qcompiler.seed"] == "7"
    assert found["qcompiler.passes"] == "canonicalize,assign_scheme,gptq,fuse_matmul_nbits"
    assert found["qcompiler.calibration"] == DATA.description
    assert found["qcompiler.calibration.sha256"] == DATA.digest
    recipe = json.loads(found["qcompiler.recipe"])
    assert (recipe["scheme"], recipe["algorithms"], recipe["samples"]) == ("w4a16", ["gptq"], 64)
    assert "threads" not in recipe
    assert all(isinstance(text, str) for text in found.values())


def test_metadata_does_not_depend_on_the_run():
    one, other = report(), report(CompileConfig(algorithms=("gptq",), threads=5, samples=64, seed=7))
    other.finish(99.0, 1, 1)
    other.verification = verification()
    assert one.metadata() == other.metadata()
    assert "qcompiler.calibration" not in report(data=None).metadata()


# The table.


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("every_site", [False, True])
def test_the_table_fits_the_width_and_has_no_codes(width, every_site):
    made = report()
    made.verification = verification()
    text = printed(made, width, every_site=every_site)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "\x1b" not in text


def test_the_summary_groups_sites_and_names_the_worst():
    made = report()
    made.verification = verification()
    text = printed(made)
    assert "model.onnx  538.0 MB -> 174.0 MB (32.3 % of the weights' size)" in text
    assert "data: 64 rows of 512 tokens from text.npy, 8 held out" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["w4a16-g64-asym", "6", "4.56", "22.5", "20.0", "0.29", "%", "1.00", "%"] in lines
    assert ["w8a16-g64-asym", "1", "8.62", "43.5", "43.5"] in lines
    worst = [line[0] for line in lines if line and line[0].startswith("model.layers.")]
    assert worst == [site(layer) for layer in range(5)]
    assert ["logits", "20.1", "0.0123", "95.3", "%", "7.25"] in lines
    assert "CPU runs 211 MatMulNBits, 30 MatMul" in text
    assert "float instead of int8 activations in 1 node" in text
    assert "note: something is slow" in text
    assert "30.2 s (gptq 12.5, fuse_matmul_nbits 0.2, verification 11.5, the rest 6.0), peak memory 812.0 MB" in (
        " ".join(text.split())
    )


def test_without_losses_the_worst_sites_have_the_least_sqnr():
    text = printed(report(loss=False))
    lines = [line.split() for line in text.splitlines()]
    worst = [line[2] for line in lines if line and line[0].startswith("model.layers.")]
    assert worst == ["20.0", "21.0", "22.0", "23.0", "24.0"]
    assert "rel. loss" not in text


def test_skipped_sites_are_grouped_and_names_are_no_markup():
    lines = [line.split() for line in printed(report(), 100).splitlines()]
    assert ["a", "convolution", "of", "4", "groups", "is", "not", "one", "matrix", "2", "conv[0]"] in lines


def test_every_site_has_its_line_if_wanted():
    text = printed(report(), 120, every_site=True)
    for row in report().sites:
        assert row.site in text
    assert "worst sites" not in text
    assert "left float (--lm-head float)" in text


def test_random_inputs_are_called_that():
    text = StringIO()
    verification_table(verification(synthetic=True, accuracy_level=None, rows=1), Console(file=text, width=120))
    assert "compared with the float model on 1 row of random inputs" in text.getvalue()
    assert "int8" not in text.getvalue()


def test_exact_and_tiny_figures_are_readable():
    text = StringIO()
    outputs = (
        OutputMetrics("same", "logits", 4, math.inf, 0.0, 0.0, 1.0, 0.0),
        OutputMetrics("close", "logits", 4, 61.2, 1.5e-6, 1e-5, 1.0, 1e-3),
        OutputMetrics("best", "exact", 4, equal=0.75),
    )
    verification_table(verification(outputs=outputs), Console(file=text, width=120))
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["same", "exact", "0.0000", "100.0", "%", "0"] in lines
    assert ["close", "61.2", "1.5e-06", "100.0", "%", "0.001"] in lines
    assert ["best", "75.00", "%"] in lines


def test_what_became_of_encoders_is_counted():
    audit = IntegerAudit(10, 7, 1, {"QLinearConv": 3}, {"encodes a graph input": 1, "decodes a graph output": 3})
    left = Unfused("q", "QuantizeLinear", "between 'x' and Conv 'c'", "encodes a graph input", True)
    made = report()
    made.verification = verification(integers=audit, unfused=(left,))
    lines = printed(made).splitlines()
    at = lines.index("of 10 QuantizeLinear and DequantizeLinear ONNX Runtime fused 7; 3 and 1 that it ")
    assert [line.strip() for line in lines[at + 1 : at + 4]] == [
        "put in run", "1: encodes a graph input", "3: decodes a graph output",
    ]  # fmt: skip
    read = json.loads(made.to_json())["verification"]
    assert read["unfused"] == [
        {
            "node": "q", "operator": "QuantizeLinear", "place": "between 'x' and Conv 'c'",
            "reason": "encodes a graph input", "necessary": True, "remedy": "",
        }
    ]  # fmt: skip
    assert read["integers"]["kernels"] == {"QLinearConv": 3}


def test_times_and_what_was_left_out_are_shown():
    made = report()
    made.bench = (BenchResult("one row", {"x": [1, 3]}, 10.0, 4.0, 0.41, 0.39, 0.44),)
    made.excluded = (Excluded("head", math.inf, 12.34, 0.05),)
    lines = [line.split() for line in printed(made).splitlines()]
    assert ["one", "row", "10.00", "4.00", "0.41", "0.39", "to", "0.44"] in lines
    assert ["head", "exact", "12.3", "5.00", "%"] in lines
    read = json.loads(made.to_json())
    assert (read["bench"][0]["ratio"], read["bench"][0]["inputs"]) == (0.41, {"x": [1, 3]})
    assert read["excluded"] == [{"site": "head", "before_db": 400.0, "after_db": 12.34, "added": 0.05}]


def test_a_report_without_a_site_prints():
    made = CompileReport(CompileConfig(), "model.onnx", [], None, 0, 0)
    assert printed(made).startswith("model.onnx  0.0 MB -> 0.0 MB")
    assert json.loads(made.to_json())["sites"] == []


def test_the_scheme_is_the_one_that_was_chosen_last():
    row = SiteRow("a")
    row.update(SiteRecord("a", "assigned", "w4a16-g64-asym"))
    row.update(SiteRecord("a", "assigned", "w4a16-g64-lut"))
    assert row.scheme == "w4a16-g64-lut"
    row.update(SiteRecord("a", "fused", "", "MatMulCodebook16"))
    assert row.scheme == "w4a16-g64-lut"
    row.update(SiteRecord("a", "skipped", reason="left float"))
    assert row.scheme == ""
