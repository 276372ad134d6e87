import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from onnx import helper, numpy_helper

from benchmarks import int8
from benchmarks.zoo import efficientnet, exports, minilm, packages, texts
from benchmarks.zoo.cache import ZooError
from benchmarks.zoo.packages import PACKAGES, Package
from tests.stored_models import make_model, value, write


def test_archives_are_asked_for_by_exact_version():
    for package in PACKAGES.values():
        command = packages._command(package)
        assert command[-1] == package.project + {"npm": "@", "deb": "="}.get(package.kind, "==") + package.version


def test_a_wheel_of_one_platform_is_the_same_everywhere():
    command = packages._command(Package("wheel", "name", "1", "", "MIT", ("--platform", "any")))
    assert command[-3:] == ["--platform", "any", "name==1"]


def test_debian_packages_are_unpacked_without_being_installed(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command))
    packages._unpack(tmp_path / "a.deb", tmp_path / "folder")
    assert ran == [["dpkg-deb", "-x", tmp_path / "a.deb", tmp_path / "folder"]]


# --- exports --------------------------------------------------------------------------------------


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_ZOO", str(tmp_path))
    with pytest.raises(ZooError, match=r"no_such_module(.|\n)*--export form"):
        exports.exported("benchmarks.zoo.no_such_module", "form")
    assert list(tmp_path.rglob("*.onnx")) == []


def test_an_export_runs_once(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_ZOO", str(tmp_path))

    def run(command, **_):
        ran.append(command)
        return subprocess.CompletedProcess(command, 0)

    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", run)
    found = [exports.exported("benchmarks.zoo.minilm", "opset14") for _ in range(2)]
    assert found == [tmp_path / "minilm" / "opset14" / "model.onnx"] * 2
    assert [command[:5] for command in ran] == [[sys.executable, "-m", "benchmarks.zoo.minilm", "--export", "opset14"]]


def test_feeds_are_files_in_order(tmp_path):
    feeds = [{"x": np.full(2, index, np.float32)} for index in range(11)]
    files = sorted(exports.write_feeds(tmp_path / "feeds", feeds).iterdir())
    assert [np.load(file)["x"][0] for file in files] == list(range(11))
    exports.write_feeds(tmp_path / "feeds", [])
    assert len(list((tmp_path / "feeds").iterdir())) == 11


# --- texts ----------------------------------------------------------------------------------------


def test_a_verse_without_its_markup():
    osis = (
        '<title>A Psalm</title><w lemma="strong:H0430">God</w><note placement="foot">Or, <i>gods</i></note>'
        '<w>said</w> ,  <l level="2"/>¶ Let &amp; be<note>x</note>.  <div eID="gen3"/>'
    )
    assert texts.plain(osis) == "God said, Let & be."


def test_entries_of_a_module(tmp_path):
    blocks = [zlib.compress(text.encode()) for text in ("one", "twothrée")]
    starts = [0, len(blocks[0])]
    (tmp_path / "ot.bzz").write_bytes(b"".join(blocks))
    (tmp_path / "ot.bzs").write_bytes(
        b"".join(struct.pack("<III", start, len(block), 99) for start, block in zip(starts, blocks, strict=True))
    )
    places = [(0, 0, 0), (0, 0, 3), (1, 0, 3), (1, 3, 6)]
    (tmp_path / "ot.bzv").write_bytes(b"".join(struct.pack("<IIH", *place) for place in places))
    assert texts._entries(tmp_path) == ["", "one", "two", "thrée"]


def test_pairs_leave_out_headings_and_short_verses(monkeypatch):
    long = "And it came to pass in those days"
    entries = {"king-james-bible": ["", '<chapter osisID="Gen.1"/>' + long, long, "Amen.", long + " A"]}
    entries["world-english-bible"] = ["", long, long, long, long + " B", "a book more" * 9]
    monkeypatch.setattr(texts, "fetch", lambda name: name)
    monkeypatch.setattr(texts, "_entries", entries.__getitem__)
    assert texts.verse_pairs.__wrapped__() == [(long, long), (long + " A", long + " B")]


# --- sentence embeddings --------------------------------------------------------------------------


def test_padding_is_not_pooled():
    hidden = np.array([[[3, 0], [0, 4], [90, 90]]], np.float32)
    found = minilm.pool(hidden, np.array([[1, 1, 0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8]], rtol=1e-6)
    assert found.dtype == np.float32


def test_the_probe_is_a_ridge_regression():
    rng = np.random.default_rng(0)
    samples, targets = rng.standard_normal((40, 5)), rng.standard_normal(40) + 3
    found = minilm.ridge(samples, targets, strength=2.0)
    # The same as least squares with rows that ask for small weights, and for nothing of the last.
    more = np.column_stack([np.sqrt(2.0) * np.eye(5), np.zeros(5)])
    rows = np.vstack([np.column_stack([samples, np.ones(40)]), more])
    expected = np.linalg.lstsq(rows, np.append(targets, np.zeros(5)), rcond=None)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_items_from_all_over():
    assert minilm.spread(range(11), 4) == [0, 2, 4, 6]
    assert minilm.spread("abcd", 4) == list("abcd")


def test_no_text_is_both_measured_and_calibrated_on(monkeypatch):
    monkeypatch.setattr(minilm, "verse_pairs", lambda: [(f"old {i}", f"new {i}") for i in range(4001)])
    monkeypatch.setattr(minilm, "rated_reviews", lambda: [(f"film {i}", (-1) ** i) for i in range(9100)])
    monkeypatch.setattr(minilm, "documents", lambda: ([[f"line {i}" for i in range(70)]], []))
    monkeypatch.setattr(minilm, "feeds", lambda chosen: chosen)
    (training, sides), (reviews, _) = minilm.sentences(training=True), minilm.sentences()
    measured = {*training, *reviews, *(text for pair in minilm.verses() for text in pair)}
    assert len(measured) == 3000 + 1000 + 2 * 1000
    assert sides[0] == 1
    calibrated = [text for row in minilm.calibration_feeds() for text in row]
    assert len(set(calibrated)) == 32 * 4
    assert not measured.intersection(calibrated)


# --- pictures -------------------------------------------------------------------------------------


def test_a_crop_is_within_the_picture_and_the_models_range():
    image = pytest.importorskip("PIL.Image")
    rows = np.linspace(0, 255, 300).astype(np.uint8)
    picture = image.fromarray(np.broadcast_to(rows[:, None, None], (300, 400, 3)).copy())
    rng = np.random.default_rng(0)
    for _ in range(20):
        crop = efficientnet.random_crop(picture, rng)
        assert crop.shape == (3, 224, 224)
        assert crop.dtype == np.float32
        assert -1 <= crop.min() < crop.max() <= 1
        column = crop[0, :, 0] * 128 + 127
        # A side is half of the picture's height at least.
        assert 127 <= column[-1] - column[0] + 2 <= 257


def test_no_picture_is_both_measured_and_calibrated_on():
    assert not set(efficientnet.MEASURED) & set(efficientnet.CALIBRATION)


# --- peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ort-static-linears", "ort-dynamic", "w8a8"])
def test_everything_is_quantized_in_a_process_of_its_own(way, tmp_path):
    pytest.importorskip("sympy")  # ONNX Runtime's preparation needs it
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((16, 8)).astype(np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = write(make_model(nodes, [value("x", (4, 16))], [value("y", (4, 8))], [weight]), tmp_path / "model.onnx")
    feeds = [{"x": rng.standard_normal((4, 16)).astype(np.float32)} for _ in range(2)]
    out = tmp_path / f"{way}.onnx"
    cost = int8.quantize(model, way, exports.write_feeds(tmp_path / "feeds", feeds), out)
    assert out.exists()
    assert cost.seconds > 0
    assert cost.peak_mb > 0


def test_models_with_other_figures_get_a_heading_of_their_own():
    cost = int8.Cost(2.0, 300.0)
    rows = [int8.Result(name, "static", {f: 0.5}, (0.5, 0.4, 0.6), 1.0, cost) for name, f in ("ax", "bx", "cy")]
    lines = int8.table(rows).splitlines()
    assert lines[0] == "| model | way | x | latency ratio | MB | seconds | peak MB |"
    assert lines[2] == "| a | static | 0.5000 | 0.50 (0.40 to 0.60) | 1.0 | 2 | 300 |"
    assert [line[:3] for line in lines[3:5]] == ["| b", ""]
    assert lines[5].startswith("| model | way | y |")
