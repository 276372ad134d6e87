"""Roles of inputs, what is filled in, what does not fit, and which rows a mask keeps."""

import numpy as np
import pytest

from qcompiler.calibration import row_mask
from qcompiler.calibration_inputs import ModelInputs, fitted
from qcompiler.errors import CalibrationError
from qcompiler.session import InputSpec

BS = ("batch", "seq")
IDS = InputSpec("input_ids", "int64", BS)
MASK = InputSpec("attention_mask", "int64", BS)
IMAGE = InputSpec("x", "float32", ("n", 3, 4, "w"))
IMAGE_ROW = np.zeros((1, 3, 4, 5), np.float32)


def cache(name: str = "past_key_values.0.key", size: int | str = 16, dtype: str = "float16") -> InputSpec:
    return InputSpec(name, dtype, ("batch", 3, "past", size))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["input_ids"], "input_ids"),
        (["Input_IDs:0"], "Input_IDs:0"),
        (["attention_mask", "position_ids", "tokens"], "tokens"),
        (["tokens", "input_ids"], "input_ids"),
        (["input"], "input"),
        (["attention_mask", "words"], "words"),
        (["words", "letters"], None),
        (["attention_mask", "token_type_ids"], None),
    ],
)
def test_the_ids_input_is_found_by_rule(names: list[str], chosen: str | None) -> None:
    found = ModelInputs([InputSpec(name, "int64", BS) for name in names]).ids
    assert (found.name if found else None) == chosen


@pytest.mark.parametrize("spec", [InputSpec("input", "float32", BS), InputSpec("input_ids", "int64", ("n", 1, "s"))])
def test_only_an_integer_matrix_can_be_the_ids(spec: InputSpec) -> None:
    assert ModelInputs([spec]).ids is None


def test_everything_that_follows_from_ids_is_filled_in() -> None:
    inputs = ModelInputs(
        [
            InputSpec("token_type_ids", "int32", BS),
            MASK,
            IDS,
            InputSpec("position_ids", "int64", BS),
            cache(),
            cache("past.0.value", "head_dim", "float32"),
        ],
        head_size=8,
    )
    feeds = inputs.complete({"input_ids": np.array([[4, 5, 6], [7, 8, 9]], np.int32)}, "the data")
    assert list(feeds) == list(inputs.specs)
    assert feeds["input_ids"].dtype == np.int64
    assert feeds["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert feeds["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert feeds["token_type_ids"].tolist() == [[0, 0, 0]] * 2
    assert feeds["token_type_ids"].dtype == np.int32
    assert feeds["past_key_values.0.key"].shape == (2, 3, 0, 16)
    assert feeds["past_key_values.0.key"].dtype == np.float16
    assert feeds["past.0.value"].shape == (2, 3, 0, 8)


def test_positions_count_only_what_the_mask_keeps() -> None:
    inputs = ModelInputs([IDS, MASK, InputSpec("position_ids", "int64", BS)])
    feeds = inputs.complete({"input_ids": np.ones((2, 4), int), "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 0]]}, "x")
    assert feeds["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec("pixel_values", "float32", ("batch", 3, "h", "w")),
        InputSpec("position_ids", "int64", (3, "batch", "seq")),
        cache("past_key_values.0.encoder.key"),
        cache("past_key_cross_0"),
    ],
)
def test_what_does_not_follow_from_ids_must_be_given(spec: InputSpec) -> None:
    with pytest.raises(CalibrationError, match=rf"gives nothing for input '{spec.name}'.*give an .npz"):
        ModelInputs([IDS, spec]).need_ids("'ids.npy'")


@pytest.mark.parametrize(
    "spec",
    [
        cache(size="head_dim"),
        InputSpec("past.0.key", "float32", ("batch", "heads", "past", 16)),
        InputSpec("past.0.key", "float32", ("batch", 3, 128, 16)),
    ],
)
def test_a_cache_of_unknown_size_must_be_given(spec: InputSpec) -> None:
    with pytest.raises(CalibrationError, match=rf"empty cache for input '{spec.name}'.*give an .npz"):
        ModelInputs([IDS, spec]).complete({"input_ids": np.ones((1, 2), np.int64)}, "the data")


def test_an_array_without_input_lists_the_inputs() -> None:
    with pytest.raises(CalibrationError, match=r"has 'y', which the model has no input for; .* 'input_ids', 'att"):
        ModelInputs([IDS, MASK]).check_names(["input_ids", "y"], "'d.npz'")


def test_a_long_list_of_names_is_cut() -> None:
    inputs = ModelInputs([IDS, *(cache(f"past.{layer}.key") for layer in range(30))])
    with pytest.raises(CalibrationError, match=r"'past.6.key' and 23 more"):
        inputs.check_names(["y"], "'d.npz'")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 5), np.float32), r"takes \[n, 3, 4, w\] but gets \[3, 4, 5\]: rank 4 expected, not 3"),
        (np.zeros((1, 3, 6, 5), np.float32), "dimension 2 must be 4, not 6"),
        (IMAGE_ROW.astype(np.uint8), "takes float32 but gets uint8"),
        (IMAGE_ROW.astype(bool), "takes float32 but gets bool"),
        (IMAGE_ROW.astype(np.complex64), "takes float32 but gets complex64"),
        (IMAGE_ROW.astype(str), "takes float32 but gets str"),
        (np.full_like(IMAGE_ROW, np.nan), "holds NaN or infinity"),
        (np.full_like(IMAGE_ROW, -np.inf), "holds NaN or infinity"),
        (np.full(IMAGE_ROW.shape, 1e300), "holds NaN or infinity as float32"),
    ],
)
def test_an_array_that_does_not_fit(array: np.ndarray, message: str) -> None:
    with pytest.raises(CalibrationError, match=rf"^'d.npz' \(row 3\): input 'x'.*{message}"):
        ModelInputs([IMAGE]).complete({"x": array}, "'d.npz' (row 3)")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.float32])
def test_floats_become_the_float_of_the_input(dtype: type) -> None:
    assert ModelInputs([IMAGE]).complete({"x": IMAGE_ROW.astype(dtype)}, "d")["x"].dtype == np.float32


def test_integers_become_the_integer_of_the_input_if_they_fit() -> None:
    inputs = ModelInputs([InputSpec("x", "int8", ("n",))])
    assert inputs.complete({"x": np.array([-128, 127])}, "d")["x"].tolist() == [-128, 127]
    with pytest.raises(CalibrationError, match="integers outside int8"):
        inputs.complete({"x": np.array([128])}, "d")
    with pytest.raises(CalibrationError, match="takes int8 but gets float64"):
        inputs.complete({"x": np.array([1.0])}, "d")


def test_an_input_that_takes_no_numbers() -> None:
    with pytest.raises(CalibrationError, match=r"'s' takes tensor\(string\), which calibration cannot feed"):
        ModelInputs([InputSpec("s", "tensor(string)", ("n",))]).complete({"s": np.array(["a"])}, "d")


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[1, 10]], "token id 10 is outside the model's vocabulary of 10"), ([[1, -100]], "token id -100 is negative")],
)
def test_ids_outside_the_vocabulary(ids: list[list[int]], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        ModelInputs([IDS], vocabulary=10).complete({"input_ids": np.array(ids)}, "d")


def test_row_mask_is_none_where_nothing_is_masked() -> None:
    ids = np.ones((2, 3), np.int64)
    assert row_mask({"input_ids": ids}) is None
    assert row_mask({"input_ids": ids, "attention_mask": np.ones((2, 3), np.int64)}) is None


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float32])
def test_row_mask_keeps_the_tokens(dtype: type) -> None:
    mask = row_mask({"input_ids": np.ones((2, 3), int), "attention_mask": np.array([[1, 1, 0], [1, 1, 1]], dtype)})
    assert mask is not None
    assert mask.dtype == np.bool_
    assert mask.tolist() == [[True, True, False], [True, True, True]]


def test_row_mask_leaves_out_the_cache() -> None:
    mask = row_mask({"input_ids": np.ones((1, 2), int), "attention_mask": np.array([[0, 1, 1, 1, 0]])})
    assert mask is not None
    assert mask.tolist() == [[True, False]]


def test_a_mask_that_is_added_to_scores_is_no_row_mask() -> None:
    added = np.array([[0.0, -1e9]], np.float32)
    assert row_mask({"input_ids": np.ones((1, 2), int), "attention_mask": added}) is None
    assert row_mask({"input_ids": np.ones((1, 2), int), "attention_mask": 0 * added}) is None


# --- the same feeds for another form of the model -------------------------------------------------------------------


def test_feeds_fit_another_form_of_the_model():
    cache = np.zeros((1, 2, 0, 16), np.float32)
    feeds = {"x": np.ones((1, 3), np.float32), "past_key_values.0.key": cache, "ids": np.ones((1, 3), np.int64)}
    specs = [
        InputSpec("x", "float16", ("b", "s")),
        InputSpec("past_key_values.0.key", "uint8", ("b", 2, "p", 8)),
        InputSpec("ids", "int64", ("b", "s")),
        InputSpec("absent", "float32", ()),
    ]
    found = fitted(feeds, specs)
    assert {name: (array.dtype.name, array.shape) for name, array in found.items()} == {
        "x": ("float16", (1, 3)), "past_key_values.0.key": ("uint8", (1, 2, 0, 8)), "ids": ("int64", (1, 3)),
    }  # fmt: skip
    assert found["ids"] is feeds["ids"]
    assert feeds["past_key_values.0.key"] is cache


def test_a_cache_in_use_fits_no_other_form():
    feeds = {"past_key_values.0.key": np.zeros((1, 2, 3, 16), np.float32)}
    with pytest.raises(
        CalibrationError, match="is a cache of int8 in one model and of float32 in the other; give rows"
    ):
        fitted(feeds, [InputSpec("past_key_values.0.key", "int8", ("b", 2, "p", 16))])
