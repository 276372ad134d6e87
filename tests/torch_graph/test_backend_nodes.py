"""The ONNX standard's own node tests, each case whose operators are all claimed."""

import re
import warnings
from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from tests.builders import parse, run
from tests.torch_graph.common import to_numpy, to_torch

pytestmark = pytest.mark.torch

# What the standard's preview defines expands into the standard's own operators.
STANDARD = sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain in ("", "ai.onnx.preview")})
# Cases of claimed operators that are refused, each for a reason.
FLOAT4 = "PyTorch has no 4-bit floats"
EXPONENT = "PyTorch computes nothing with 8-bit exponents"
TEXT = "PyTorch has no strings"
NO_TENSOR = "the values are sequences or optional, not tensors"
TRAINING = "only inference is implemented"
REFUSED = {
    "test_batchnorm_example_training_mode": TRAINING,
    "test_batchnorm_epsilon_training_mode": TRAINING,
    "test_training_dropout_default": TRAINING,
    "test_training_dropout_default_mask": TRAINING,
    "test_training_dropout": TRAINING,
    "test_training_dropout_mask": TRAINING,
    "test_scan_sum": "version 8 of Scan had a batch axis; nothing exports it any more",
    "test_identity_sequence": NO_TENSOR,
    "test_identity_opt": NO_TENSOR,
    "test_equal_string": TEXT,
    "test_equal_string_broadcast": TEXT,
    "test_dequantizelinear_float4e2m1": FLOAT4,
    "test_quantizelinear_float4e2m1": FLOAT4,
    **{
        f"test_cast{form.format(types)}": FLOAT4
        for types in ("FLOAT_to_FLOAT4E2M1", "FLOAT16_to_FLOAT4E2M1", "FLOAT4E2M1_to_FLOAT", "FLOAT4E2M1_to_FLOAT16")
        for form in ("_{}", "like_{}", "like_{}_expanded")
    },
    **{
        f"test_cast_e8m0_{types}": EXPONENT
        for types in ("FLOAT_to_FLOAT8E8M0", "FLOAT16_to_FLOAT8E8M0", "FLOAT8E8M0_to_FLOAT", "FLOAT8E8M0_to_FLOAT16")
    },
}
# Their tolerance, 0.001, is below the spacing of half precision where values have been rounded several times: the
# standard does not say after which operation. Two steps of the type are allowed.
HALF = {"fp16": 2**-9, "bf16": 2**-6}
HALF_CASES = re.compile(r"test_attention_.*_(fp16|bf16)(_expanded.*)?")
# Claimed operators without a case of their own.
OTHER_ORACLE = {
    "GlobalLpPool": "test_older_versions.py",
    "SimplifiedLayerNormalization": "test_contrib.py",
}


@pytest.fixture(scope="module")
def cases():
    """Name -> case of the node tests; making them takes seconds."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():  # some compute with infinities on purpose
        warnings.simplefilter("ignore")
        return {case.name: case for case in load_model_tests(kind="node")}


@pytest.fixture(scope="module")
def claimed():
    from qcompiler.torch_graph import supported_ops

    return {name for name, _ in supported_ops()[""]}


def operators(graph):
    """Domain and name of every operator in a graph, those in bodies included."""
    found = set()
    for node in graph.node:
        found.add((node.domain, node.op_type))
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found |= operators(attribute.g)
    return found


def subject(case, cases):
    """The operator that a case is about; the expanded form of a function is about the function."""
    plain = cases.get(re.sub(r"_expanded.*$", "", case.name), case)
    return plain.model.graph.node[0].op_type if len(plain.model.graph.node) else ""


def is_claimed(case, claimed):
    return all(domain == "" and name in claimed for domain, name in operators(case.model.graph))


def as_array(value):
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def fits(given, dtype):
    """Where a narrow integer type holds what is cast to it; elsewhere ONNX leaves the result open."""
    limits, whole = ml_dtypes.iinfo(dtype), np.trunc(given.astype(np.float32))
    return (whole >= limits.min) & (whole <= limits.max)


def check(case):
    """Run a case and compare its outputs with those expected, types and shapes included."""
    from qcompiler.torch_graph import TorchGraph

    model = ir.serde.deserialize_model(case.model)
    graph = TorchGraph.from_model(model)
    half = HALF_CASES.fullmatch(case.name)
    rtol = max(case.rtol, HALF[half[1]] if half else 0)
    for inputs, outputs in case.data_sets:
        named = zip(model.graph.inputs, inputs, strict=False)
        feeds = {value.name: to_torch(as_array(array)) for value, array in named}
        results = graph.run(feeds)
        for value, expected in zip(model.graph.outputs, map(as_array, outputs), strict=True):
            ours = to_numpy(results[value.name])
            assert ours.shape == expected.shape
            with np.errstate(invalid="ignore"):  # NaN of an 8-bit float
                if "_cast" in case.name and expected.dtype.name.endswith(("int4", "int2")):
                    kept = fits(as_array(inputs[0]), expected.dtype)
                    ours, expected = ours[kept], expected[kept]
                if expected.dtype.isbuiltin != 1:
                    expected = expected.astype(np.float32)  # a type of ml_dtypes
                else:
                    assert ours.dtype == expected.dtype
                np.testing.assert_allclose(ours, expected, rtol=rtol, atol=case.atol)


@pytest.mark.parametrize("name", STANDARD)
def test_claimed_cases_pass(name, cases, claimed):
    own = [case for case in cases.values() if subject(case, cases) == name and is_claimed(case, claimed)]
    if name not in claimed:
        # Its expansion into claimed operators may still run.
        assert all("_expanded" in case.name for case in own)
    for case in own:
        if case.name not in REFUSED:
            try:
                check(case)
            except Exception as error:
                raise AssertionError(f"{case.name}: {error}") from error


@pytest.mark.parametrize(("kind", "opset"), [("INT4", 23), ("UINT4", 23), ("INT2", 25), ("UINT2", 25)])
def test_what_does_not_fit_wraps_as_in_onnx_runtime(kind, opset):
    from qcompiler.torch_graph import TorchGraph

    number = getattr(onnx.TensorProto, kind)
    body = f"c = Cast <to = {number}> (x) y = Cast <to = 1> (c)"
    model = parse(f"g (float[25] x) => (float[25] y) {{ {body} }}", opset=opset, ir_version=12 if opset > 23 else 10)
    x = np.arange(-9, 16, dtype=np.float32)
    assert np.array_equal(TorchGraph.from_model(model).run({"x": to_torch(x)})["y"].numpy(), run(model, {"x": x})[0])


def test_no_claimed_case_is_left_out(cases, claimed):
    own = [case for case in cases.values() if is_claimed(case, claimed)]
    assert {subject(case, cases) for case in own} <= set(STANDARD)
    assert len(own) > 500  # a loader that found nothing would let everything pass


def test_list_of_refusals_is_exact(cases, claimed):
    from qcompiler.errors import KernelError

    for name in REFUSED.keys() & cases.keys():  # which cases there are depends on the version of onnx
        assert is_claimed(cases[name], claimed), name
        with pytest.raises(KernelError):
            check(cases[name])


def test_what_is_not_claimed_is_refused_by_name(cases, claimed):
    from qcompiler.torch_graph import unsupported

    for case in cases.values():
        if is_claimed(case, claimed):
            continue
        model = ir.serde.deserialize_model(case.model)
        problems = "\n".join(unsupported(list(model.graph), model.opset_imports))
        assert problems, case.name
        for node in case.model.graph.node:
            if node.domain or node.op_type not in claimed:
                assert f"{node.domain or 'ai.onnx'}.{node.op_type} '" in problems, case.name


def test_every_claimed_operator_has_an_oracle(cases, claimed):
    passing = Counter(
        node.op_type
        for case in cases.values()
        if case.name not in REFUSED and is_claimed(case, claimed)
        for node in case.model.graph.node
    )
    assert claimed - passing.keys() == OTHER_ORACLE.keys()
