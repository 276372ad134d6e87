"""The user's cache: what goes first, and that processes which use it and clean it up at once do no harm."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from qcompiler import caching
from qcompiler.checkpoints import Checkpoints
from qcompiler.cli import main, qcompile
from tests.builders import decoder, serialized

PROCESSES, ROUNDS = 8, 150
# Writes and reads keys at random, checks what comes back, and now and then cleans up.
WORKER = """
import random, sys
from pathlib import Path
import numpy as np
from qcompiler.caching import prune
from qcompiler.checkpoints import Checkpoints
folder, seed, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
draw, store, found = random.Random(seed), Checkpoints(folder), 0
for _ in range(rounds):
    key = draw.randrange(40)
    expected = np.random.default_rng(key).integers(0, 255, 20_000 + key, np.uint8)
    made = store.get(f"{key:02d}")
    if made is not None:
        assert np.array_equal(made["values"], expected), key
        found += 1
    else:
        store.put(f"{key:02d}", {"values": expected})
    if draw.random() < 0.1:
        prune(folder, 300_000)
print(found)
"""


def stored(folder, sizes):
    """A cache with files, the first used longest ago."""
    store = Checkpoints(folder)
    for at, size in enumerate(sizes):
        store.put(f"k{at}", {"values": np.zeros(size, np.uint8)})
        os.utime(folder / f"k{at}.checkpoint", (1000 + at, 1000 + at))
    return store


def keys(folder):
    return sorted(path.stem for path in folder.glob("*.checkpoint"))


def test_what_was_used_longest_ago_goes_first(tmp_path):
    store = stored(tmp_path, [1000] * 5)
    held = caching.usage(tmp_path)
    assert held.files == 5
    store.get("k0")  # used again
    removed = caching.prune(tmp_path, held.bytes * 3 // 5)
    assert keys(tmp_path) == ["k0", "k3", "k4"]
    assert removed == caching.Usage(2, held.bytes * 2 // 5)
    assert caching.prune(tmp_path, held.bytes) == caching.Usage(0, 0)
    assert caching.prune(tmp_path, 0).files == 3
    assert caching.usage(tmp_path) == caching.Usage(0, 0)


def test_what_is_no_checkpoint_stays(tmp_path):
    stored(tmp_path, [10])
    (tmp_path / "notes.txt").write_text("mine")
    caching.prune(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_was_opened_stays_readable(tmp_path):
    store = stored(tmp_path, [1000])
    values = store.get("k0")["values"]
    caching.prune(tmp_path, 0)
    assert not values.any()
    assert store.get("k0") is None


def test_processes_at_once_do_no_harm(tmp_path):
    """Eight of them read, write, check and clean up; none meets what is damaged, and nothing half-written is left."""
    command = [sys.executable, "-c", WORKER, tmp_path]
    running = [
        subprocess.Popen([*map(str, command), str(seed), str(ROUNDS)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for seed in range(PROCESSES)
    ]
    done = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, done
    assert not any(errors for _, errors in done)  # no warning of a damaged file
    assert sum(int(found) for found, _ in done) > PROCESSES * ROUNDS // 10
    assert all(path.suffix == ".checkpoint" for path in tmp_path.iterdir())


def test_processes_that_are_killed_leave_nothing_damaged(tmp_path):
    draw = random.Random(0)
    for seed in range(6):
        process = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(seed), "100000"])
        try:
            process.wait(timeout=draw.uniform(0.4, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
    assert keys(tmp_path)
    store = Checkpoints(tmp_path)  # removes what killed processes had begun
    assert all(path.suffix == ".checkpoint" for path in tmp_path.iterdir())
    for key in keys(tmp_path):
        expected = np.random.default_rng(int(key)).integers(0, 255, 20_000 + int(key), np.uint8)
        assert np.array_equal(store.get(key)["values"], expected)


@pytest.fixture
def example(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    onnx.save(serialized(decoder()), tmp_path / "in.onnx")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(1, 512, (6, 16)))
    return tmp_path


def compiled(folder, name, *options):
    arguments = [folder / "in.onnx", "--calibration", folder / "rows.npy", "--scheme", "w4a16-g16", "--no-verify"]
    return CliRunner().invoke(qcompile, [str(each) for each in (*arguments, "-o", folder / name, *options)])


def test_compilations_share_it(example):
    assert compiled(example, "a.onnx", "--cache").exit_code == 0
    held = caching.usage(example / "cache")
    assert held.files > 0
    done = compiled(example, "b.onnx", "--cache")
    assert "sites came from checkpoints" in done.stdout
    assert (example / "a.onnx").read_bytes() == (example / "b.onnx").read_bytes()
    assert compiled(example, "c.onnx", "--cache", "--checkpoint", example / "k").exit_code == 2


def test_it_stays_below_its_limit(example, monkeypatch):
    monkeypatch.setattr(caching, "DEFAULT_LIMIT", 5000)
    assert compiled(example, "a.onnx", "--cache").exit_code == 0
    assert caching.usage(example / "cache").bytes <= 5000


def test_the_command_shows_and_cleans(example):
    folder = example / "cache"
    assert f"{folder}: 0 files, 0.0 MB" in CliRunner().invoke(main, ["cache"]).stdout
    stored(folder, [400_000, 600_000])
    assert f"{folder}: 2 files, 1.0 MB" in CliRunner().invoke(main, ["cache"]).stdout
    done = CliRunner().invoke(main, ["cache", "--limit", "0.7MB"])
    assert "removed 1 files, 0.4 MB" in done.stdout
    assert keys(folder) == ["k1"]
    assert CliRunner().invoke(main, ["cache", "--limit", "much"]).exit_code == 2


def test_where_it_is(monkeypatch):
    monkeypatch.delenv("QCOMPILER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    if sys.platform == "linux":
        assert caching.cache_folder() == Path("/somewhere/qcompiler")
    assert caching.cache_folder().name == "qcompiler"
