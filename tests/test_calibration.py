"""Which rows are taken, in which batches, at what cost; and the data made up where there is none."""

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.calibration import CalibrationData, load_calibration, synthetic_data
from qcompiler.errors import CalibrationError
from qcompiler.session import Feeds, InputSpec

IDS = InputSpec("input_ids", "int64", ("batch", "seq"))
MASK = InputSpec("attention_mask", "int64", ("batch", "seq"))
IMAGE = InputSpec("x", "float32", ("n", 3, "h", "w"))


def numbered(path: Path, rows: int, width: int = 5) -> Path:
    """A .npy of token ids in which row r holds r alone, so that a feed tells which rows it was made of."""
    np.save(path, np.repeat(np.arange(rows)[:, None], width, axis=1))
    return path


def rows_of(feeds: Sequence[Feeds]) -> list[int]:
    return [int(row[0]) for feed in feeds for row in feed["input_ids"]]


def values(data: CalibrationData) -> list[dict[str, list[object]]]:
    return [{name: array.tolist() for name, array in feed.items()} for feed in [*data.batches, *data.held_out]]


@pytest.mark.parametrize("rows", [2, 3, 7, 8, 9, 16, 33, 100])
@pytest.mark.parametrize("samples", [1, 2, 3, 8, 15, 16, 32, 99])
def test_samples_are_evenly_spaced_and_held_out_rows_are_others(tmp_path: Path, rows: int, samples: int) -> None:
    data = load_calibration(numbered(tmp_path / "ids.npy", rows), [IDS], samples=samples)
    used, held = rows_of(data.batches), rows_of(data.held_out)
    if samples < rows:
        assert used == [i * rows // samples for i in range(samples)]
        assert len(held) == min(max(1, samples // 8), rows - samples)
    else:
        assert len(held) == max(1, rows // 8)
        assert sorted([*used, *held]) == list(range(rows))
    assert not set(used) & set(held)
    assert held == sorted(set(held))
    assert all(len(feed["input_ids"]) == 1 for feed in data.held_out)


def test_held_out_rows_are_spread_over_the_data(tmp_path: Path) -> None:
    data = load_calibration(numbered(tmp_path / "ids.npy", 800), [IDS], samples=64)
    gaps = np.diff(rows_of(data.held_out))
    assert len(gaps) == 7
    assert gaps.max() - gaps.min() <= 2


def test_all_rows_are_used_without_samples(tmp_path: Path) -> None:
    data = load_calibration(numbered(tmp_path / "ids.npy", 20), [IDS])
    assert sorted(rows_of(data.batches) + rows_of(data.held_out)) == list(range(20))
    assert len(data.held_out) == 2
    assert data.description == "18 rows of 5 tokens from ids.npy, 2 held out"


def test_a_single_row_is_used_for_both_and_the_description_says_so(tmp_path: Path) -> None:
    data = load_calibration(numbered(tmp_path / "ids.npy", 1), [IDS])
    assert rows_of(data.batches) == rows_of(data.held_out) == [0]
    assert data.description == "1 row of 5 tokens from ids.npy, which is also verified on"


def test_batches_hold_batch_rows_and_can_be_indexed_and_sliced(tmp_path: Path) -> None:
    data = load_calibration(numbered(tmp_path / "ids.npy", 40), [IDS, MASK], samples=10, batch_rows=4)
    assert [len(feed["input_ids"]) for feed in data.batches] == [4, 4, 2]
    assert rows_of([data.batches[-1]]) == [32, 36]
    assert rows_of(data.batches[1:]) == [16, 20, 24, 28, 32, 36]
    with pytest.raises(IndexError):
        data.batches[3]


def test_a_batch_is_built_anew_each_time(tmp_path: Path) -> None:
    data = load_calibration(numbered(tmp_path / "ids.npy", 9), [IDS])
    data.batches[0]["input_ids"][:] = 77
    assert 77 not in rows_of(data.batches)


def test_the_same_data_gives_the_same_feeds_and_digest(tmp_path: Path) -> None:
    first = load_calibration(numbered(tmp_path / "a.npy", 30), [IDS, MASK], samples=8)
    again = load_calibration(numbered(tmp_path / "b.npy", 30), [IDS, MASK], samples=8)
    assert values(first) == values(again)
    assert first.digest == again.digest
    assert len(first.digest) == 64


def test_the_digest_depends_on_rows_inputs_dtype_and_settings(tmp_path: Path) -> None:
    path = numbered(tmp_path / "ids.npy", 30)
    narrow = InputSpec("input_ids", "int32", ("batch", "seq"))
    renamed = InputSpec("tokens", "int64", ("batch", "seq"))
    digests = [
        load_calibration(path, [IDS], samples=8).digest,
        load_calibration(path, [IDS, MASK], samples=8).digest,
        load_calibration(path, [narrow], samples=8).digest,
        load_calibration(path, [renamed], samples=8).digest,
        load_calibration(path, [IDS], samples=9).digest,
        load_calibration(path, [IDS], samples=8, batch_rows=2).digest,
        load_calibration(numbered(tmp_path / "ids.npy", 31), [IDS], samples=8).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_equal_content_in_another_container_has_the_same_digest(tmp_path: Path) -> None:
    path = numbered(tmp_path / "ids.npy", 12)
    np.savez(tmp_path / "ids.npz", input_ids=np.load(path))
    np.savez_compressed(tmp_path / "packed.npz", input_ids=np.load(path))
    digests = {load_calibration(tmp_path / name, [IDS]).digest for name in ("ids.npy", "ids.npz", "packed.npz")}
    assert len(digests) == 1


class Counting(Sequence[Feeds]):
    """A sequence that counts how often it is read."""

    def __init__(self, length: int) -> None:
        self.length, self.reads = length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Feeds:
        self.reads += 1
        return {"x": np.full((2, 3, 4, 4), index, np.float32)}


def test_one_batch_reads_nothing_but_its_own_rows() -> None:
    source = Counting(1000)
    data = load_calibration(source, [IMAGE], samples=10)
    assert source.reads == 12  # each used feed once for the checks and the digest, one again for the description
    source.reads = 0
    assert data.batches[7]["x"][0, 0, 0, 0] == 700
    assert source.reads == 1


def test_a_few_rows_of_a_million_are_neither_loaded_nor_listed(tmp_path: Path) -> None:
    path = tmp_path / "big.npy"
    ids = np.lib.format.open_memmap(path, "w+", np.int64, (1_000_000, 256))  # 2 GB, sparse
    ids[500_000] = 5
    del ids
    tracemalloc.start()
    try:
        data = load_calibration(path, [IDS], samples=4)
        assert int(data.batches[0]["input_ids"][2, 0]) == 5
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def peak_of(source: Any, inputs: Sequence[InputSpec]) -> int:
    tracemalloc.start()
    try:
        data = load_calibration(source, inputs)
        for _ in data.batches:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def images(count: int) -> Iterator[Feeds]:
    for number in range(count):
        yield {"x": np.full((1, 3, 64, 64), number, np.float32)}  # 48 KiB


def test_memory_does_not_grow_with_a_generator() -> None:
    peak_of(images(2), [IMAGE])  # imports and caches
    # 400 feeds more are 19 MiB of values; what is kept of each is where it lies, about 1 KiB.
    assert peak_of(images(410), [IMAGE]) - peak_of(images(10), [IMAGE]) < 1 << 20


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_does_not_grow_with_an_npz(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "few.npz", x=np.zeros((10, 3, 64, 64), np.float32))
    save(tmp_path / "many.npz", x=np.zeros((410, 3, 64, 64), np.float32))
    peak_of(tmp_path / "few.npz", [IMAGE])
    assert peak_of(tmp_path / "many.npz", [IMAGE]) - peak_of(tmp_path / "few.npz", [IMAGE]) < 1 << 20


@pytest.mark.parametrize("setting", ["samples", "batch_rows", "sequence_length"])
def test_a_setting_of_zero_is_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(CalibrationError, match=f"{setting} is 0"):
        load_calibration(numbered(tmp_path / "ids.npy", 4), [IDS], **{setting: 0})


def test_synthetic_data_is_held_out_only_and_determined_by_its_seed() -> None:
    data = synthetic_data([IDS, MASK], seed=3, rows=3, vocabulary=50)
    assert len(data.batches) == 0
    assert len(data.held_out) == 3
    for feed in data.held_out:
        assert feed["input_ids"].shape == (1, 64)
        assert 0 <= feed["input_ids"].min() <= feed["input_ids"].max() < 50
        assert (feed["attention_mask"] == 1).all()
    assert data.description == "no data, 3 random rows held out"
    assert values(data) == values(synthetic_data([IDS, MASK], seed=3, rows=3, vocabulary=50))
    assert data.digest != synthetic_data([IDS, MASK], seed=4, rows=3, vocabulary=50).digest
    assert not np.array_equal(data.held_out[0]["input_ids"], data.held_out[1]["input_ids"])


def test_synthetic_sizes_follow_the_names_of_dimensions() -> None:
    inputs = [
        InputSpec("x", "float16", ("batch", 3, "height", None)),
        InputSpec("state", "float32", (2, "batch", 128)),
        InputSpec("rate", "int64", ()),
        InputSpec("first", "bool", (None,)),
        InputSpec("embeds", "bfloat16", (None, "seq", 8)),
    ]
    (feed,) = synthetic_data(inputs, seed=0, rows=1).held_out
    assert {name: array.shape for name, array in feed.items()} == {
        "x": (1, 3, 64, 64),
        "state": (2, 1, 128),
        "rate": (),
        "first": (1,),
        "embeds": (1, 64, 8),
    }
    assert [array.dtype.name for array in feed.values()] == ["float16", "float32", "int64", "bool", "bfloat16"]
    assert feed["rate"] == 1


def test_synthetic_data_for_a_decoder_has_empty_caches() -> None:
    cache = InputSpec("past_key_values.0.key", "float32", ("batch", 3, "past", "size"))
    (feed,) = synthetic_data([IDS, MASK, cache], seed=0, rows=1, head_size=16).held_out
    assert feed["past_key_values.0.key"].shape == (1, 3, 0, 16)


def test_synthetic_data_for_a_mask_without_ids() -> None:
    embeds = InputSpec("inputs_embeds", "float32", ("batch", "seq", 8))
    (feed,) = synthetic_data([embeds, MASK], seed=0, rows=1).held_out
    assert feed["attention_mask"].tolist() == [[1] * 64]
