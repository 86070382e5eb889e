"""Which options a kernel reads, and what that makes of its answers."""

import io
import pickle
import re

import numpy as np
import pytest

import refattn
from refattn import Capabilities, Problem, check_kernel
from refattn.check.kernel import Kernel
from refattn.check.reading import note, plain, unread, watched
from refattn.check.report.report import Check, Report
from refattn.check.settle import unasked
from refattn.cli.check import _bad
from refattn.cli.output import console_of, print_outside
from refattn.variants import VARIANTS, Lowered, Selected, variant_of

from ..conftest import SMALL


def attention(p):
    s = np.einsum("bhid,bhjd->bhij", p.query, p.key) / np.sqrt(p.query.shape[-1])
    with np.errstate(all="ignore"):
        w = np.exp(s - s.max(-1, keepdims=True))
    return (np.einsum("bhij,bhjd->bhid", w, p.value) / w.sum(-1, keepdims=True)).astype(p.query.dtype)


def test_reads_are_noted(make):
    p, seen = watched(make(causal="bottom_right", softcap=2.0, sink=np.zeros(2, np.float32)))
    assert unread(p, seen) == ["causal", "sink", "softcap"]
    assert p.softcap == 2.0
    assert p.query.shape == (1, 2, 5, 8)
    assert unread(p, seen) == ["causal", "sink"]
    p.to("numpy").replace(scale=1.0).causal  # noqa: B018
    assert unread(p, seen) == ["sink"]


def test_moving_to_another_library_reads_nothing(make):
    torch = pytest.importorskip("torch")
    p, seen = watched(make(causal="bottom_right", scale=0.5))
    there = p.to("torch")
    assert isinstance(there.query, torch.Tensor)
    assert unread(p, seen) == ["causal", "scale"]
    assert there.scale == 0.5
    assert unread(p, seen) == ["causal"]
    assert p.features() >= {"causal_bottom_right", "scale"}
    assert not unread(p, seen)


def test_a_copy_elsewhere_counts_as_read(make):
    p, seen = watched(make(causal="bottom_right"))
    copy = pickle.loads(pickle.dumps(p))
    assert type(copy) is Problem
    assert copy.causal == "bottom_right"
    assert not unread(p, seen)
    q, seen = watched(make(causal="bottom_right"))
    note(q, frozenset({"causal"}))
    assert not unread(q, seen)
    assert type(plain(q)) is Problem


def zeros(p):
    return np.zeros(p.out_shape, p.query.dtype)


def either_corner(p):
    n, m = p.query.shape[2], p.key.shape[2]
    causal = p.features() & {"causal_bottom_right", "causal_top_left"}
    seen = np.tril(np.ones((n, m), bool), m - n) if causal else np.ones((n, m), bool)
    plain = Problem(p.query, p.key, p.value, allowed=seen[None, None])
    return refattn.reference(plain)["out"].astype(p.query.dtype)


def test_an_undeclared_kernel_is_right_where_it_reads_all():
    report = check_kernel(attention, only=SMALL)
    assert report.right
    assert not report.count("failed")
    unread_ones = [c for c in report.checks if c.verdict == "unread"]
    assert "it does not read softcap" in {c.message for c in unread_ones}
    assert report.passed
    assert re.fullmatch(r"right, \d+ of \d+ checks fit", report.verdict)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if isinstance(variant_of(v).shape, Selected)])
def test_what_every_call_has_excuses_nothing(variant):
    """Zeros, from a kernel that reads no option: each call of these operators is causal."""
    checks = check_kernel(zeros, variant, dtypes=["float32"], only="gaussian/causal-bottom-right").checks
    assert [c.verdict for c in checks] == ["failed"]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if isinstance(variant_of(v).shape, Lowered | Selected)])
def test_plain_attention_is_no_operator_that_chooses_keys(variant):
    """Short calls without an operator's own options are often plain attention; nothing else was asked of it."""

    def plain_attention(p):
        n, m = p.query.shape[2], p.key.shape[2]
        seen = np.tril(np.ones((n, m), bool), m - n) if p.causal else np.ones((n, m), bool)
        plain = Problem(p.query, p.key, p.value, allowed=seen[None, None])
        return refattn.reference(plain)["out"].astype(p.query.dtype)

    own = [n for n, case in variant_of(variant).cases.items() if "options" in case]
    checks = [Check("gaussian/plain[float32]", "passed")]
    for n in own[:2]:
        checks += check_kernel(plain_attention, variant, dtypes=["float32"], only=f"gaussian/{n}").checks
    report = Report("plain", variant, tuple(checks))
    assert not report.right


def test_what_features_tell_is_read():
    """A kernel that takes either corner for the other, and asks the features which a call has."""
    report = check_kernel(either_corner, dtypes=["float32"], only="gaussian/causal-top-left")
    assert [c.verdict for c in report.checks] == ["failed"]


def test_laws_alone_make_no_kernel_right():
    """Every call of Lightning attention has its decay as an option: zeros keep laws and read nothing."""
    report = check_kernel(zeros, "lightning", dtypes=["float32"], only="*/de*")
    assert {(c.name.partition("/")[0] == "law", c.verdict) for c in report.checks} == {
        (True, "passed"),
        (False, "unread"),
    }
    assert (report.right, report.passed) == (False, False)
    assert report.verdict == "not judged: no answer agreed, and it read none of the options asked for"


def test_an_option_that_is_read_and_wrong_is_wrong():
    def kernel(p):
        assert p.softcap is None or p.softcap > 0
        return attention(p)

    report = check_kernel(kernel, only="gaussian/softcap")
    assert [c.verdict for c in report.checks] == ["failed"]
    assert report.verdict == "WRONG"


def test_a_declared_option_that_is_not_read_is_wrong():
    report = check_kernel(attention, only="gaussian/softcap", capabilities=Capabilities())
    assert [c.verdict for c in report.checks] == ["failed"]


def test_outside_the_capabilities():
    able = Capabilities(features={"lengths_differ"})
    (silent,) = check_kernel(attention, only="gaussian/softcap", capabilities=able).checks
    assert silent.verdict == "unread"
    assert silent.message == "not in its capabilities: softcap; it does not read softcap"

    def reads(p):
        return attention(p) * (1 if p.softcap is None else 2)

    report = check_kernel(reads, only="gaussian/softcap", capabilities=able)
    assert [(c.verdict, c.edges) for c in report.checks] == [("edge", ("outside",))]
    assert "it must raise there, and gave a wrong answer" in report.checks[0].message
    assert report.failures == list(report.checks)


def test_a_refusal_inside_the_capabilities_is_a_failure():
    from refattn import UnsupportedProblem

    def refuses(p):
        raise UnsupportedProblem("only even lengths")

    (check,) = check_kernel(refuses, only="gaussian/plain", capabilities=Capabilities()).checks
    assert check.verdict == "failed"
    assert check.message == (
        "it raised UnsupportedProblem inside its capabilities: only even lengths; declare what it does not take"
    )
    (check,) = check_kernel(refuses, only="gaussian/plain", capabilities=Capabilities(refuses=True)).checks
    assert check.verdict == "unsupported"


def test_a_declared_feature_that_nothing_asks_for_is_said():
    able = Capabilities(features={"bias", "sink", "softcap", "appending", "paged_nhd", "state"})
    done = [
        Check("a[float32]", "passed", features=("bias",)),
        Check("b[float32]", "unsupported", features=("appending", "paged_nhd")),
        Check("c[float32]", "unread", features=("softcap",)),
        Check("d[float32]", "failed", features=("sink", "window")),
    ]
    kernel = Kernel.of(lambda p: p, capabilities=able)
    missed = unasked(kernel, "softmax", done)
    assert missed == ("appending", "paged_nhd", "softcap")
    assert unasked(kernel, "sigmoid", done[:1]) == ()  # it has none of them
    assert unasked(Kernel.of(lambda p: p), "softmax", []) == ()
    report = Report("k", "softmax", (done[0],), unasked=missed)
    assert report.verdict == "right, 3 features not judged"
    assert report.of_format("float32").verdict == report.verdict
    assert report.to_dict()["unasked"] == ["appending", "paged_nhd", "softcap"]
    assert [_bad(report, strict) for strict in (False, True)] == [False, True]
    text = io.StringIO()
    print_outside(console_of(text), [report], ())
    assert "k: declared, and no check asked for it: appending, paged_nhd, softcap\n" in text.getvalue()


def test_a_run_says_what_nothing_asked_for(monkeypatch):
    from refattn.check import runner
    from refattn.check.kernels.tiled import tiled

    plan = runner.plan
    few = lambda *args, **more: [i for i in plan(*args, **more) if i.name == "ragged/tile-plus-one[float32]"]  # noqa: E731
    monkeypatch.setattr(runner, "plan", few)
    able = Capabilities(features={"causal_top_left", "softcap"})
    assert check_kernel(tiled, capabilities=able, budget="ci").unasked == ("softcap",)
    assert check_kernel(tiled, capabilities=able, only="ragged/tile-plus-one").verdict == "right"
