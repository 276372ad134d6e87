"""The store of results: what is written comes back, what is damaged does not, and keys tell everything apart."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from qcompiler import checkpoints
from qcompiler.checkpoints import Checkpoints, Pace, Periodic, code_version, digest_of
from qcompiler.errors import OutputError
from qcompiler.numerics.affine import WeightSpec
from tests.builders import normal

KEY = "0123abcd"
ARRAYS = {
    "codes": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "weights": normal((5, 7), 1),
    "scales": normal((2, 3), 2, ml_dtypes.bfloat16),
    "mask": np.array([True, False]),
    "step": np.array(41),
    "nothing": np.zeros((0, 4), np.float16),
    "words": np.array(["one", "eleven"]),
    "turned": normal((4, 6), 3).T,
}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path):
    return Checkpoints(tmp_path / "store")


# --- keys -------------------------------------------------------------------------------------------------------------

DIFFERENT = [
    (), ("",), ("", ""), ("ab", "c"), ("a", "bc"), (b"abc",), ("abc",), (1,), (1.0,), ("1",), (True,), (None,),
    (["a"], "b"), (["a", "b"],), ("a", "b"), (np.zeros(2),), (np.zeros(2, np.float32),), (np.zeros((1, 2)),),
    (np.zeros(3),), (np.array([0.0, -0.0]),), (np.array(["a", "b"]),), (np.array(["a", "b"], object),),
    (np.zeros(2, ml_dtypes.bfloat16),), (np.zeros(2, np.float16),),
    (WeightSpec(4, 32, True),), (WeightSpec(4, 32, False),), (WeightSpec(4, 64, True),),
]  # fmt: skip


def test_what_differs_has_another_key():
    keys = [digest_of(*parts) for parts in DIFFERENT]
    assert len(set(keys)) == len(keys)


def test_what_is_the_same_has_the_same_key_in_another_process():
    array = normal((3, 4), 0)
    assert digest_of("x", array) == digest_of("x", array.copy()) == digest_of("x", np.asfortranarray(array))
    code = "import numpy as np; from qcompiler.checkpoints import digest_of; print(digest_of('x', 1.5, np.arange(6)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert told == digest_of("x", 1.5, np.arange(6))


def test_changed_sources_have_another_version(tmp_path, monkeypatch):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda _: spec)
    versions = []
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", ""), ("note.txt", "no code")):
        (tmp_path / name).write_text(text, "utf-8")
        versions.append(code_version.__wrapped__())
    assert len(set(versions)) == 3
    assert versions[2] == versions[3]


def test_other_libraries_have_another_version(monkeypatch):
    before = code_version.__wrapped__()
    assert before == code_version.__wrapped__() == code_version()
    version = checkpoints.importlib.metadata.version
    monkeypatch.setattr(checkpoints.importlib.metadata, "version", lambda name: version(name) + ".1")
    assert code_version.__wrapped__() != before


# --- files ------------------------------------------------------------------------------------------------------------


def test_arrays_come_back_as_they_were(store, tmp_path):
    assert store.get(KEY) is None
    store.put(KEY, ARRAYS)
    found = store.get(KEY)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name
        assert not found[name].flags.writeable
        assert type(found[name]) is np.ndarray
        assert found[name].size == 0 or found[name].ctypes.data % 64 == 0
    assert files(tmp_path / "store") == [f"{KEY}.checkpoint"]


def test_what_was_read_outlives_its_file(store):
    store.put(KEY, ARRAYS)
    found = store.get(KEY)
    store.put(KEY, {"other": np.zeros(1000)})
    store.drop(KEY)
    store.drop(KEY)
    assert np.array_equal(found["weights"], ARRAYS["weights"])
    assert store.get(KEY) is None


def test_any_damage_is_noticed_and_made_good(store, tmp_path, caplog):
    path = tmp_path / "store" / f"{KEY}.checkpoint"
    store.put(KEY, ARRAYS)
    whole = path.read_bytes()
    damaged = [whole[:size] for size in (0, 1, 19, 20, 40, len(whole) // 2, len(whole) - 1)]
    damaged += [whole + b"\0", b"\0" * len(whole)]
    for place in (0, 25, 60, len(whole) // 2, len(whole) - 25, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 4
        damaged.append(bytes(changed))
    for data in damaged:
        path.write_bytes(data)
        caplog.clear()
        assert store.get(KEY) is None
        (record,) = caplog.records
        assert (record.levelname, str(path) in record.getMessage()) == ("WARNING", True)
    store.put(KEY, ARRAYS)
    assert path.read_bytes() == whole


def test_a_file_that_cannot_be_written_costs_a_warning_and_not_the_work(store, tmp_path, monkeypatch, caplog):
    store.put(KEY, ARRAYS)
    before = (tmp_path / "store" / f"{KEY}.checkpoint").read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    for key in (KEY, "other"):
        store.put(key, {"x": np.zeros(3)})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device); no more checkpoints are stored" in caplog.text
    assert files(tmp_path / "store") == [f"{KEY}.checkpoint"]
    assert (tmp_path / "store" / f"{KEY}.checkpoint").read_bytes() == before


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path):
    """And what it had begun is removed by the next one; what a process that runs has begun is not."""
    code = f"""if True:
        import os, signal, numpy as np
        from pathlib import Path
        from qcompiler import checkpoints
        store = checkpoints.Checkpoints(Path({str(tmp_path)!r}))
        store.put({KEY!r}, {{"x": np.arange(3)}})
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        Path.replace = die
        store.put({KEY!r}, {{"x": np.arange(4)}})
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (begun,) = (name for name in files(tmp_path) if name.endswith(".tmp"))
    running = tmp_path / begun.replace(begun.split("-")[-1], f"{os.getpid()}.tmp")
    running.write_bytes(b"begun")
    elsewhere = tmp_path / ".another-0-999999999.tmp"
    elsewhere.write_bytes(b"begun")
    store = Checkpoints(tmp_path)
    assert files(tmp_path) == sorted([running.name, elsewhere.name, f"{KEY}.checkpoint"])
    assert np.array_equal(store.get(KEY)["x"], np.arange(3))


def test_two_processes_may_write_the_same_key(tmp_path):
    code = f"""if True:
        import numpy as np
        from pathlib import Path
        from qcompiler.checkpoints import Checkpoints
        store = Checkpoints(Path({str(tmp_path)!r}))
        for _ in range(200):
            store.put({KEY!r}, {{"x": np.arange(20000)}})
            found = store.get({KEY!r})
            assert found is not None and found["x"][-1] == 19999
    """
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert files(tmp_path) == [f"{KEY}.checkpoint"]


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path):
    (tmp_path / "file").write_text("here", "utf-8")
    with pytest.raises(OutputError, match=r"file: no folder for checkpoints \(.+\); give --checkpoint a folder that"):
        Checkpoints(tmp_path / "file")


def test_there_is_room_for_a_part_of_what_is_free(store, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=400))
    assert store.has_room_for(100)
    assert not store.has_room_for(101)


# --- remembering ------------------------------------------------------------------------------------------------------


def test_what_is_remembered_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": np.arange(5)}

    for run in range(2):
        store = Checkpoints(tmp_path)
        for key in ("a", "b"):
            assert np.array_equal(store.remember(key, make, "gptq", 3)["x"], np.arange(5))
        assert store.tally == {"gptq": (6 * run, 6)}
    assert len(made) == 2


def test_storing_takes_a_small_part_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    pace = Pace(20)
    assert not pace.due
    now[0] = 20
    assert pace.due
    now[0] = 21
    pace.stored(20)  # took a second
    now[0] = 41
    assert pace.due
    now[0] = 46
    pace.stored(41)  # took five
    now[0] = 95
    assert not pace.due
    now[0] = 96
    assert pace.due


def test_a_state_is_stored_now_and_then(store, monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    state = Periodic(store, KEY, 60)

    def offer():
        asked.append(now[0])
        return {"now": np.array(now[0])}

    assert state.load() is None
    for now[0] in range(0, 150, 25):
        state.offer(offer)
    assert asked == [75]
    now[0] = 135
    state.offer(offer)
    assert asked == [75, 135]
    assert Periodic(store, KEY, 60).load()["now"] == 135
    state.drop()
    assert state.load() is None


def test_nothing_is_logged_where_nothing_is_wrong(store, caplog):
    with caplog.at_level(logging.DEBUG):
        store.put(KEY, ARRAYS)
        store.get(KEY)
        store.get("missing")
    assert caplog.records == []
