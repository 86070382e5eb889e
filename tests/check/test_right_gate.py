"""The gate of right runs in small: it counts what is said, and stops when its time is over."""

from refattn.check.kernels import KERNELS
from refattn.check.kernels.sparse import sparse

from . import right_gate


def test_a_wrong_kernel_is_counted(monkeypatch):
    monkeypatch.setitem(right_gate.RIGHT, "moba", lambda p: 2 * sparse(p)[0])
    monkeypatch.setattr(right_gate, "TYPES", ("float32",))
    runs, said = right_gate.run(1, 600, ["moba"])
    assert runs == {("moba", "float32"): 1}
    assert said["moba", "float32"]


def test_no_run_begins_when_time_is_over():
    runs, said = right_gate.run(5, 0, ["topk"])
    assert set(runs.values()) == {0}
    assert not any(said.values())


def test_kernels_of_three_kinds_are_judged():
    assert {"moba", "relu", "ecoformer", "urpe"} <= set(right_gate.RIGHT)
    assert ("gated_delta" in right_gate.RIGHT) == KERNELS["refattn-chunked"].here
