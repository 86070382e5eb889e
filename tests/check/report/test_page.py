"""The page of a check run: whole, closed, nothing to load, and every figure as text."""

import math
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from refattn import Capabilities, check_kernel
from refattn.check.bugs.planted import plain, planted
from refattn.check.compare import Worst
from refattn.check.diagnose.rules import RULES
from refattn.check.diagnose.statistics import EDGES, bands
from refattn.check.report.page import SCALE, number, order, page
from refattn.check.report.report import Check, Report

from ...conftest import SMALL

VOID = {"meta", "input", "br", "hr", "link", "img"}


class Page(HTMLParser):
    """Collect elements; every one must be closed by its own end tag."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.rows, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, n, v) for n, v in attrs]
        if tag in VOID:
            return
        self.open.append((tag, dict(attrs)))
        if tag == "th" and ("scope", "row") in attrs:
            self.rows.append((self.inside("table").get("class"), ""))

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, n, v) for n, v in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        said = any(a.get("class") == "said" for _, a in self.open)
        if not said and any(t == "th" and a.get("scope") == "row" for t, a in self.open):
            kind, text = self.rows[-1]
            self.rows[-1] = (kind, text + data)

    def inside(self, tag):
        return next(a for t, a in reversed(self.open) if t == tag)

    def names(self):
        return [text for kind, text in self.rows if kind == "checks"]


@pytest.fixture(scope="module")
def reports():
    able = Capabilities({"float32"}, features={"allowed", "lengths_differ", "causal_bottom_right"}, lse=True)
    return [
        check_kernel(planted("empty_row_nan"), capabilities=able, only=SMALL, name="<b>x", version="x & y 1.0"),
        check_kernel(planted("zeroed_head"), capabilities=Capabilities({"bfloat16"}), only="gaussian/*"),
        check_kernel(plain, capabilities=able, only="gaussian/plain*", name="right"),
    ]


@pytest.fixture(scope="module")
def text(reports):
    return page(reports)


def test_the_page_is_closed_and_is_xml_as_well(text):
    assert text.lstrip().startswith("<!DOCTYPE html>")
    Page(text)
    root = ET.fromstring(text.split("<!DOCTYPE html>", 1)[1].lstrip())
    for table in root.iter("table"):
        assert table[0].tag == "caption"
        assert table[0].text
    assert all(th.get("scope") in ("col", "row") for th in root.iter("th"))
    assert all(svg.get("aria-label") for svg in root.iter("svg") if svg.get("aria-hidden") is None)
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert {a.get("href")[1:] for a in root.iter("a")} <= set(ids)


def test_nothing_is_loaded(text):
    loads = [(t, n, v) for t, n, v in Page(text).attributes if n in ("src", "href", "srcset", "data", "xlink:href")]
    assert loads
    assert all(v.startswith("#") for _, _, v in loads), loads
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text


def test_names_are_escaped(text):
    assert "<b>" not in text
    assert "&lt;b&gt;x" in text
    assert "x &amp; y 1.0" in text


def test_every_check_stands_once_in_the_tables(reports, text):
    assert Page(text).names() == [c.name for r in reports for c in r.checks]


def test_a_failure_is_whole(reports, text):
    shown = Page(text).text
    for r in reports:
        for c in r.failures:
            assert r.describe(c).split("\n  repeat it")[0] in shown
            assert r.command(c) in shown
    for part in ("What other projects' rules say of out", "by head", "by row", "elements by error in ulps", "head 1, "):
        assert part in shown
    assert "row 3, columns 0 to 31: error ÷ allowed infinite" in shown
    assert all(name in shown for name in SCALE)
    assert "1 = the bound" in shown


def test_what_other_rules_would_have_said(reports, text):
    root = ET.fromstring(text.split("<!DOCTYPE html>", 1)[1].lstrip())
    (section,) = [s for s in root.iter("section") if s.get("aria-labelledby") == "rules"]
    rows = {tr[0].text: [int(td.text) for td in tr[1:]] for tr in section.find(".//tbody")}
    assert set(rows) == set(RULES)
    checks = [c for r in reports for c in r.checks]
    for rule, (accepts, wrong_out, failed, rejects, passed) in rows.items():
        said = [(c.verdict, c.rules[rule]) for c in checks if c.rules.get(rule) is not None]
        assert accepts == said.count(("failed", True))
        assert rejects == said.count(("passed", False))
        assert failed == accepts + said.count(("failed", False))
        assert passed == rejects + said.count(("passed", True))
        assert wrong_out <= accepts
    assert max(row[2] for row in rows.values()) > 0


def test_figures_that_are_no_numbers():
    assert [number(x) for x in (math.nan, math.inf, -math.inf, None, 1.5)] == [
        "NaN",
        "infinite",
        "-infinite",
        "–",
        "1.5",
    ]
    assert [order(x) for x in (math.nan, math.inf, None, -0.5)] == ["-1", "Infinity", "-1", "0.5"]
    worst = Worst("out", math.inf, (0, 0, 0, 0), math.nan, math.inf, math.nan, 1, 1, ("bad",))
    odd = Check("a/b[float32]", "failed", worst, "bad", math.nan)
    shown = Page(page([Report("k", "softmax", (odd,))]))
    assert "got nan, exact inf, allowed error nan" in shown.text
    assert "NaN" in shown.text
    assert "infinite" in shown.text


def test_reports_without_figures():
    checks = (Check("a/b[float32]", "failed", None, "<raised>"), Check("a/c[float16]", "unsupported", message="no"))
    shown = Page(page([Report("k", "power", checks)]))
    assert shown.names() == ["a/b[float32]", "a/c[float16]"]
    assert "k fails a/b[float32]: <raised>" in shown.text
    assert "What other rules" not in shown.text
    assert "nothing ran" in Page(page([Report("k", "power", ())])).text
    assert "No kernel was checked" in Page(page([])).text


@pytest.mark.parametrize("shape", [(3,), (2, 11, 5), (1, 9, 40, 3)])
def test_maps_of_every_shape(reports, shape):
    """dsink has heads alone, lse has no columns, and long axes are banded."""
    array = {1: "dsink", 3: "lse", 4: "dk"}[len(shape)]
    check = next(c for c in reports[1].failures)
    size = (shape[0], 1, 1) if len(shape) == 1 else (*shape[1:], 1)[:3]
    heads, rows, columns = (bands(n, most) for n, most in zip(size, (8, 16, 16), strict=True))
    cells = tuple(tuple(tuple(2.0 for _ in columns) for _ in rows) for _ in heads)
    by_row = (2.0,) * len(rows) if len(shape) > 1 else ()
    figures = replace(
        check.worst.figures, array=array, shape=shape, map=cells, by_head=(2.0,) * len(bands(size[0])), by_row=by_row
    )
    worst = replace(check.worst, array=array, figures=figures, place=(0,) * len(shape))
    shown = Page(page([Report("k", "softmax", (replace(check, worst=worst, arrays=(worst,)),))])).text
    assert f"head {heads[-1].start}" in shown
    axes = {"dsink": "row 0 down, column 0 across", "lse": "rows 0 to 4 down, column 0 across"}
    assert axes.get(array, "keys 0 to 39 down, columns 0 to 2 across") in shown
    assert ": error ÷ allowed 2" in shown


def test_histogram_and_map_count_every_element(reports):
    checks = [c for r in reports for c in r.checks if c.arrays]
    for w in (w for c in checks for w in c.arrays if w.figures is not None):
        f = w.figures
        assert len(f.histogram) == len(EDGES) + 1
        assert sum(f.histogram) == w.elements == math.prod(f.shape)
        assert bool(f.map) == (not w.passed)
        assert max(f.by_head) == w.ratio
        if f.map:
            assert np.max(f.map) == w.ratio
            assert np.shape(f.map) <= (8, 16, 16)
    assert {len(f.figures.map) for f in checks[0].arrays} <= {0, 2}


def test_the_histogram_bins():
    from refattn.check.diagnose.statistics import _histogram

    counts = _histogram(np.array([0.0, 0.3, 0.5, 0.6, 1.0, 1.5, 2.0**20, 2.0**20 + 1, np.inf, np.nan]))
    assert counts[:4] == (1, 2, 2, 1)
    assert counts[-2:] == (1, 3)
    assert sum(counts) == 10
