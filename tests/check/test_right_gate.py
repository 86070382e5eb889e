"""The gate of right runs in small: it counts what is said, and stops when its time is over."""

from refattn.check.inputs.families import cases
from refattn.check.kernels import KERNELS
from refattn.check.kernels.sparse import sparse

from . import right_gate


def test_a_wrong_kernel_is_counted(monkeypatch):
    monkeypatch.setitem(right_gate.RIGHT, "moba", lambda p: 2 * sparse(p)[0])
    monkeypatch.setattr(right_gate, "TYPES", ("float32",))
    runs, said, _ = right_gate.run(1, 600, ["moba"])
    assert runs == {("moba", "float32"): 1}
    assert said["moba", "float32"]


def test_further_runs_ask_what_is_new(monkeypatch):
    """An operator of calls: those that a seed draws, and the cases nearest to an alarm with other numbers."""
    monkeypatch.setattr(right_gate, "TYPES", ("float32",))
    case = next(c for c in cases("relu", "quick") if c.name == "gaussian/plain")
    reports = right_gate.again("relu", "float32", 7, [(case, 0)])
    assert not any(r.failures for r in reports)
    (near, *drawn) = (c for r in reports for c in r.checks)
    assert near.name == "gaussian/plain#7[float32]"
    assert 0 < right_gate.nearness(near) < 1
    assert drawn
    assert all(c.name.startswith("calls/") for c in drawn)


def test_no_run_begins_when_time_is_over():
    runs, said, _ = right_gate.run(5, 0, ["topk"])
    assert set(runs.values()) == {0}
    assert not any(said.values())


def test_kernels_of_three_kinds_are_judged():
    assert {"moba", "relu", "ecoformer", "urpe"} <= set(right_gate.RIGHT)
    assert ("gated_delta" in right_gate.RIGHT) == KERNELS["refattn-chunked"].here
