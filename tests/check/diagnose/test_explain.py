"""Where errors lie, what failed checks share, which planted bugs look alike."""

import numpy as np
import pytest

from refattn import Capabilities, check_kernel
from refattn.check.bugs.edits import broken
from refattn.check.diagnose.explain import alike, explain, shared
from refattn.check.diagnose.statistics import where
from refattn.check.model import GRADIENTS

from ...conftest import SMALL

ABLE = Capabilities(lse=True, gradients=GRADIENTS)


def hits(shape, *at):
    mask = np.zeros(shape, bool)
    mask[at] = True
    return mask


@pytest.mark.parametrize(
    ("name", "failing", "said"),
    [
        ("out", hits((1, 4, 70, 8), 0, 2), ("only in head 2 of 4",)),
        (
            "out",
            hits((1, 4, 70, 8), 0, slice(None), slice(64, None)),
            ("only from row 64 of 70 on, the edge of a tile of 64",),
        ),
        ("out", hits((1, 4, 70, 8), 0, slice(None), slice(0, 9)), ("only up to row 8 of 70",)),
        ("dk", hits((1, 4, 70, 8), 0, 1, [3, 30]), ("only in head 1 of 4", "only in 2 of 70 keys: 3, 30")),
        ("dbias", hits((1, 1, 5, 9), 0, 0, slice(None), 4), ("only in key 4 of 9",)),
        ("lse", hits((2, 3, 7), 1), ("only in batch 1 of 2",)),
        ("out", np.ones((1, 2, 3, 4), bool), ()),
        ("out", np.zeros((1, 2, 3, 4), bool), ()),
        ("dsink", hits((4,), 2), ()),
    ],
)  # fmt: skip
def test_where_errors_lie(name, failing, said):
    assert where(name, failing) == said


def report_of(name, **more):
    return check_kernel(broken(name), capabilities=ABLE, dtypes=["float32"], **({"only": SMALL} | more))


def test_what_failed_checks_share():
    assert "with grouped heads" in shared(report_of("heads_tiled", only="gaussian/*"))
    assert "in gradients" in shared(report_of("no_delta", only="gaussian/*"))
    assert "with softcap" in shared(report_of("softcap_never_applied", only="gaussian/*"))
    assert shared(report_of("heads_tiled", only="gaussian/grouped-heads[float32]")) == ()


@pytest.mark.parametrize("name", ["window_left_exclusive", "no_slope_of_the_cap"])
def test_a_bug_is_most_like_itself(name):
    first, share = alike(report_of(name, only="gaussian/*"))[0]
    assert first == name
    assert share > 0.99


def test_an_explanation_ends_in_a_program():
    kernel = broken("softcap_never_applied")
    report = report_of("softcap_never_applied", only="gaussian/*")
    found = explain(kernel, report, capabilities=ABLE, seconds=5.0)
    text = "\n".join(found.lines)
    assert "looks like: softcap never applied, as in " in text
    assert "still fails on Problem(softmax float32 numpy b=1 h_q=1" in text
    assert found.program.splitlines()[-1].endswith(
        "in refattn.check_problem('softcap_never_applied', p, 'found').failures))"
    )


def test_a_call_that_was_drawn_is_made_small_too():
    kernel = broken("softcap_never_applied")
    report = check_kernel(kernel, capabilities=ABLE, seed=0, budget="quick", only="calls/*")
    found = explain(kernel, report, capabilities=ABLE, seconds=5.0)
    assert found.check.startswith("calls/")
    assert "softcap=" in found.smallest
    assert "--budget quick --seed 0" in report.command(report.failures[0])
