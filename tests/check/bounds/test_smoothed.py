"""Keys less their mean: the same softmax, lse put back, and what it is refused for."""

import numpy as np
import pytest

from refattn import Problem, UnsupportedProblem, evaluate
from refattn.check.bounds.forward import bounds
from refattn.check.bounds.smoothed import mean_of, mean_size, smoothed
from refattn.check.model import sage
from refattn.exact.heads import heads

from ...conftest import tensor


def call(**more):
    rng = np.random.default_rng(0)
    q, k, v = (tensor(rng, (1, 2, n, 8), "float16") for n in (5, 9, 9))
    return Problem(q, k + k.dtype.type(4), v, **more)


def test_the_answer_does_not_change_but_for_lse():
    p = call()
    for one in heads(p):
        s = smoothed(one)
        assert np.abs(s.k.mean(0)).max() < 2.0**-48  # sums of nine numbers below 8
        exact = evaluate(p.replace(query=p.query.astype(float), key=p.key.astype(float), value=p.value.astype(float)))
        k = np.zeros(p.key.shape)
        k[0, one.head] = s.k
        moved = evaluate(exact.problem.replace(key=k))
        at = 0, one.head
        back = (one.q @ mean_of(one).T)[:, 0] * 8**-0.5
        # two float64 sums of eight products, below 100 in size
        assert np.abs(moved.out[at] - exact.out[at]).max() < 2.0**-40
        assert np.abs(moved.lse[at] + back - exact.lse[at]).max() < 2.0**-40
        assert mean_size(s) == np.abs(mean_of(one)).max() or abs(mean_size(s) - np.abs(mean_of(one)).max()) < 2.0**-48


def test_only_keys_that_are_seen_count():
    allowed = np.ones((1, 1, 5, 9), bool)
    allowed[..., 6:] = False
    p = call(allowed=allowed)
    key = p.key.copy()
    key[..., 6:, :] = np.float16(60000)
    (one, _) = heads(p.replace(key=key))
    assert (mean_of(one) == one.k[:6].mean(0)).all()
    assert not smoothed(one).k[6:].any()
    (nothing, _) = heads(call(allowed=allowed & False))
    assert not mean_of(nothing).any()
    assert not smoothed(nothing).k.any()


def test_keys_to_one_side_have_narrower_bounds_smoothed():
    from dataclasses import replace

    answer, model = evaluate(call()), sage("float16")
    plain = bounds(answer, replace(model, smoothed=False))["out"]
    assert (bounds(answer, model)["out"] < 0.75 * plain).all()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"softcap": 3.0}, "smoothed keys do not go with softcap"),
        ({"sink": np.zeros(2, np.float16)}, "do not go with sink"),
        ({"variant": "sigmoid"}, "do not go with sigmoid attention"),
    ],
)
def test_what_a_constant_changes_is_refused(more, text):
    with pytest.raises(UnsupportedProblem, match=text):
        bounds(evaluate(call(**more)), sage("float16"))
