import numpy as np
import pytest
import torch

from refattn import evaluate
from refattn.errors import UntrustedArithmetic
from refattn.exact import trust


def test_this_machine_passes():
    trust.check_machine.cache_clear()
    trust.check_machine()
    trust.check_thread()


def test_flush_to_zero_is_refused(make):
    if not torch.set_flush_denormal(True):
        pytest.skip(reason="this processor has no flush-to-zero mode")
    try:
        with pytest.raises(UntrustedArithmetic, match=r"taken for zero in this thread; .*denormal\(False\)"):
            evaluate(make(), rounding="float32")
    finally:
        torch.set_flush_denormal(False)
    assert evaluate(make(), rounding="float32").undecided["out"] == 0


class Wrong(np.ndarray):
    """Arrays whose matrix product is wrong in one way or another."""

    how = "short"

    def __matmul__(self, other):
        a, b = np.asarray(self), np.asarray(other)
        if a.dtype != np.float64:
            return a @ b
        if self.how == "short":
            return (a.astype(np.float32) @ b.astype(np.float32)).astype(np.float64)
        return a @ b + 2.0**-60 * np.abs(a).max() * np.abs(b).max() * (np.abs(a).max() > 1e20)


@pytest.mark.parametrize(
    ("how", "text"), [("short", "a product of integers below"), ("mixed", "rows of a product disturb")]
)
def test_a_product_that_is_not_classical_is_refused(how, text, monkeypatch):
    monkeypatch.setattr(Wrong, "how", how)
    right = np.random.default_rng

    class Generator:
        def __init__(self, seed):
            self.rng = right(seed)

        def __getattr__(self, name):
            return lambda *a, **k: np.asarray(getattr(self.rng, name)(*a, **k)).view(Wrong)

    monkeypatch.setattr(np.random, "default_rng", Generator)
    trust.check_machine.cache_clear()
    with pytest.raises(UntrustedArithmetic, match=text):
        trust.check_machine()
    trust.check_machine.cache_clear()
