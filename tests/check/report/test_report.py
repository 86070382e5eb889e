import json
import math
from xml.etree import ElementTree as ET

import pytest

from refattn import Capabilities, check_kernel
from refattn.check.bugs.planted import plain, planted
from refattn.check.report.report import VERDICTS, junit, summary

from ...conftest import SMALL


@pytest.fixture(scope="module")
def report():
    able = Capabilities({"float32"}, features={"allowed", "lengths_differ", "causal_bottom_right"}, lse=True)
    return check_kernel(planted("empty_row_nan"), capabilities=able, only=SMALL, name="bad kernel", version="bad 1.0")


def test_counts_add_up(report):
    assert len(report.checks) == sum(report.count(v) for v in VERDICTS)
    assert report.count("unsupported") > 0
    assert not report.passed
    assert {c.name for c in report.failures} >= {"empty/rows-allowed[float32]", "empty/rows-causal[float32]"}
    assert math.isfinite(report.worst("float32"))
    assert math.isnan(report.worst("float64"))


def test_a_failure_says_where_what_and_how_to_repeat_it(report):
    (check,) = [c for c in report.failures if c.name == "empty/rows-allowed[float32]"]
    text = report.describe(check)
    assert text.splitlines() == [
        "bad kernel fails empty/rows-allowed[float32]: out: NaN in a row without keys, must be 0 (256 of 2368); "
        "only in 4 of 37 rows: 3, 20, 21, 22",
        "  out at batch 0, head 0, row 3, column 0: got nan, exact 0, allowed error 0, infinitely many times that; "
        "256 of 2368 elements fail",
        "  the call: Problem(softmax float32 numpy b=1 h_q=2 h_kv=2 n_q=37 n_k=67 d_k=32 d_v=32 allowed)",
        "  repeat it: refattn check 'bad kernel' --only 'empty/rows-allowed[float32]'",
    ]


def test_it_prints_its_verdict_and_its_failures(report):
    head, *rest = str(report).splitlines()
    assert head == f"bad kernel, softmax: {report.verdict} ({report.count('passed')} of {len(report.checks)} passed)"
    assert rest == "\n".join(map(report.describe, report.failures)).splitlines()


def test_a_budget_is_named_in_the_command():
    report = check_kernel(planted("zeroed_head"), dtypes=["float32"], budget="nightly", only="gaussian/plain")
    assert report.command(report.checks[0]).endswith("--only 'gaussian/plain[float32]' --budget nightly")


def test_other_operators_are_named_in_the_command():
    report = check_kernel(planted("zeroed_head"), "power", only="gaussian/plain*")
    assert report.command(report.checks[0]).startswith("refattn check planted_zeroed_head --variant power --only ")


def test_json_is_strict_and_whole(report):
    plain_json = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert plain_json["counts"]["failed"] == report.count("failed")
    assert len(plain_json["checks"]) == len(report.checks)
    failed = next(c for c in plain_json["checks"] if c["name"] == "empty/rows-allowed[float32]")
    assert failed["verdict"] == "edge"
    assert failed["edges"] == ["empty-row"]
    assert plain_json["edges"]["empty-row"] > 0
    assert plain_json["verdict"].startswith("right · ")
    assert failed["worst"]["place"] == [0, 0, 3, 0]
    assert failed["worst"]["ratio"] == "inf"
    assert failed["reproduce"].startswith("refattn check")
    whole = json.loads(summary([report, report]), parse_constant=pytest.fail)
    assert set(whole) == {"kernels", "machine", "versions"}
    assert len(whole["kernels"]) == 2
    assert whole["versions"]["numpy"]


def test_junit_counts(report):
    root = ET.fromstring(junit([report]).split("\n", 1)[1])
    suite = root.find("testsuite")
    assert int(suite.get("tests")) == len(suite.findall("testcase")) == len(report.checks)
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure")) == len(report.failures)
    assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped")) > 0
    assert "repeat it" in suite.find("testcase/failure").text


def test_a_report_of_passes():
    report = check_kernel(plain, only="gaussian/plain*")
    assert report.passed
    assert report.failures == []


def test_junit_is_xml_whatever_a_name_holds():
    def kernel(p):
        raise RuntimeError("\x1b[31merror: ptxas\x1b[0m")

    wrong = check_kernel(kernel, only="gaussian/plain[float32]", name="k\x00\x1b[1m")
    root = ET.fromstring(junit([wrong]).split("\n", 1)[1])
    assert root[0].get("name") == "k[1m (softmax)"
    assert root[0][0][0].get("message") == "the kernel raised RuntimeError: error: ptxas"
