"""The report as a page: that it is whole, needs nothing, tells what there is, and lets no name out of its place."""

import json
import re
from html.parser import HTMLParser
from urllib.parse import urlparse

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from qcompiler import compile_model
from qcompiler.cli import main
from qcompiler.errors import OutputError
from qcompiler.report import SiteRow
from qcompiler.report_advice import remedy, worst_sites
from qcompiler.report_html import read_report, report_page
from tests.builders import decoder, linear_model, serialized, token_batches

pytest.importorskip("jinja2")

EVIL = '"><script>alert(1)</script>\x1b[2J--><!--\u202e'


class Page(HTMLParser):
    """Elements with their attributes, and the text of the cells of each table's rows."""

    VOID = ("meta", "input", "path", "use", "rect", "image", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.rows, self.text, self.wrong = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open[-2:] and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def compiled(folder, model, **options):
    source = folder / "in.onnx"
    onnx.save(serialized(model), source)
    compile_model(source, output=folder / "out.onnx", html=True, **options)
    return json.loads((folder / "out.report.json").read_text("utf-8")), (folder / "out.report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A decoder's report, and its page."""
    data = token_batches(6, 2, 16, vocabulary=512)
    return compiled(tmp_path_factory.mktemp("report"), decoder(), scheme="w4a16-g16-asym", calibration=data)


def test_the_page_is_whole_and_needs_nothing(example):
    _, text = example
    page = Page(text)
    assert not page.wrong
    assert not page.open
    assert sum(tag == "svg" for tag, _ in page.elements) >= 4
    for tag, attributes in page.elements:
        assert tag not in ("img", "link", "iframe")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action"):
                assert value.startswith("#")
            if name.startswith("on"):
                pytest.fail(f"{tag} has {name}")
    # Names of XML's vocabularies are no addresses that anything is fetched from.
    addresses = {urlparse(found).hostname for found in re.findall(r"https?://[^\s\"'<>]+", text)}
    assert addresses <= {"www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org"}


def test_it_tells_what_the_report_says(example):
    report, text = example
    page = Page(text)
    words = " ".join(" ".join(page.text).split())
    assert f"{100 * report['verification']['top1']:.1f} %" in words
    assert f"{report['verification']['kl']:.4g}" in words
    shown = {row[0]: row for row in page.rows if len(row) == 7}
    for site in report["sites"]:
        row = shown[site["site"]]
        assert row[1].strip() == (site["scheme"] or "float")
        if site["sqnr_db"] is not None:
            assert row[4] == f"{site['sqnr_db']:.1f}"
    for reason in report["skipped"]:
        assert reason in words
    weights = [s for s in report["sites"] if s["action"] == "quantized"]
    total = sum(s["metrics"]["weights"] for s in weights)
    mean = sum(s["metrics"]["weights"] * s["bits_per_weight"] for s in weights) / total
    assert f"{mean:.2f}" in words


def test_distributions_are_those_of_the_worst_sites(example):
    report, _ = example
    found = report["histograms"]
    rows = [SiteRow(**site) for site in report["sites"]]
    worst = [row.site for row in worst_sites(rows, 6)]
    assert [each["site"] for each in found if each["kind"] == "weights"] == worst
    for each in found:
        size = next(site["metrics"]["weights"] for site in report["sites"] if site["site"] == each["site"])
        if each["kind"] == "weights":
            assert sum(each["counts"]) == sum(each["quantized"]) == size
            # Codes put what was spread over a range into fewer places.
            assert np.count_nonzero(each["quantized"]) <= np.count_nonzero(each["counts"])
        else:
            assert sum(each["counts"]) > 0
            assert each["quantized"] == []


def test_names_stay_in_their_place(example):
    report = json.loads(json.dumps(example[0]))
    plain = Page(report_page(report))
    for site in report["sites"]:
        site["site"] += EVIL
        site["reason"] += EVIL
    report["model"], report["notes"] = EVIL, [EVIL]
    report["meaning"] += EVIL
    report["histograms"][0]["kind"] += EVIL
    text = report_page(report)
    page = Page(text)
    assert not page.wrong
    assert not page.open
    count = [sum(tag == "script" for tag, _ in each.elements) for each in (plain, page)]
    assert count == [1, 1]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_the_same_report_makes_the_same_page(example):
    report, text = example
    assert report_page(report) == text


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8-dynamic"])
def test_what_there_is_little_of_is_shown_too(tmp_path, scheme):
    report, text = compiled(tmp_path, linear_model(64, 32), scheme=scheme, verify=False)
    page = Page(text)
    assert not page.wrong
    assert "not verified" in " ".join(page.text)
    assert "histograms" in report


@pytest.mark.parametrize(
    ("scheme", "option"),
    [
        ("w4a16-g64-asym", "--set l.3=w8a16-g64"),
        ("w2a16-channel-sym", "--set l.3=w4a16"),
        ("w4a8-g32-asym", "--set l.3=w8a8-g32"),
        ("w8a16-g32-sym", "--ignore l.3"),
        ("w8a8-static-tensor-asym", "--ignore l.3"),
        ("w4a16-g64-nf4", "--ignore l.3"),
    ],
)
def test_the_site_that_stands_out_gets_wider_codes(scheme, option):
    from qcompiler.scheme import Scheme

    rows = [SiteRow(f"l.{at}", "quantized", scheme, relative_loss=0.01 if at == 3 else 0.001) for at in range(5)]
    assert remedy(rows) == option
    if "=" in option:
        Scheme.parse(option.partition("=")[2])
    assert remedy([row for row in rows if row.site != "l.3"]) == ""


def test_a_name_is_quoted():
    rows = [SiteRow(f"a b;{at}", "quantized", "w4a16-g64", relative_loss=10.0 ** -(3 * (at > 0))) for at in range(3)]
    assert remedy(rows) == "--set 'a b;0=w8a16-g64'"


def test_the_command_makes_a_page_of_a_report(tmp_path, example):
    report, text = example
    path = tmp_path / "m.report.json"
    path.write_text(json.dumps(report), "utf-8")
    for force, code in (([], 0), ([], 1), (["--force"], 0)):
        assert CliRunner().invoke(main, ["report", str(path), *force]).exit_code == code
    assert (tmp_path / "m.report.html").read_text("utf-8") == text


@pytest.mark.parametrize("text", ["", "[1]", '{"schema": 99, "sites": []}', '{"schema": 1}', "[" * 100000])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, "utf-8")
    with pytest.raises(OutputError, match=r"x\.json"):
        read_report(path)
