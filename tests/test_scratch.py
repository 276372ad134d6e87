"""Arrays in memory up to a budget, in files past it, and nothing left behind."""

import ctypes

import ml_dtypes
import numpy as np
import pytest

from qcompiler.instruments import anonymous_bytes
from qcompiler.scratch import Scratch, return_freed
from tests.builders import normal

SIDE = 256  # a float32 array of 256 x 256 is 256 KiB; below 4 KiB none is worth a file


def big(seed, dtype="float32"):
    return normal((SIDE, SIDE), seed).astype(dtype)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_without_a_budget_everything_stays(tmp_path):
    with Scratch(None, tmp_path) as scratch:
        array = big(0)
        assert scratch.keep(array) is array
        assert files(tmp_path) == []
    assert scratch.spilled_bytes == 0


def test_past_the_budget_arrays_go_to_files_and_come_back_equal(tmp_path):
    arrays = [big(seed) for seed in range(4)]
    with Scratch(2 * arrays[0].nbytes, tmp_path) as scratch:
        kept = [scratch.keep(array) for array in arrays]
        assert [a is b for a, b in zip(arrays, kept, strict=True)] == [True, True, False, False]
        assert scratch.live_bytes == scratch.spilled_bytes == 2 * arrays[0].nbytes
        assert len(files(tmp_path)) == 2
        for array, copy in zip(arrays, kept, strict=True):
            assert np.array_equal(array, copy)
        assert not kept[3].flags.writeable
    assert list(tmp_path.iterdir()) == []


def test_dropping_makes_room_and_frees_files_at_once(tmp_path):
    with Scratch(big(0).nbytes, tmp_path) as scratch:
        first, second = scratch.keep(big(0)), scratch.keep(big(1))
        assert len(files(tmp_path)) == 1
        scratch.drop(second)
        assert files(tmp_path) == []
        scratch.drop(first)
        assert scratch.live_bytes == 0
        third = big(2)
        assert scratch.keep(third) is third


def test_small_arrays_are_never_spilled(tmp_path):
    with Scratch(0, tmp_path) as scratch:
        small = np.zeros((1 << 12) - 1, np.uint8)
        assert scratch.keep(small) is small
        assert scratch.keep(np.zeros(1 << 12, np.uint8)).flags.owndata is False
        assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("dtype", ["float16", "float64", "int64", "bool", ml_dtypes.bfloat16])
def test_every_dtype_comes_back(tmp_path, dtype):
    with Scratch(0, tmp_path) as scratch:
        array = big(3, dtype)
        copy = scratch.keep(array)
        assert copy is not array
        assert copy.dtype == array.dtype
        assert np.array_equal(copy, array)


def test_arrays_that_are_not_contiguous_come_back(tmp_path):
    with Scratch(0, tmp_path) as scratch:
        array = big(4).T[::2]
        assert np.array_equal(scratch.keep(array), array)


def test_what_the_caller_holds_is_left_alone(tmp_path):
    """Feeds may be mapped files, and memory that was never kept is not given back."""
    np.save(tmp_path / "feeds.npy", big(5))
    mapped = np.load(tmp_path / "feeds.npy", mmap_mode="r")
    with Scratch(0) as scratch:
        for array in (mapped, mapped[:10], np.asarray(mapped), big(6)):
            scratch.drop(array)
        assert scratch.live_bytes == 0
        own = scratch.keep(big(7))
        scratch.drop(own)
        scratch.drop(own)
    assert scratch.live_bytes == 0
    assert np.array_equal(np.load(tmp_path / "feeds.npy"), big(5))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="memory is given back by glibc alone")
def test_freed_memory_goes_back():
    pieces = [bytearray(1 << 16) for _ in range(2000)]  # small enough for malloc to hold on to them
    last = bytearray(1 << 16)  # above them all
    del pieces
    before = anonymous_bytes()
    return_freed()
    assert anonymous_bytes() < before - (1 << 26)
    assert len(last) == 1 << 16
