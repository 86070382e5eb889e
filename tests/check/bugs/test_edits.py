"""The planted bugs: each edit still applies, each bug still fails what the table of signatures says."""

import json
from collections import Counter
from functools import cache

import pytest

from refattn import Capabilities, check_kernel
from refattn.check.bugs.edits import BUGS, CLASSES, RECURRENT_BUGS, broken
from refattn.check.diagnose.explain import SIGNATURES
from refattn.check.kernels import KERNELS
from refattn.check.kernels.tiled import tiled
from refattn.check.model import GRADIENTS
from refattn.check.runner import plan

from ...conftest import SMALL

TABLE = json.loads(SIGNATURES.read_text())
ABLE = Capabilities(frozenset({"float32", "bfloat16"}), lse=True, gradients=GRADIENTS)


def failed(kernel, dtype, names):
    """The names of those checks that fail."""
    found = set()
    for name in names:
        report = check_kernel(kernel, capabilities=ABLE, dtypes=[dtype], only=f"{name}[{dtype}]")
        found |= {c.name.split("[")[0] for c in report.failures}
    return found


@cache
def failed_by_the_right_kernel(dtype, name):
    return failed(tiled, dtype, {name})


def test_there_are_enough_of_every_class():
    count = Counter(b.kind for b in BUGS.values())
    assert len(BUGS) >= 160
    assert set(count) == set(CLASSES)
    assert min(count.values()) >= 5
    assert sum(bool(b.origin) for b in BUGS.values()) >= 75
    assert all("#" in b.origin for b in BUGS.values() if b.origin)


def test_the_table_knows_every_bug():
    assert set(TABLE["bugs"]) == set(BUGS)
    assert all(TABLE["bugs"].values())


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_caught(name):
    at = TABLE["bugs"][name]
    if BUGS[name].kind == "K" or name == "scale_of_an_earlier_call":  # it shows in a run, not in a check alone
        checks = plan(broken(name), capabilities=ABLE, dtypes=["float32"], only=SMALL)
        known = {TABLE["checks"][i] for i in at}
        first = next(i for i, c in enumerate(checks) if c.name.partition("[")[0] in known)
        # a few calls before the first that fails leave something behind
        assert any(i.run().verdict in ("failed", "edge") for i in checks[max(0, first - 4) :])
        return
    # one of the checks that it fails: from the middle of the small ones, where there are some
    all_of_them = [TABLE["checks"][i] for i in at]
    some = [c for c in all_of_them if not c.startswith(("models/", "law/"))] or all_of_them
    where = some[len(some) // 2]
    dtype = "bfloat16" if name in TABLE["bfloat16"] else "float32"
    assert failed(broken(name), dtype, {where}) == {where}
    assert failed_by_the_right_kernel(dtype, where) == set()


def test_an_edit_that_no_longer_applies_is_an_error(monkeypatch):
    monkeypatch.setattr("refattn.check.bugs.edits._source", lambda kernel: "nothing")
    with pytest.raises(ValueError, match="stands 0 times in the kernel, expected once"):
        broken("heads_tiled")


ENTRY = KERNELS["refattn-chunked"]
WHERE = {
    "dstate_without_the_first_decay": ("gated_delta", "float32", ("gaussian/state/gradients", "law/state_gradient")),
    "dstate_of_the_first_head_of_a_group": ("lightning", "float32", ("gaussian/one-token-and-all/gradients",)),
    "dstate_kept_in_bfloat16": ("gated_delta", "float32", ("gaussian/state/gradients",)),
    "state_of_the_sequence_before": ("lightning", "float32", ("gaussian/packed",)),
    "state_of_the_first_sequence": ("gated_delta", "float32", ("gaussian/packed-and-all",)),
    "decay_from_the_start_of_the_pack": ("lightning", "float32", ("gaussian/packed-and-all",)),
    "gradient_of_the_last_state_dropped": ("gated_delta", "float32", ("law/last_state_gradient",)),
    "last_state_of_the_pack_for_all": ("lightning", "float32", ("gaussian/packed",)),
    "state_lost_after_64_tokens": ("gated_delta lightning", "float32", ("gaussian/long",)),
    "state_lost_after_128_tokens": ("gated_delta lightning", "float32", ("gaussian/long",)),
}
"""A bug of a recurrence: its operators, a format, and checks that it fails."""


def verdict(kernel, variant, name, dtype):
    """The verdict of one check of a recurrence's kernel."""
    able = ENTRY.capabilities
    (check,) = check_kernel(kernel, variant, capabilities=able, dtypes=[dtype], only=f"{name}[{dtype}]").checks
    return check.verdict


@pytest.mark.parametrize("name", RECURRENT_BUGS)
def test_a_bug_of_a_recurrence_is_caught(name):
    pytest.importorskip("torch")
    variants, dtype, checks = WHERE[name]
    for variant in variants.split():
        for check in checks:
            assert verdict(broken(name), variant, check, dtype) == "failed"
        assert verdict(ENTRY.kernel().call, variant, checks[0], dtype) == "passed"
