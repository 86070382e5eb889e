"""Some rows as a call of their own: the same exact answer, and the same gradients."""

import numpy as np
import pytest

from refattn import Problem
from refattn.check.inputs.sample import Sample, sample_of, separate
from refattn.exact.driver import enclose


def call(seed=0, b=2, h=4, h_kv=2, n_q=20, n_k=30, **more):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((b, x, n, 8)).astype(np.float32) for x, n in ((h, n_q), (h_kv, n_k), (h_kv, n_k)))
    return Problem(q, k, v, **more), rng


OPTIONS = [
    {},
    {"causal": "bottom_right"},
    {"causal": "top_left", "window": (5, None)},
    {"window": (3, 2), "softcap": 2.0, "scale": 0.4},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spread", [(2, 4, 20, 30), (1, 1, 20, 30), (2, 1, 1, 30), (1, 4, 20, 1)])
def test_rows_of_a_call_are_a_call(options, spread):
    p, rng = call(**options)
    p = p.replace(
        bias=rng.standard_normal(spread).astype(np.float32),
        allowed=rng.random(spread) < 0.9,
        sink=rng.standard_normal(4).astype(np.float32),
    )
    some = Sample(1, (0, 1), (1, 3), (0, 7, 19))
    dout = some.only(rng.standard_normal(p.out_shape).astype(np.float32))
    whole, part = enclose(p), enclose(some.of(p))
    for name in ("out", "lse"):
        assert np.allclose(some.take(name, whole.values[name]), part.values[name], rtol=1e-12, atol=1e-14)
    back = enclose(p, gradients=dout)
    rows = enclose(some.of(p), gradients=some.take("dq", dout))
    for name, x in back.values.items():
        if name in ("out", "lse"):
            continue
        assert np.allclose(some.take(name, x), rows.values[name], rtol=1e-9, atol=1e-12), name
        assert not np.nan_to_num(some.rest(name, x)).any() or name == "dbias"


def test_packed_sequences():
    ends = np.array([0, 5, 5, 20], np.int32), np.array([0, 9, 12, 30], np.int32)
    p, _ = call(b=1, causal="bottom_right", cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])
    some = Sample(0, (1,), (2, 3), (0, 4, 5, 19))
    whole, part = enclose(p), enclose(some.of(p))
    assert np.allclose(some.take("out", whole.values["out"]), part.values["out"], rtol=1e-12, atol=1e-14)


def test_places_are_those_of_the_whole_call():
    some = Sample(1, (0, 1), (1, 3), (0, 7, 19))
    assert some.place("out", (0, 1, 2, 5)) == (1, 3, 19, 5)
    assert some.place("dk", (0, 1, 29, 5)) == (1, 1, 29, 5)
    assert some.place("dsink", (1,)) == (3,)


def test_small_calls_and_rows_that_hang_together_are_compared_whole():
    p, rng = call()
    assert sample_of(p, rng) is None
    large, rng = call(n_q=200, n_k=300)
    some = sample_of(large, rng)
    assert some.rows[0] == 0
    assert some.rows[-1] == 199
    assert len(some.rows) <= 24
    assert len(some.heads) % len(some.groups) == 0
    assert all(separate(v) for v in ("softmax", "linear"))
    assert not any(separate(v) for v in ("moba", "lightning", "power_blocks"))
    assert not separate("linear", {"decay": 0.5})
