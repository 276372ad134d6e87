"""Every kind of source, and every way in which one can be wrong."""

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from qcompiler.calibration import CalibrationData, load_calibration, row_mask
from qcompiler.errors import CalibrationError
from qcompiler.session import Feeds, InputSpec

BS = ("batch", "seq")
IDS = InputSpec("input_ids", "int64", BS)
MASK = InputSpec("attention_mask", "int64", BS)
X = InputSpec("x", "float32", ("n", 4))
Y = InputSpec("y", "float32", ("n", "t"))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def all_rows(data: CalibrationData, name: str) -> list[list[float]]:
    return sorted(row.tolist() for feed in [*data.batches, *data.held_out] for row in feed[name])


def write_jsonl(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_rows_are_samples(tmp_path: Path, save: Callable[..., None], order: Literal["C", "F"]) -> None:
    x, y = rng().random((9, 4), np.float32), rng().random((9, 3), np.float32)
    save(tmp_path / "d.npz", x=np.array(x, order=order), y=y)
    data = load_calibration(tmp_path / "d.npz", [X, Y])
    assert [len(feed["x"]) for feed in data.batches] == [4, 4]
    assert all_rows(data, "x") == sorted(x.tolist())
    assert all_rows(data, "y") == sorted(y.tolist())
    assert data.description == "8 rows from d.npz, 1 held out"


def test_npz_rows_run_one_by_one_if_the_model_takes_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 4), np.float32))
    data = load_calibration(tmp_path / "d.npz", [InputSpec("x", "float32", (1, 4))])
    assert [feed["x"].shape for feed in data.batches] == [(1, 4)] * 3


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (InputSpec("state", "float32", (2, "n", 8)), (2, 5, 8)),  # a first dimension that is not the batch
        (InputSpec("rate", "float32", ()), ()),
        (InputSpec("length", "float32", ("m",)), (7,)),  # leading sizes that disagree
    ],
)
def test_npz_is_one_sample_where_rows_cannot_be_told_apart(
    tmp_path: Path, spec: InputSpec, shape: tuple[int, ...]
) -> None:
    np.savez(tmp_path / "d.npz", **{"x": np.zeros((5, 4), np.float32), spec.name: np.zeros(shape, np.float32)})
    data = load_calibration(tmp_path / "d.npz", [X, spec])
    assert {name: array.shape for name, array in data.batches[0].items()} == {"x": (5, 4), spec.name: shape}


def test_npz_with_ids_alone_is_completed_and_the_description_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", input_ids=np.ones((9, 3), np.int64))
    cache = InputSpec("past.0.key", "float32", ("batch", 2, "past", 8))
    data = load_calibration(tmp_path / "d.npz", [IDS, MASK, cache])
    assert data.description == "8 rows (attention_mask, empty caches filled in) from d.npz, 1 held out"
    assert data.batches[0]["past.0.key"].shape == (4, 2, 0, 8)


def test_a_folder_is_read_in_the_order_of_names_and_shapes_are_not_mixed(tmp_path: Path) -> None:
    for name, rows, width in (("b", 3, 5), ("a", 6, 2), ("c", 4, 5)):
        np.savez(tmp_path / f"{name}.npz", y=np.full((rows, width), ord(name), np.float32))
    (tmp_path / "notes.txt").write_text("not data")
    data = load_calibration(tmp_path, [Y])
    assert [feed["y"].shape for feed in data.batches] == [(4, 2), (2, 2), (4, 5), (2, 5)]
    assert [chr(int(row[0])) for feed in data.batches for row in feed["y"]] == list("aaaaaabbcccc")
    assert [chr(int(feed["y"][0, 0])) for feed in data.held_out] == ["b"]


def test_npy_ids_of_any_integer_dtype_and_order(tmp_path: Path) -> None:
    ids = rng().integers(0, 100, (6, 7))
    np.save(tmp_path / "ids.npy", np.asfortranarray(ids.astype(np.uint16)))
    data = load_calibration(str(tmp_path / "ids.npy"), [IDS, MASK], vocabulary=100)
    assert all_rows(data, "input_ids") == sorted(ids.tolist())
    assert row_mask(data.batches[0]) is None


def test_npy_of_floats_for_a_model_with_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((5, 4)))
    data = load_calibration(tmp_path / "x.npy", [X])
    assert data.batches[0]["x"].shape == (4, 4)


def test_npy_for_a_model_with_a_fixed_batch(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(35).reshape(7, 5))
    data = load_calibration(tmp_path / "ids.npy", [InputSpec("input_ids", "int64", (2, 5))])
    assert [feed["input_ids"].tolist() for feed in data.held_out] == [np.arange(10, 20).reshape(2, 5).tolist()]
    assert [feed["input_ids"][:, 0].tolist() for feed in data.batches] == [[0, 5], [20, 25]]
    with pytest.raises(CalibrationError, match="has 7 rows, but the model takes 8 at once"):
        load_calibration(tmp_path / "ids.npy", [InputSpec("input_ids", "int64", (8, 5))])


def test_jsonl_rows_are_padded_on_the_right_under_a_mask(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [1, 2, 3], "", {"input_ids": [4]}, [5, 6])
    data = load_calibration(path, [IDS, MASK], samples=3)
    assert data.batches[0]["input_ids"].tolist() == [[1, 2, 3], [5, 6, 0]]
    assert data.batches[0]["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert row_mask(data.batches[0]).tolist() == [[True] * 3, [True, True, False]]
    assert data.held_out[0]["input_ids"].tolist() == [[4]]
    assert data.description == "2 rows of 2 to 3 tokens from d.jsonl, 1 held out"


def test_jsonl_rows_of_unequal_length_share_no_batch_without_a_mask(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [1], [2], [3, 3], [4], [5, 5, 5], [6])
    data = load_calibration(path, [IDS])
    assert [feed["input_ids"].tolist() for feed in data.batches] == [[[1], [2]], [[3, 3]], [[5, 5, 5]], [[6]]]


def test_jsonl_masks_are_kept_and_short_rows_fill_a_fixed_length(tmp_path: Path) -> None:
    inputs = [InputSpec("tokens", "int32", ("n", 4)), InputSpec("input_mask", "float32", ("n", 4))]
    line = {"tokens": [7, 8, 9], "attention_mask": [0, 1, 1]}
    data = load_calibration(write_jsonl(tmp_path / "d.jsonl", line), inputs)
    assert data.batches[0]["tokens"].tolist() == [[7, 8, 9, 0]]
    assert data.batches[0]["input_mask"].tolist() == [[0, 1, 1, 0]]
    assert data.batches[0]["input_mask"].dtype == np.float32


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2", "line 2 is not JSON"),
        ("[]", "line 2 has no list of integers for the token ids"),
        ("[1, 2.5]", "line 2 has no list of integers"),
        ("[[1], [2]]", "line 2 has no list of integers"),
        ("[true]", "line 2 has no list of integers"),
        ("[99999999999999999999]", "line 2 has no list of integers"),
        ('"text"', "line 2 has no list of integers"),
        ('{"attention_mask": [1]}', "line 2 has no list of integers for the token ids"),
        ('{"input_ids": [1], "labels": [1]}', "line 2 has 'labels'.*keep only attention_mask, input_ids"),
        ('{"input_ids": [1, 2], "attention_mask": [1]}', "line 2 has 2 token ids but 1 mask values"),
        ('{"input_ids": [1, 2], "attention_mask": [0, 0]}', "line 2 has a mask that is not made of 0 and 1"),
        ('{"input_ids": [1, 2], "attention_mask": [1, 2]}', "line 2 has a mask that is not made of 0 and 1"),
        ("[10]", r"\(rows 0, 1\): token id 10 is outside the model's vocabulary of 10"),
    ],
)
def test_jsonl_lines_that_are_wrong(tmp_path: Path, line: str, message: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [1], line, [2])
    with pytest.raises(CalibrationError, match=message):
        load_calibration(path, [IDS, MASK], samples=2, vocabulary=10)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer of words w0 to w99, which adds special tokens, truncates and pads unless it is told not to."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(100)} | {"[S]": 100}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[S]"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    built.post_processor = tokenizers.processors.TemplateProcessing("[S] $A [S]", special_tokens=[("[S]", 100)])
    built.enable_truncation(8)
    built.enable_padding(length=12)
    built.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def text_of(ids: Sequence[int]) -> str:
    return "".join(f"w{number}" + ("\n" if position % 7 == 6 else " ") for position, number in enumerate(ids))


@pytest.mark.parametrize("name", ["d.txt", "d.md", "d"])
def test_text_is_cut_into_windows(tmp_path: Path, tokenizer: Path, name: str) -> None:
    ids = rng().integers(0, 100, 203).tolist()
    (tmp_path / name).write_text(text_of(ids))
    data = load_calibration(tmp_path / name, [IDS], tokenizer=tokenizer, sequence_length=10)
    assert all_rows(data, "input_ids") == sorted(ids[start : start + 10] for start in range(0, 200, 10))
    assert data.description == f"18 rows of 10 tokens from {name}, 2 held out"


def test_text_longer_than_a_block_loses_nothing(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = rng().integers(0, 100, 200).tolist()
    (tmp_path / "d.txt").write_text(text_of(ids), encoding="utf-8-sig")
    whole = load_calibration(tmp_path / "d.txt", [IDS], tokenizer=tokenizer.parent, sequence_length=10)
    monkeypatch.setattr("qcompiler.calibration_sources._TEXT_BLOCK", 16)
    assert load_calibration(tmp_path / "d.txt", [IDS], tokenizer=tokenizer, sequence_length=10).digest == whole.digest
    assert all_rows(whole, "input_ids") == sorted(ids[start : start + 10] for start in range(0, 200, 10))


def test_text_takes_the_length_that_the_model_fixes(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "d.txt").write_text(text_of(range(20)))
    fixed = InputSpec("input_ids", "int64", ("n", 4))
    assert load_calibration(tmp_path / "d.txt", [fixed], tokenizer=tokenizer).batches[0]["input_ids"].shape == (4, 4)


def test_short_text_is_one_short_row(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "d.txt").write_text("w1 w2 w3")
    assert load_calibration(tmp_path / "d.txt", [IDS], tokenizer=tokenizer).batches[0]["input_ids"].tolist() == [
        [1, 2, 3]
    ]


def test_text_needs_a_tokenizer_that_can_be_read(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "d.txt"
    text.write_text("w1")
    with pytest.raises(CalibrationError, match="needs a tokenizer; give --tokenizer"):
        load_calibration(text, [IDS])
    with pytest.raises(CalibrationError, match=r"tokenizer '.*none.json' does not exist"):
        load_calibration(text, [IDS], tokenizer=tmp_path / "none.json")
    with pytest.raises(CalibrationError, match=r"tokenizer '.*d.txt' cannot be read"):
        load_calibration(text, [IDS], tokenizer=text)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CalibrationError, match=r"pip install 'onnx-qcompiler\[text\]'"):
        load_calibration(text, [IDS], tokenizer=tokenizer)


def test_a_file_that_is_not_text(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "d.bin").write_bytes(b"\xff\xfe\x00\x80" * 9)
    with pytest.raises(CalibrationError, match=r"d.bin' is not UTF-8 text"):
        load_calibration(tmp_path / "d.bin", [IDS], tokenizer=tokenizer)


def feeds(count: int) -> list[Feeds]:
    return [{"y": np.full((2, number + 1), number, np.float32)} for number in range(count)]


def test_python_feeds_are_run_as_they_are_whether_kept_or_spooled() -> None:
    kept, spooled = load_calibration(feeds(9), [Y]), load_calibration(iter(feeds(9)), [Y])
    assert [feed["y"].shape for feed in kept.batches] == [(2, n + 1) for n in range(9) if n != 4]
    assert [feed["y"].shape for feed in kept.held_out] == [(2, 5)]
    assert kept.digest == spooled.digest
    assert kept.description == spooled.description == "8 feeds from Python, 1 held out"


def test_bfloat16_survives_the_spool() -> None:
    import ml_dtypes

    spec = InputSpec("y", "bfloat16", ("n", "t"))
    array = np.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    assert load_calibration(iter([{"y": array}]), [spec]).batches[0]["y"].tolist() == [[1.5, -2.0]]


def test_temporary_files_are_removed_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = load_calibration(iter(feeds(3)), [Y])
    assert len(list(tmp_path.iterdir())) == 1
    del data
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"y": np.zeros((2, 3))}, "is one dict, not many"),
        ([np.zeros((2, 3))], "item 0 of the calibration data is a ndarray"),
        (iter([[1, 2]]), "item 0 of the calibration data is a list"),
        (17, "is a int; give a path or an iterable"),
        ([], "empty"),
        (iter([]), "empty"),
        ([{"z": np.zeros((2, 3))}], "has 'z', which the model has no input for"),
        ([{}], "gives nothing for input 'y'"),
        (iter([{"y": np.zeros((2, 3))}, {"y": np.zeros(2)}]), r"\(item 1\): input 'y'.*rank 2 expected, not 1"),
    ],
)
def test_python_data_that_is_wrong(source: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(source, [Y])


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"'.*none.npz' does not exist; give"):
        load_calibration(tmp_path / "none.npz", [X])


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("permission denied")

    (tmp_path / "d.npz").write_bytes(b"")
    monkeypatch.setattr("zipfile.ZipFile", refuse)
    with pytest.raises(CalibrationError, match=r"d.npz' cannot be read: permission denied"):
        load_calibration(tmp_path / "d.npz", [X])


def test_empty_data(tmp_path: Path, tokenizer: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((0, 4), np.int64))
    np.save(tmp_path / "columns.npy", np.zeros((4, 0), np.int64))
    np.savez(tmp_path / "names.npz")
    np.savez(tmp_path / "rows.npz", input_ids=np.zeros((0, 4), np.int64))
    (tmp_path / "d.jsonl").write_text("\n\n")
    (tmp_path / "d.txt").write_text("\n")
    for name in ("rows.npy", "columns.npy", "names.npz", "rows.npz", "d.jsonl", "d.txt"):
        with pytest.raises(CalibrationError, match=rf"'.*{name}' is empty; give at least one row"):
            load_calibration(tmp_path / name, [IDS], tokenizer=tokenizer)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CalibrationError, match=r"folder '.*folder' holds no .npz file"):
        load_calibration(tmp_path / "folder", [X])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4)), "holds float64, but token ids are integers"),
        (np.zeros(4, np.int64), r"has the shape \[4\], but token ids have rank 2"),
        (np.zeros((4, 4), bool), "holds bool, but token ids are integers"),
        (np.array([[1, 99]]), "token id 99 is outside the model's vocabulary of 50"),
    ],
)
def test_npy_that_is_wrong(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(CalibrationError, match=rf"ids.npy'.*{message}"):
        load_calibration(tmp_path / "ids.npy", [IDS, MASK], vocabulary=50)


def test_npy_for_a_model_without_ids(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((4, 4), np.int64))
    with pytest.raises(CalibrationError, match="can only be token ids, and the model has no integer input of rank 2"):
        load_calibration(tmp_path / "ids.npy", [X, Y])


def test_files_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "d.npy"
    np.save(path, np.zeros((50, 4), np.int64))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CalibrationError, match=r"d.npy' is cut short: 1728 bytes expected, 1720 found"):
        load_calibration(path, [IDS])
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(CalibrationError, match=r"d.npy' is not a plain .npy file \(it holds Python objects\)"):
        load_calibration(path, [IDS])
    for number, content in enumerate((b"", b"not a zip", b"PK\x03\x04")):
        broken = tmp_path / f"{number}.npz"
        broken.write_bytes(content)
        with pytest.raises(CalibrationError, match=rf"{number}.npz' is not a plain .npz file"):
            load_calibration(broken, [X])
    np.savez_compressed(tmp_path / "packed.npz", x=rng().random((50, 4)))
    damaged = bytearray((tmp_path / "packed.npz").read_bytes())
    damaged[200:260] = bytes(60)
    (tmp_path / "packed.npz").write_bytes(damaged)
    with pytest.raises(CalibrationError, match=r"packed.npz' is not a plain .npz file"):
        load_calibration(tmp_path / "packed.npz", [X])


def test_npz_arrays_are_checked_before_anything_runs(tmp_path: Path) -> None:
    good, bad = np.zeros((8, 4), np.float32), np.zeros((8, 4), np.float32)
    bad[5, 2] = np.nan
    np.savez(tmp_path / "a.npz", x=good)
    np.savez(tmp_path / "b.npz", x=bad)
    with pytest.raises(CalibrationError, match=r"b.npz' \(row 5\): input 'x' holds NaN"):
        load_calibration(tmp_path, [X])
    np.savez(tmp_path / "b.npz", z=good)
    with pytest.raises(CalibrationError, match=r"b.npz' has 'z', which the model has no input for"):
        load_calibration(tmp_path, [X])
    with pytest.raises(CalibrationError, match=r"a.npz' gives nothing for input 'y'"):
        load_calibration(tmp_path / "a.npz", [X, Y])
