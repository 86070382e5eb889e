"""Nothing that rounds as its Model says passes its bound, and the bound is not idle."""

import numpy as np
import pytest

from refattn import Problem, evaluate
from refattn.check.bounds.forward import bounds
from refattn.check.bounds.rounded import HOWS, simulate
from refattn.check.model import Model, flash

from ...conftest import tensor
from . import gate


@pytest.mark.parametrize("variant", gate.operators())
def test_no_element_is_past_its_bound(variant):
    found, past = gate.run(200_000, seed=1, names=[variant])
    assert past == []
    assert found[variant] >= 200_000


@pytest.mark.parametrize("variant", gate.operators())
def test_the_worst_rounding_comes_near_the_bound(variant):
    """Otherwise the gate would say nothing: one key, every operation off the same way."""
    rng = np.random.default_rng(0)
    q, k, v = (tensor(rng, (1, 1, n, 8)) for n in (6, 1, 1))
    p = Problem(q, k, np.abs(v), variant=variant)
    answer, model, worst = evaluate(p), Model(lse="float64"), 0.0
    limit = bounds(answer, model)["out"]
    for how in HOWS:
        for _ in range(20):
            got = simulate(p, model, how, rng)["out"]
            worst = max(worst, float((answer.enclosures["out"].error(got) / limit).max()))
    assert 0.3 < worst <= 1


def test_to_nearest_is_what_a_kernel_in_float32_gives():
    rng = np.random.default_rng(0)
    p = Problem(*(tensor(rng, (1, 2, n, 16)) for n in (9, 33, 33)))
    got = simulate(p, flash("float32"))
    q, k, v = (x.astype(np.float32) for x in (p.query, p.key, p.value))
    s = q @ k.swapaxes(2, 3) * np.float32(0.25)
    w = np.exp(s - s.max(-1, keepdims=True))
    out = (w @ v) / w.sum(-1, keepdims=True)
    limit = bounds(evaluate(p), flash("float32"))["out"]
    assert (np.abs(got["out"] - out) <= 2 * limit).all()
    assert got["out"].astype(np.float32).tolist() == got["out"].tolist()
